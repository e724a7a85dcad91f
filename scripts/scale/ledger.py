#!/usr/bin/env python
"""What the readers of a long ledger cost: `python scripts/scale/ledger.py [--rounds 1000 10000]`.

A ledger of made-up rounds is asked as the waiting service, the page, Prometheus and the command line ask it, by their own
code. What one of them costs should not depend on how many rounds there are. Each line is a number of rounds, with the
processor milliseconds of one request (the median of several):

    waiting_tick   what the waiting service does once a second: orders, the schedule with its budgets, the next start
    rounds_table   `selfplay rounds`, without the imports of the command
    charts         the data of all charts of the overview, at its first paint and after each round
    metrics        one scrape of `/metrics`
    summary        the summary of the run, which each open page reads once a second
    policies       the first page of the list of policies, which is read every two seconds where it is open
    record_stage   to record a stage with 70 metrics
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # behind PYTHONPATH, so that another commit can be measured by the same script

from selfplay.config import load  # noqa: E402
from selfplay.reporting.terminal import Display  # noqa: E402
from selfplay.storage.ledger import Store  # noqa: E402

TINY = ROOT / "configs" / "tiny.yaml"
STAGES = ("prompts", "generate", "score", "pairs", "depth", "train", "evaluate", "promote")
SCHEDULE = (
    "schedule={mode: cron, cron: '0 3 * * *', end: {tokens: 1000000000000, device_hours: 1000000000, reward: 1000}}"
)
REPEAT = 15


def measure(run_dir: Path) -> dict[str, float]:
    """Processor milliseconds of one request of each reader."""
    return {
        "waiting_tick": waiting_tick(run_dir),
        "rounds_table": rounds_table(run_dir),
        **page(run_dir),
        "record_stage": record_stage(run_dir),
    }


def make(run_dir: Path, rounds: int, pairs: int) -> None:
    """A ledger of made-up rounds, with `pairs` pairs each. Written in bulk: each stage would be a transaction of its own."""
    from selfplay.web.page import charts

    run_dir.mkdir(parents=True, exist_ok=True)
    store = Store(run_dir)
    store.open_run("bench", {"run.seed": 0})
    store.record_policy(0, "initial", round=0)
    store.close()
    rng = random.Random(0)
    ledger = sqlite3.connect(run_dir / "ledger.sqlite")
    ledger.execute("PRAGMA synchronous=OFF")
    drawn = charts.names(charts.charts(["total"]))
    names = sorted({*drawn, "generate/tokens", "evaluate/tokens", *(f"evaluate/other_{i}" for i in range(40))})
    begin = datetime.now(UTC) - timedelta(minutes=rounds + 1)
    for n in range(1, rounds + 1):
        state = "rejected" if n % 7 == 3 else "promoted"
        now = (begin + timedelta(minutes=n)).isoformat()
        ledger.execute(
            "INSERT INTO rounds VALUES (?,?,?,?,?,?,?,?,?,?,?)",
            (n, state, now, now, n - 1, n, "[0, 0]", "f" * 64, "{}" + " " * 5000, "[]", n - 1),
        )
        ledger.executemany(
            "INSERT INTO stages VALUES (?,?,?,?)", [(n, stage, now, rng.random() * 60) for stage in STAGES]
        )
        ledger.executemany("INSERT INTO metrics VALUES (?,?,?)", [(n, name, rng.random()) for name in names])
        ledger.execute(
            "INSERT INTO policies VALUES (?,?,?,?,?,?,?,?)", (n, n, n - 1, n - 1, 0.1, state, n > rounds - 5, False)
        )
        ledger.executemany(
            "INSERT INTO events(time, round, kind, text) VALUES (?,?,?,?)",
            [(now, n, "note", "x" * 80) for _ in range(20)],
        )
        ledger.executemany(
            "INSERT INTO pairs VALUES (?,?,?,?,?,?,?,?)", [pair(rng, n, i, rounds) for i in range(pairs)]
        )
    ledger.commit()
    ledger.close()


def pair(rng: random.Random, n: int, i: int, rounds: int) -> tuple[object, ...]:
    """Row `i` of the pairs of round `n`."""
    potential = rng.gauss(0, 1.4)
    why = (
        "noise"
        if rng.random() < 0.01
        else "nonfinite"
        if (n, i) == (rounds // 2, 3)
        else ""
        if potential > 0.3
        else "potential"
    )
    value = None if why in ("noise", "nonfinite") else potential
    prompt = f"{(n * 7919 + i) % 200_000:016x}"
    return n, i, prompt, rng.gammavariate(2, 0.5), rng.gammavariate(1, 0.1), value, None if why else "base", why or None


def waiting_tick(run_dir: Path) -> float:
    """One look of a service that waits for its next round, with a schedule that ends by each of its budgets."""
    waiting, close = waiting_service(run_dir)
    try:
        return cpu_ms(waiting)
    finally:
        close()


def waiting_service(run_dir: Path) -> tuple[Callable[[], object], Callable[[], None]]:
    """A turn of the loop of a service that waits, and what ends the service. Of its run only the ledger is open."""
    from selfplay.rounds.run import Run
    from selfplay.service import daemon as service

    service.POLL_SECONDS = 0.0  # between two turns; only the work in them is measured
    daemon = service.Daemon(TINY, [SCHEDULE], run_dir, silent())
    daemon._open_ledger()
    daemon.run = Run(daemon.config, run_dir, daemon.display, daemon._lock, daemon.store)

    def turn() -> None:
        daemon._turn()
        state = daemon.progress["state"]
        assert state == "waiting", f"the service is {state}: {daemon.progress['why']}"

    def close() -> None:
        daemon.store.close()
        assert daemon._lock is not None
        daemon._lock.__exit__()

    return turn, close


def rounds_table(run_dir: Path) -> float:
    """`selfplay rounds` with its usual number of rounds."""
    store = Store(run_dir)
    try:
        return cpu_ms(lambda: silent().run_table(store))
    finally:
        store.close()


def page(run_dir: Path) -> dict[str, float]:
    """The readers of the page and of Prometheus."""
    return {name: cpu_ms(read) for name, read in page_readers(run_dir).items()}


def page_readers(run_dir: Path) -> dict[str, Callable[[], object]]:
    """Each reader as a function without arguments."""
    import prometheus_client

    from selfplay.web.metrics import registry
    from selfplay.web.page.app import charted
    from selfplay.web.view import View

    view = View(run_dir, load(TINY), lambda: {"state": "waiting", "why": ""})
    collectors = registry(view)
    return {
        "charts": lambda: charted(view),
        "metrics": lambda: prometheus_client.generate_latest(collectors),
        "summary": view.summary,
        "policies": view.policies,
    }


def record_stage(run_dir: Path) -> float:
    """Recording a finished stage of a further round with 70 metrics."""
    store = Store(run_dir)
    index = store.last_round()
    values = {f"other_{i}": float(i) for i in range(70)}

    def record() -> None:
        nonlocal index
        index += 1
        store.record_stage(index, "evaluate", 1.0, values)

    try:
        return cpu_ms(record)
    finally:
        store.close()


def cpu_ms(work: Callable[[], Any]) -> float:
    """Median processor milliseconds of a call, after a first one that is not counted."""
    work()
    times = []
    for _ in range(REPEAT):
        began = time.process_time()
        work()
        times.append((time.process_time() - began) * 1000)
    return statistics.median(times)


def silent() -> Display:
    """A display that nobody sees."""
    from rich.console import Console

    return Display(Console(file=io.StringIO(), width=120))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, nargs="*", default=[1000, 10_000])
    parser.add_argument("--pairs", type=int, default=20, help="pairs of a round")
    args = parser.parse_args()
    for rounds in args.rounds:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), rounds, args.pairs)
            found = measure(Path(folder))
        print(json.dumps({"rounds": rounds, **{name: round(value, 2) for name, value in found.items()}}), flush=True)


if __name__ == "__main__":
    main()
