"""The runs: every world and seed in a process of its own, and in it one arm after another."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ablation.arms import SHARED_STAGES, assignments, overrides, sampling
from ablation.results import fingerprint, results
from ablation.worlds import budget, worlds


def run_all(args: argparse.Namespace) -> None:
    """Do every unit (world, seed) in a process of its own, `--workers` of them at a time."""
    args.out.mkdir(parents=True, exist_ok=True)
    for world in args.worlds:
        worlds(args).build(args, world)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the units are stopped too
    units = [(world, args.first_seed + i) for i in range(args.seeds) for world in args.worlds]
    running: set[subprocess.Popen[bytes]] = set()
    stopping = threading.Event()

    def work(world: int, seed: int) -> None:
        if stopping.is_set():
            return
        argv = [sys.executable, *sys.argv, "--unit", str(world), str(seed)]
        process = subprocess.Popen(argv, env=os.environ | worlds(args).ENVIRONMENT)
        running.add(process)
        if process.wait() and not stopping.is_set():
            print(f"world {world} seed {seed} failed; the same command tries it again", flush=True)
        running.discard(process)

    with ThreadPoolExecutor(args.workers) as pool:
        waiting = [pool.submit(work, *each) for each in units]
        try:
            for future in waiting:
                future.result()
        except KeyboardInterrupt:
            stopping.set()
            for process in list(running):
                process.send_signal(signal.SIGTERM)
            sys.exit("interrupted: the same command goes on")


def unit(args: argparse.Namespace, world: int, seed: int) -> None:
    """Do all arms of one seed in one world, one after another, with one reward."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    here = worlds(args)
    now = here.built(world)
    missing = [arm for arm in args.arms if results(args, arm).get((world, seed), {}).get("built") != now]
    if not missing:
        return
    work = args.out / f"world-{args.world}-{world}-{now}-seed-{seed}"
    try:
        with here.reward(world) as reward:
            for arm in missing:
                began = time.monotonic()
                settings = (
                    overrides(arm, budget(args))
                    | {
                        "run.seed": seed,
                        "schedule.end.rounds": args.rounds,  # no round is sampled ahead that will not be
                        "evaluate.judge": None,  # arms are compared by the reward they were trained on, and by gold
                    }
                    | here.settings(args, world)
                    | reward
                )
                found = one_run(args, work, arm, [*assignments(settings), *args.set]) | {
                    "world": world,
                    "seed": seed,
                    "arm": arm,
                    "fingerprint": fingerprint(args, arm),
                    "built": now,
                }
                with args.results.open("ab", buffering=0) as file:  # one write: lines of two processes never mix
                    file.write(json.dumps(found).encode() + b"\n")
                said = " ".join(f"{name} {found[name]:.3f}" for name in here.PICTURED)
                print(f"world {world} seed {seed} {arm}: {said} {time.monotonic() - began:.0f} s", flush=True)
        shutil.rmtree(work)
    except KeyboardInterrupt:
        sys.exit(130)


def one_run(args: argparse.Namespace, work: Path, arm: str, sets: Sequence[str]) -> dict[str, Any]:
    """Do the run of an arm, or go on with it. Its folder starts with what the arms before it share with it."""
    from rich.console import Console

    from selfplay.config import load
    from selfplay.reporting.terminal import Display
    from selfplay.rounds.round import run_round
    from selfplay.rounds.run import Run
    from selfplay.storage.ledger import Store

    folders = {name: work / fingerprint(args, name) for name in args.arms[: args.arms.index(arm) + 1]}
    run_dir = folders.pop(arm)
    done = {name: folder for name, folder in folders.items() if (folder / "rounds" / "0001" / "score").is_dir()}
    if not run_dir.exists() and done:
        partial = work / f".{run_dir.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        Store(partial).close()  # none is made beside a pool
        before = next(iter(done.values()))
        for shared in ("pool", "audit"):  # the initial policy's answers are found by what they were sampled with
            if (before / shared).is_dir():
                shutil.copytree(before / shared, partial / shared)
        partial.rename(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(Store(run_dir)) as store:
        if not store.last_round():  # nothing, or what a killed process has copied of others
            shutil.rmtree(run_dir / "rounds", ignore_errors=True)
    usual_budget = budget(args)
    usual, last = load(args.config, sets), load(args.config, [*sets, *assignments(worlds(args).LAST)])
    with (run_dir / "display.log").open("a") as log, Run(usual, run_dir, Display(Console(file=log))) as run:
        alike = [folder for name, folder in done.items() if sampling(name, usual_budget) == sampling(arm, usual_budget)]
        if alike and not run.store.last_round():
            for stage in SHARED_STAGES:
                shutil.copytree(alike[0] / "rounds" / "0001" / stage, run_dir / "rounds" / "0001" / stage)
        while (finished := sum(row["state"] != "running" for row in run.store.rounds())) < args.rounds:
            run.config = last if finished + 1 == args.rounds else usual
            if (ended := run_round(run)).outcome != "promoted":
                sys.exit(f"{run_dir}: round {ended.round} was {ended.outcome}: {'; '.join(ended.reasons)}")
        metrics = [run.store.metrics(index) for index in range(1, args.rounds + 1)]
    return worlds(args).measured(run_dir, metrics) | cost(metrics)


def cost(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a run cost, and what its methods did, from the metrics of its rounds."""
    end = metrics[-1]
    return {
        "pairs": sum(m["depth/pairs"] for m in metrics),
        "generated": sum(m["generate/tokens"] for m in metrics),
        "beta": end["train/beta"],
        "up": statistics.fmean(m.get("train/epsilon_up", 0.0) for m in metrics),
        "down": statistics.fmean(m.get("train/epsilon_down", 0.0) for m in metrics),
        "length_correlation": end.get("depth/closeness_length_correlation"),
        "size_correlation": end.get("depth/closeness_size_correlation"),
        "closeness_to_others": end.get("depth/closeness_to_others"),
        "most": end.get("depth/most"),
        "evenness": end.get("prompts/cluster_evenness"),
    }
