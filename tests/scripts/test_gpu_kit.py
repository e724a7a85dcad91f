"""The kit for a GPU, in miniature: real engines, a real round, real trainers."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mini import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
from gpu_kit import document, machine, supervise

RUN = [sys.executable, str(ROOT / "scripts" / "gpu_kit" / "run.py")]


def kit(*options: str) -> tuple[int, str]:
    done = subprocess.run([*RUN, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    return done.returncode, done.stdout


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.service
@pytest.mark.timeout(900)
def test_every_part_runs_in_miniature(tmp_path: Path) -> None:
    code, printed = kit("--small", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"))
    found = json.loads((tmp_path / "out" / "measurements-gpu.json").read_text())
    assert code == 0, printed
    assert [part["state"] for part in found["parts"]] == ["done"] * 4
    swap, whole, steps, tokens = ({f["what"]: f["figures"] for f in part["findings"]} for part in found["parts"])

    assert swap["sleep level 2"]["supported"] is False  # a CPU has no sleep, and the document says so
    assert swap["sleep level 2"]["nats_from_canaries"] < 0.05
    there, back = swap["swap 1, policy 0 → 1"], swap["swap 1, policy 1 → 0"]
    assert {there["shown_by"], back["shown_by"]} <= {"canaries", "weights"}
    assert there["nats_from_new"] < there["nats_from_old"]
    noise = swap["noise: prefill ↔ trainer in bf16"]
    assert 0 < noise["mean"] < noise["p99"] < 1 and noise["tokens"] == 32
    assert noise["mean_of_window_max"] < noise["mean"] + noise["p99"]
    assert -2 < swap["noise: decode ↔ prefill"]["mean_logp"] < -0.3  # as a trained model's

    assert whole["round"]["verdict"] == "promoted"
    assert whole["round"]["train: agreement mean"] < 0.05
    assert {f"stage {name}" for name in ("generate", "score", "depth", "train", "evaluate", "promote")} <= whole.keys()
    assert whole["restarts"]["count"] == 0

    ours, theirs = (steps[f"miniature, all weights, 2 layers: {arm}"] for arm in ("ε-DPO", "TRL's DPO"))
    ratio = steps["miniature, all weights, 2 layers: ε-DPO ÷ TRL's DPO"]
    assert ratio["seconds"] == pytest.approx(ours["seconds_a_step"] / theirs["seconds_a_step"])
    assert "miniature, all weights, all 4 layers, extrapolated: ε-DPO" in steps

    ours, theirs = tokens["stage generate, turn 3"], tokens["vLLM alone, turn 3"]
    assert ours["answers"] == theirs["answers"] == 48
    assert ours["shortest"] < ours["longest"] and theirs["shortest"] < theirs["longest"]
    ratio = tokens["stage generate ÷ vLLM alone, the last turn"]["tokens_a_second"]
    assert ratio == pytest.approx(ours["tokens_a_second"] / theirs["tokens_a_second"])

    text = (tmp_path / "out" / "measurements-gpu.md").read_text()
    for words in ("torch", "transformers", "GPU (name, memory, driver)", "Random networks", "noise: prefill ↔"):
        assert words in text
    assert all(f"## {part['title']}" in text and part["title"] in printed for part in found["parts"])


def test_without_time_every_part_is_dropped_and_the_document_says_so(tmp_path: Path) -> None:
    code, printed = kit("--small", "--minutes", "0", "--out", str(tmp_path))
    assert code == 3
    assert printed.count("dropped, since no time was left") == 4
    assert (tmp_path / "measurements-gpu.md").read_text().count("State: dropped") == 4


def test_a_part_is_ended_at_its_limit_with_all_that_it_started(tmp_path: Path) -> None:
    code = (
        "import json, subprocess, sys, time\n"
        "other = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        "print(json.dumps({'what': 'other', 'figures': {'pid': other.pid}}), flush=True)\n"
        "print('what it did last', file=sys.stderr, flush=True)\n"
        "time.sleep(600)\n"
    )
    found: list[dict[str, Any]] = []
    began = time.monotonic()
    ended = supervise.run([sys.executable, "-c", code], 2.0, tmp_path / "part.log", found.append, os.environ)
    assert ended.state == "stopped" and ended.seconds < 10 and time.monotonic() - began < 10
    assert "what it did last" in ended.log_tail
    assert not Path(f"/proc/{found[0]['figures']['pid']}").exists()


def test_a_part_that_fails_keeps_what_it_found(tmp_path: Path) -> None:
    code = 'print(\'{"what": "first", "figures": {"seconds": 1.0}}\', flush=True); raise OSError(\'no such device\')'
    found: list[dict[str, Any]] = []
    ended = supervise.run([sys.executable, "-c", code], 60.0, tmp_path / "part.log", found.append, os.environ)
    assert ended.state == "failed" and "no such device" in ended.log_tail
    record = {"title": "A part", "about": "", "state": ended.state, "seconds": ended.seconds, "findings": found}
    text = document.markdown({"command": "…", "machine": {}, "parts": [record | {"log_tail": ended.log_tail}]})
    assert "| first | 1 |" in text and "no such device" in text and "State: failed" in text


def test_a_miniature_never_writes_to_docs() -> None:
    code, printed = kit("--small")
    assert code == 2 and "--small needs --out" in printed


@pytest.mark.skipif(bool(machine.gpus()), reason="there is a GPU")
def test_without_a_gpu_only_the_miniature_runs() -> None:
    code, printed = kit()
    assert code == 2 and "nvidia-smi finds no GPU here: --small" in printed
