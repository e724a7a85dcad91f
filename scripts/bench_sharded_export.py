#!/usr/bin/env python
"""The export of a model that two processes share: are its files those of the whole model's export, and what does a process hold?

    python scripts/bench_sharded_export.py [--hidden 1024] [--layers 24] [--words 64000] [--out runs/bench-sharded-export]

A random Llama in float32 is shared by FSDP2 over gloo, and each process moves its own weights. They save (DCP), rank 0 exports
for bfloat16 with masters, and the canaries are scored from what was exported. Then one process exports the whole model,
and the files are compared. A process's own memory (RssAnon) is looked at every 10 ms, from where it has its share on. What the
kernel keeps of files that are read is not counted: it lets go of that whenever the memory is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
MIB = 1 << 20


def anonymous() -> float:
    """This process's own memory (MiB)."""
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) / 1024


class Peak:
    """The most of it so far."""

    def __init__(self) -> None:
        self.mib = anonymous()
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            self.mib = max(self.mib, anonymous())
            time.sleep(0.01)


def rank_main(out: Path) -> None:
    import torch
    from torch import distributed
    from torch.distributed import checkpoint
    from torch.distributed.fsdp import fully_shard

    from selfplay.models import sharded, weights

    distributed.init_process_group("gloo")
    rank, start = distributed.get_rank(), out / "start"
    model = weights.load(start)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().mul_(1.001)
    share = sum(parameter.to_local().nbytes for parameter in model.parameters()) / MIB
    before, peak, began = anonymous(), Peak(), time.monotonic()
    checkpoint.save({"model": model.state_dict()}, checkpoint_id=out / "save")
    saved, seconds, peak.mib = peak.mib, time.monotonic() - began, anonymous()
    began = time.monotonic()
    if rank == 0:
        sharded.export(model, weights.load(start, "auto"), start, start, out / "sharded", torch.bfloat16)
        del model
        beside = out / "beside"
        served = weights.load_in_parts(out / "sharded", torch.bfloat16, torch.device("cpu"), beside)
        weights.sequence_logps(served, [list(range(64))], torch.device("cpu"))
    else:
        sharded.export(model, None, start, start, None, torch.bfloat16)
    found = {"rank": rank, "share": share, "before": before, "over_save": saved - before, "over_export": peak.mib - before,
             "seconds_save": seconds, "seconds_export": time.monotonic() - began}  # fmt: skip
    (out / f"rank{rank}.json").write_text(json.dumps(found))
    distributed.barrier()
    os._exit(0)


def whole_main(out: Path, sizes: argparse.Namespace) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from selfplay.models import weights

    if not (out / "start").is_dir():
        config = LlamaConfig(
            vocab_size=sizes.words, hidden_size=sizes.hidden, intermediate_size=4 * sizes.hidden,
            num_hidden_layers=sizes.layers, num_attention_heads=16, num_key_value_heads=4,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(out / "start")
        return
    model = weights.load(out / "start")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.001)
    weights.export(model, out / "start", out / "start", out / "whole", torch.bfloat16)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--words", type=int, default=64_000)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-sharded-export"))
    parser.add_argument("--part", choices=("rank", "whole"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part == "rank":
        rank_main(args.out)
    if args.part == "whole":
        whole_main(args.out, args)
        return 0
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    own = [str(Path(__file__).resolve()), *sys.argv[1:], "--part"]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *own, "rank"]
    for argv in ([sys.executable, *own, "whole"], two, [sys.executable, *own, "whole"]):
        subprocess.run(argv, check=True)
    same = True
    for file in sorted(path for path in (args.out / "whole").rglob("*") if path.is_file()):
        other = args.out / "sharded" / file.relative_to(args.out / "whole")
        equal = other.is_file() and subprocess.run(["cmp", "-s", str(file), str(other)]).returncode == 0
        same &= equal
        print(
            f"{file.relative_to(args.out / 'whole')}: {file.stat().st_size / MIB:,.0f} MiB, {'the same' if equal else 'OTHER'}"
        )
    for rank in (0, 1):
        found = json.loads((args.out / f"rank{rank}.json").read_text())
        print(", ".join(f"{name} {value:,.1f}" for name, value in found.items()))
        same &= max(found["over_save"], found["over_export"]) <= 1024
    shutil.rmtree(args.out)
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
