#!/usr/bin/env python
"""Does a service that runs for long grow? Many rounds of the smallest size, and what the processes hold in each.

    python scripts/soak.py [--rounds 100] [--out runs/soak]

`selfplay serve` on the miniature of the tiny world, with the default tracker. Five times a second: resident memory, file
descriptors and threads of the service itself, and the same, with the number of processes, of everything below it together
(engine, reward server, judge, trainer, their guards). A round's memory is the largest that was
seen in it; its counts are the median over the looks, for threads that live for a request are no growth. The table gives the
median over the rounds of each tenth of the run. Growth compares the last tenth with the second (the first warms up). A round's time goes from the end of the one
before it to its own end.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts"))

from chaos import SETTINGS, Served, world  # noqa: E402

from selfplay.processes.reaping import marked  # noqa: E402
from selfplay.storage.ledger import Store  # noqa: E402

SMALLEST = [
    "prompts.per_round=8", "generate.candidates=2", "train.batch_pairs=4", "train.micro_batch_pairs=4", "train.epochs=1",
    "train.save_steps=100", "evaluate.prompts=4", "evaluate.audit_every=0", "retention.last=1", "track=tensorboard",
]  # fmt: skip

Held = dict[str, float]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--config", default=str(ROOT / "configs" / "tiny.yaml"))
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    sets = [*world(), *SETTINGS, *SMALLEST, f"schedule.end.rounds={args.rounds}", *args.set]
    served = Served(args.config, sets, args.out)
    looks: dict[int, list[Held]] = {}  # by round
    said, began = 0, time.monotonic()
    while (state := served.state()) is None or state[0] != "ended":
        if served.process.poll() is not None or (state is not None and state[0] == "paused"):
            sys.exit(f"the service is {state}; see {args.out}/service.log")
        time.sleep(0.2)
        if (index := open_round(args.out)) is None:
            continue
        looks.setdefault(index, []).append(held(served.process.pid, args.out))
        if index > 1 and index % 10 == 1 and index != said and index - 1 in looks:
            said, each = index, (time.monotonic() - began) / (index - 1)
            print(f"  round {index - 1}, {each:.1f} s a round: {shown(of_round(looks[index - 1]))}", flush=True)
    served.stop()
    return report({index: of_round(found) for index, found in looks.items()}, times(args.out))


def of_round(looks: list[Held]) -> Held:
    """The largest memory of all looks at a round, and the median of each count."""
    return {
        name: (max if name.endswith("MiB") else statistics.median)(look[name] for look in looks) for name in looks[0]
    }


def open_round(run_dir: Path) -> int | None:
    """The round that runs now, None between rounds."""
    if not (run_dir / "ledger.sqlite").is_file():
        return None
    store = Store(run_dir)
    row = store.unfinished()
    store.close()
    return row["round"] if row is not None else None


def held(pid: int, run_dir: Path) -> Held:
    """What the service and everything below it hold now."""
    own, below = used([pid]), used(marked(run_dir))
    del own["processes"]
    return {f"service {k}": v for k, v in own.items()} | {f"children {k}": v for k, v in below.items()}


def used(pids: Iterable[int]) -> Held:
    total = {"MiB": 0.0, "descriptors": 0.0, "threads": 0.0, "processes": 0.0}
    for pid in pids:
        try:
            status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
            resident = int(status["VmRSS"].split()[0]) / 1024
        except (OSError, KeyError):  # it ended meanwhile, or is about to: no memory is left to it
            continue
        total["MiB"] += resident
        total["descriptors"] += descriptors
        total["threads"] += int(status["Threads"])
        total["processes"] += 1
    return total


def shown(sample: Held) -> str:
    return ", ".join(f"{name} {value:.0f}" for name, value in sample.items())


def times(run_dir: Path) -> dict[int, tuple[float, float]]:
    """Of each round: its seconds, and the share of them that no stage accounts for."""
    store = Store(run_dir)
    rows = store.rounds()
    found, since = {}, datetime.fromisoformat(rows[0]["started"])
    for row in rows:
        ended = datetime.fromisoformat(row["ended"])
        whole = (ended - since).total_seconds()
        found[row["round"]] = whole, 1 - sum(store.seconds(row["round"]).values()) / whole
        since = ended
    store.close()
    return found


def report(held_in: dict[int, Held], spent: dict[int, tuple[float, float]]) -> int:
    """Print the table; 1 where something grew by more than a twentieth."""
    rounds = sorted(held_in)  # a round that was over between two looks has no sample, and none is made up for it
    parts = min(10, len(rounds))
    tenths = [rounds[i * len(rounds) // parts : (i + 1) * len(rounds) // parts] for i in range(parts)]
    names = list(held_in[rounds[0]])
    medians = [[statistics.median(held_in[r][name] for r in tenth) for name in names] for tenth in tenths]
    print(f"\n{len(spent)} rounds, {len(rounds)} of them sampled\n")
    print("| rounds | " + " | ".join(names) + " | seconds a round | outside stages |")
    print("|---" * (len(names) + 3) + "|")
    for tenth, values in zip(tenths, medians, strict=True):
        seconds, outside = (statistics.median(spent[r][i] for r in tenth) for i in (0, 1))
        cells = " | ".join(
            f"{value:.1f}" if "MiB" in name else f"{value:g}" for name, value in zip(names, values, strict=True)
        )
        print(f"| {tenth[0]} to {tenth[-1]} | {cells} | {seconds:.1f} | {outside:.2%} |")
    growth = [
        after / before - 1 if before else 0.0
        for before, after in zip(medians[min(1, parts - 1)], medians[-1], strict=True)
    ]
    print("| growth | " + " | ".join(f"{g:+.1%}" for g in growth) + " | | |")
    whole = sum(seconds for seconds, _ in spent.values())
    outside = sum(seconds * share for seconds, share in spent.values())
    print(
        f"\noutside stages: {outside / whole:.2%} of the run, {max(share for _, share in spent.values()):.2%} at most"
    )
    return int(max(growth) > 0.05)


if __name__ == "__main__":
    sys.exit(main())
