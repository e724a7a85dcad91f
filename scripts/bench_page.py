#!/usr/bin/env python
"""How fast API and page are on a long run: `python scripts/bench_page.py` (1,000 rounds and 1e6 pairs, made up).

Pages of `/api/pairs` over HTTP, for filters times orders times directions, the first pages and the last of a walk; first
paint and charts in a real Chromium, with an empty cache and a warm one; memory of the process that serves. At the end each
bound with PASS or FAIL; exit code 1 where one fails.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from scale import ledger  # noqa: E402

FILTERS: dict[str, dict[str, object]] = {
    "none": {}, "a round": {"round": 500}, "kept": {"kept": True}, "dropped": {"kept": False}, "rare reason": {"reason": "noise"},
    "one in 1e6": {"reason": "nonfinite"}, "nothing": {"reason": "nope"}, "a prompt": {"prompt_id": "0000000000000011"},
    "wide range": {"explicit_min": 0.5, "potential_max": 2}, "narrow range": {"potential_min": 3, "potential_max": 3.01},
    "no such corner": {"explicit_min": 6, "implicit_max": 1e-6, "potential_max": -3},
}  # fmt: skip
PAIRS_MS, PAINT_MS = 100.0, 1000.0  # the slowest page of pairs, and the slowest first paint, may take so long
SORTS = ("round", "explicit_margin", "implicit_margin", "potential")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=1000, help="pairs of a round")
    parser.add_argument("--run-dir", type=Path, help="made-up run to keep and use again")
    parser.add_argument("--loads", type=int, default=5, help="page loads of each kind")
    parser.add_argument("--no-browser", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run_dir = args.run_dir or Path(folder) / "run"
        if not (run_dir / "ledger.sqlite").is_file():
            started = time.perf_counter()
            ledger.make(run_dir, args.rounds, args.pairs)
            print(
                f"made {args.rounds} rounds, {args.rounds * args.pairs} pairs in {time.perf_counter() - started:.0f} s"
            )
        return bench(run_dir, args.loads, not args.no_browser)


def bench(run_dir: Path, loads: int, browse: bool) -> int:
    from selfplay.config import ServiceConfig, load
    from selfplay.web.api import create_app
    from selfplay.web.server import serve_in_thread

    progress = {
        "state": "running",
        "why": "",
        "round": 1001,
        "stage": "generate",
        "done": 3,
        "total": 9,
        "unit": "prompts",
    }
    app = create_app(run_dir, load(ROOT / "configs" / "tiny.yaml"), lambda: dict(progress), None)
    server, port = serve_in_thread(app, ServiceConfig(port=0))
    base = f"http://127.0.0.1:{port}"
    print(f"memory after the start: {resident():.0f} MB")
    with httpx.Client(base_url=base, timeout=60) as client:
        some = client.get("/api/rounds").json()[0]["round"] // 2 or 1
        failed = verdict("the slowest page of pairs", bench_pairs(client, some), PAIRS_MS)
        one = f"/api/rounds/{some}"
        paths = (
            "/api/run",
            "/api/rounds?limit=200",
            one,
            f"{one}/histogram",
            "/api/events",
            "/api/policies",
            "/metrics",
        )
        print(f"{'other answers':25} {'median ms':>10} {'max ms':>8} {'max CPU ms':>11}")
        for path in paths:
            show(path, [timed(client, path)[1] for _ in range(7)])
    print(f"memory after the requests: {resident():.0f} MB")
    if browse:
        failed |= verdict("the slowest first paint", bench_paint(base, loads), PAINT_MS)
        print(f"memory after the page loads: {resident():.0f} MB")
    server.stop()
    return int(failed)


def verdict(what: str, took: float, bound: float) -> bool:
    """Say whether a bound (milliseconds) holds; True where it does not."""
    print(f"{'PASS' if took <= bound else 'FAIL'}: {what} took {took:.1f} ms, the bound is {bound:.0f} ms\n")
    return took > bound


def timed(
    client: httpx.Client, path: str, params: dict[str, object] | None = None
) -> tuple[httpx.Response, tuple[float, float]]:
    """An answer, and the milliseconds that it took: by the clock, and of the CPU (server and client together)."""
    wall, cpu = time.perf_counter(), time.process_time()
    answer = client.get(path, params=params)  # type: ignore[arg-type]
    spent = ((time.perf_counter() - wall) * 1000, (time.process_time() - cpu) * 1000)
    return answer.raise_for_status(), spent


def show(name: str, times: list[tuple[float, float]]) -> None:
    walls, cpus = zip(*times, strict=True)
    print(f"{name:25} {statistics.median(walls):10.1f} {max(walls):8.1f} {max(cpus):11.1f}")


def bench_pairs(client: httpx.Client, some: int) -> float:
    """Each page of walks of up to six pages, for every filter, order and direction; returns the milliseconds of the slowest."""
    print(f"\n{'/api/pairs, filter':25} {'median ms':>10} {'max ms':>8} {'max CPU ms':>11}")
    everything = []
    for name, where in FILTERS.items():
        times = []
        for sort, descending in itertools.product(SORTS, (True, False)):
            asked: dict[str, object] = {
                **where,
                **({"round": some} if "round" in where else {}),
                "sort": sort,
                "descending": descending,
            }
            for _ in range(6):
                answer, spent = timed(client, "/api/pairs", asked)
                times.append(spent)
                if (after := answer.json()["next"]) is None:
                    break
                asked["after"] = after
        show(name, times)
        everything += times
    show(f"all {len(everything)} pages", everything)
    return max(wall for wall, _ in everything)


def bench_paint(base: str, loads: int) -> float:
    """Milliseconds from the navigation to the first paint, and until all charts and the table of rounds are there; returns
    those of the slowest first paint."""
    from chromium import browser

    paint = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
    whole = "document.querySelectorAll('canvas').length >= 8 && document.querySelectorAll('.q-table tbody tr').length >= 15 && performance.now()"
    slowest = 0.0
    with browser() as tab:
        tab.size(1280, 900)
        for kind in ("empty", "warm"):
            paints, wholes = [], []
            for _ in range(loads):
                if kind == "empty":
                    tab.call("Network.clearBrowserCache")
                tab.open("about:blank")
                tab.open(base)
                wholes.append(tab.wait(whole))
                paints.append(tab.read(paint))
            print(
                f"first paint, {kind} cache: median {statistics.median(paints):.0f} ms, max {max(paints):.0f} ms; "
                f"all charts and rounds: median {statistics.median(wholes):.0f} ms, max {max(wholes):.0f} ms"
            )
            slowest = max(slowest, *paints)
        elsewhere = [
            url for url in tab.requests if base.split("//")[1] not in url and not url.startswith(("data:", "about:"))
        ]
        print(f"requests elsewhere: {len(elsewhere)} {elsewhere[:3]}")
    return slowest


def resident() -> float:
    """MB of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    sys.exit(main())
