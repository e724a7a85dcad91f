#!/usr/bin/env python
"""What is left behind by many rounds and many starts: `python scripts/growth.py [--before 10000 --rounds 24 --starts 4]`.

A run of the smallest size is given a past: that many rounds (copies of its first one, which the gate rejected), each with
its rows in the ledger, its folder, its events, and in every tenth a prompt that joined. Then the service is started several times, and does
some more rounds each time, in which prompts join too. After each start a line tells what there is:

    temporary          files and folders in the folder for temporary files, which only this run uses
    tensorboard        event files
    joins, pool files  how often prompts have joined, and the files that hold them
    events, orders     rows of the ledger, and bytes of the arguments of orders
    ledger             MiB of the ledger and its log
    a round            KiB that a round leaves in its folder, and in the ledger without what is the same for all
    MiB, descriptors, sockets, threads    of the service; the largest memory of the rounds, and the counts at their end
    seconds            median of the rounds of this start, and until its first round begins

Nothing but the ledger and the folders of rounds may grow. Exit code 1 where something else does.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts"))

from chaos import SETTINGS, Served, world  # noqa: E402
from soak import SMALLEST, open_round, used  # noqa: E402

from selfplay.prompts import added  # noqa: E402
from selfplay.prompts.formats import prompt_id  # noqa: E402
from selfplay.prompts.pool import Pool  # noqa: E402
from selfplay.storage import hashed_rows, schema  # noqa: E402
from selfplay.types import Message, Prompt  # noqa: E402

JOINS = ["evolve.every=1", "evolve.rewriter=selfplay.worlds.tiny.rewriter:rewrite"]
EVENTS = 20  # of a round
BOUNDED = ("temporary", "tensorboard", "events", "orders KiB", "descriptors", "sockets", "threads")
COPIED = ("rounds", "stages", "metrics", "pairs", "draws")

Line = dict[str, float]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--starts", type=int, default=4)
    parser.add_argument("--config", default=str(ROOT / "configs" / "tiny.yaml"))
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--out", type=Path, default=Path("runs/growth"))
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    run_dir, temporary = args.out / "run", (args.out / "tmp").resolve()
    temporary.mkdir(parents=True)
    sets = [*world(), *SETTINGS, *SMALLEST, *JOINS, "service.pause_after_rejected=1000000", *args.set]
    os.environ["TMPDIR"] = str(temporary)
    names = list(start(args.config, sets, run_dir, 1, temporary))
    began = time.monotonic()
    give_past(run_dir, args.before)
    print(f"a past of {args.before} rounds, made in {time.monotonic() - began:.0f} s", flush=True)
    print(f"| {' | '.join(names)} |\n{'|---' * len(names)}|", flush=True)
    lines = []
    for number in range(args.starts):
        last = 1 + args.before + (number + 1) * args.rounds // args.starts
        lines.append(start(args.config, sets, run_dir, last, temporary))
        print("| " + " | ".join(f"{value:,.6g}" for value in lines[-1].values()) + " |", flush=True)
    grown = [name for name in BOUNDED if lines[-1][name] > lines[0][name] * 1.05 + 4]
    for name in grown:
        print(f"FAULT: {name} grows: {', '.join(f'{line[name]:.4g}' for line in lines)}")
    joins, files = int(lines[-1]["joins"]), int(lines[-1]["pool files"])
    if files > (most := most_files(joins)):
        print(f"FAULT: {joins:,} joins are in {files} files, and {most} are the most that there may be")
    return int(bool(grown) or files > most)


def most_files(joins: int) -> int:
    """How many files so many joins may have between two merges, with a hash beside each: of each size one less than are merged."""
    sizes = 1
    while joins >= added.FILES**sizes:
        sizes += 1
    return 2 * (added.FILES - 1) * sizes


def give_past(run_dir: Path, rounds: int) -> None:
    """Rounds 2 … rounds + 1 of a run whose first one is done."""
    ledger = sqlite3.connect(run_dir / "ledger.sqlite")
    ledger.execute("PRAGMA synchronous=OFF")
    hashed_rows.prepare(ledger)  # rows that another program has written are refused at the next start
    ledger.execute("CREATE TEMP TABLE numbers AS WITH RECURSIVE n(number) AS (SELECT 2 UNION ALL SELECT number + 1 FROM n"
                   f" WHERE number <= {rounds}) SELECT number FROM n")  # fmt: skip
    triggers = ledger.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
    for name, _ in triggers:  # sums are made at the end, which takes a tenth of the time
        ledger.execute(f"DROP TRIGGER {name}")
    for table in COPIED:
        columns = [row[1] for row in ledger.execute(f"PRAGMA table_info({table})")]
        changed = {"round": "number", "state": "'rejected'"}
        values = ", ".join(changed.get(column, column) for column in columns)
        ledger.execute(f"INSERT INTO {table} SELECT {values} FROM {table}, numbers WHERE round = 1")
    ledger.execute(
        "INSERT INTO policies (version, round, parent, reference, beta, state, weights, pinned)"
        " SELECT number, number, 1, 1, 0.1, 'rejected', 0, 0 FROM numbers"
    )
    now = datetime.now().astimezone().isoformat()
    many = f"(WITH RECURSIVE k(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM k WHERE n < {EVENTS}) SELECT n FROM k)"
    ledger.execute(
        f"INSERT INTO events (time, round, kind, text) SELECT ?, number, 'note', ? FROM numbers, {many}",
        (now, "x" * 80),
    )
    # What charts are drawn from is left out: to count it takes longer than all the rest, and only the page reads it.
    for statement in (*(sql for _, sql in triggers), *(each for each in schema._COUNTED if "trends" not in each)):
        ledger.execute(statement)
    ledger.commit()
    ledger.close()
    for index in range(2, rounds + 2):
        shutil.copytree(run_dir / "rounds/0001", run_dir / f"rounds/{index:04d}", copy_function=os.link)
        (run_dir / f"policies/{index:04d}").mkdir()
        os.link(run_dir / "policies/0001/manifest.json", run_dir / f"policies/{index:04d}/manifest.json")
    os.fsync = lambda fd: None  # a past needs no disk that holds it
    pool = Pool(run_dir / "pool")
    for index in range(2, rounds + 2, 10):
        messages: list[Message] = [{"role": "user", "content": f"What did round {index} add?"}]
        made = Prompt(
            prompt_id=prompt_id(messages), messages=messages, prompt_ids=[5, 6, 7], split="train", joined=index
        )
        pool.join([made])


def start(config: str, sets: list[str], run_dir: Path, last: int, temporary: Path) -> Line:
    """Serve until round `last` has ended, and stop; what there is then."""
    began = datetime.now().astimezone()
    served = Served(config, [*sets, f"schedule.end.rounds={last}"], run_dir)
    memory, counts, first = 0.0, {"descriptors": 0.0, "threads": 0.0, "sockets": 0.0}, 0.0
    while (state := served.state()) is None or state[0] != "ended":
        if served.process.poll() is not None or (state is not None and state[0] == "paused"):
            sys.exit(f"the service is {state}; see {run_dir}/service.log")
        time.sleep(0.3)
        if open_round(run_dir) is not None:
            first = first or (datetime.now().astimezone() - began).total_seconds()
            own = used([served.process.pid])
            memory = max(memory, own.get("MiB", 0.0))
    own = used([served.process.pid])
    counts = {"descriptors": own["descriptors"], "sockets": sockets(served.process.pid), "threads": own["threads"]}
    served.stop()
    return left(run_dir, temporary, began) | {"MiB": memory, **counts, "first round after s": first}


def sockets(pid: int) -> float:
    found = 0
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found += os.readlink(descriptor).startswith("socket:")
        except OSError:
            continue
    return found


def left(run_dir: Path, temporary: Path, since: datetime) -> Line:
    """What is there after a stop."""
    ledger = sqlite3.connect(run_dir / "ledger.sqlite")
    ((events,),) = ledger.execute("SELECT count(*) FROM events")
    ((orders,),) = ledger.execute("SELECT coalesce(sum(length(arguments)), 0) FROM orders")
    ((rounds,),) = ledger.execute("SELECT count(*) FROM rounds")
    spans = [
        (datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds()
        for begin, end in ledger.execute("SELECT started, ended FROM rounds WHERE started > ?", (since.isoformat(),))
    ]
    ledger.close()
    newest = max((run_dir / "rounds").glob("[0-9]*"), key=lambda path: int(path.name))
    size = sum(path.stat().st_size for path in run_dir.glob("ledger.sqlite*"))
    return {
        "rounds": rounds,
        "temporary": len(list(temporary.rglob("*"))),
        "tensorboard": len(list((run_dir / "tensorboard").glob("*"))),
        "joins": max(
            int(path.stem.partition("-")[2] or path.stem) for path in (run_dir / "pool/added").glob("*.parquet")
        ),
        "pool files": len(list((run_dir / "pool" / "added").glob("*"))),
        "events": events,
        "orders KiB": orders / 1024,
        "ledger MiB": size / 2**20,
        "a round KiB": int(subprocess.check_output(["du", "-sb", str(newest)]).split()[0]) / 1024,
        "a round in the ledger KiB": size / rounds / 1024,
        "seconds": statistics.median(spans) if spans else 0.0,
    }


if __name__ == "__main__":
    sys.exit(main())
