#!/usr/bin/env python
"""A served run whose nodes are killed at random moments must end with the artifacts of a run without any cluster.

    python scripts/chaos_cluster.py [--kills 20] [--rounds 3] [--seed 0] [--every 20] [--calm DIR] [--out runs/chaos-cluster]
    python scripts/chaos_cluster.py --in-stages [--rounds 1] …
    python scripts/chaos_cluster.py --head [--rounds 2] …

The first run is on this machine alone. The second one is on a Ray cluster whose nodes are processes of this machine: a head with
the controller, and two nodes with all children, two engines, reward, judge and a trainer of two processes. At exponentially
distributed times SIGKILL goes to a node's raylet and to all of its workers, and another node joins in its place; with
`--in-stages` that happens once in each stage of the first round that has children. With `--head` the head dies instead, once, in
the stage `train` of the first round: the service has to end by itself with all that it started, and the same command goes on with
the round on another cluster at the same address. Then everything is compared as `scripts/chaos.py` does. Exit code 0: everything is the same, no row is missing or double, and no process, actor or placement
group is left.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]

from chaos import SETTINGS, Served, artifacts_of, compare, lasted, outlived, report_rows, world  # noqa: E402
from cluster_world import TwoNodes, left_on, two_nodes  # type: ignore[import-not-found]  # noqa: E402

TWO = "{distributed_type: MULTI_GPU, num_machines: 1, num_processes: 2, mixed_precision: 'no'}\n"
STAGES = ("generate", "score", "train", "evaluate", "promote")
CPUS = 6  # of each node: all children have room on one, but for the trainer, whose processes are on two


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills before the run may end (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the times and the victims")
    parser.add_argument("--every", type=float, default=20.0, help="mean seconds between kills (default: %(default)s)")
    parser.add_argument(
        "--in-stages", action="store_true", help="a kill in each stage of the first round, not at random times"
    )
    parser.add_argument("--head", action="store_true", help="the head dies once, and no node")
    parser.add_argument("--calm", type=Path, help="a finished run of these settings, instead of a new one")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--out", type=Path, default=Path("runs/chaos-cluster"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    launch = args.out.resolve() / "two.yaml"
    launch.write_text(TWO)
    config, rounds = str(ROOT / "configs" / "tiny.yaml"), f"schedule.end.rounds={args.rounds}"
    sets = [*world(), *SETTINGS, rounds, f"train.accelerate={launch}", "train.micro_batch_pairs=4", *args.set]
    if args.head:
        sets.append("train.epochs=20")  # so that the round is not over before Ray notices
    if args.calm is None:
        args.calm = args.out / "calm"
        shutil.rmtree(args.calm, ignore_errors=True)
        calm = Served(config, sets, args.calm)
        calm.until_ended()
        calm.stop()
    print(f"calm: {args.rounds} rounds in {lasted(args.calm):.0f} s", flush=True)
    storm_dir = args.out / "storm"
    shutil.rmtree(storm_dir, ignore_errors=True)
    began = time.monotonic()
    if args.head:
        os.environ["RAY_gcs_rpc_server_reconnect_timeout_s"] = "10"  # noqa: SIM112  Ray's own name; 60 s may be longer than the round
    with two_nodes(0, CPUS, CPUS) as cluster:
        on_nodes = [
            f"cluster.address={cluster.address}",
            "cluster.engine.spread=true",
            "cluster.trainer.nodes=2",
            "generate.engines=2",
        ]
        served = Served(config, [*sets, *on_nodes], storm_dir)
        if args.head:
            args.kills = lose_head(served, cluster)
        elif args.in_stages:
            args.kills = in_each_stage(args.seed, served, cluster)
        kills = storm(args, served, cluster)
        faults = left_on(cluster)
    print(f"storm: {kills} kills of {'the head' if args.head else 'a node'} in {time.monotonic() - began:.0f} s")
    orphans = outlived(storm_dir)
    faults += compare(args.calm, storm_dir)
    if wrong := report_rows(args.calm, storm_dir):
        faults.append(f"{wrong} rows are missing or double")
    faults += [f"{orphans} processes outlived the service"] * bool(orphans)
    if kills < args.kills:
        faults.append(f"{kills} kills, {args.kills} were asked: give it more --rounds")
    for fault in faults:
        print(f"FAULT: {fault}")
    print(f"{len(artifacts_of(args.calm))} artifacts compared, {len(faults)} faults, {orphans} orphans")
    return int(bool(faults))


def in_each_stage(seed: int, served: Served, cluster: TwoNodes) -> int:
    """Kill a node in each stage of the first round that has children; returns how many that were."""
    rng = random.Random(seed)
    for number, stage in enumerate(STAGES, 1):
        until_in(stage, served)
        print(f"  kill {number}, in the stage {stage}", flush=True)
        replace(cluster, rng.choice(cluster.nodes))
    return len(STAGES)


def lose_head(served: Served, cluster: TwoNodes) -> int:
    """Kill the head in the stage `train` of the first round, and serve again on a new cluster; returns 1, the number of kills."""
    until_in("train", served)
    done = sorted(each.parent.name for each in (served.run_dir / "rounds").glob("0001/*/manifest.json"))
    cluster.kill_head()
    began = time.monotonic()
    code = served.process.wait(300)
    print(
        f"  the head was killed; the service ended with exit code {code} after {time.monotonic() - began:.0f} s",
        flush=True,
    )
    if not code:
        sys.exit("the service ended as if nothing had happened")
    cluster.close()
    if left := outlived(served.run_dir):
        sys.exit(f"{left} processes outlived the service and its cluster")
    cluster.start()
    served.start()
    until_in("train", served, times=2)
    print(f"  it goes on with round 1, which had {', '.join(done)}", flush=True)
    return 1


def until_in(stage: str, served: Served, times: int = 1) -> None:
    """Wait until the stage of the first round was begun for that many times."""
    while served.log.read_text().count(f"round 1: {stage} started") < times:
        time.sleep(0.02)
        if served.process.poll() is not None:
            sys.exit(f"the service ended with exit code {served.process.returncode}; see service.log")


def replace(cluster: TwoNodes, victim: str) -> None:
    """Kill a node; another one joins in its place."""
    cluster.kill(victim)
    cluster.add(CPUS)


def storm(args: argparse.Namespace, served: Served, cluster: TwoNodes) -> int:
    """Kill nodes until there were enough kills and the run has ended; returns how many there were."""
    rng, kills = random.Random(args.seed), args.kills if args.in_stages or args.head else 0
    while True:
        next_kill = time.monotonic() + rng.expovariate(1 / args.every)
        while time.monotonic() < next_kill:
            time.sleep(0.2)
            state = served.state()
            if state is not None and state[0] == "ended":
                status = Path(f"/proc/{served.process.pid}/status").read_text()
                peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
                print(f"  the controller took {peak:.0f} MB at most", flush=True)
                served.stop()
                return kills
            if served.process.poll() is not None or (state is not None and state[0] == "paused"):
                sys.exit(f"the service is {state}, exit code {served.process.poll()}; see service.log")
        if kills < args.kills:
            kills += 1
            print(f"  kill {kills} at {time.strftime('%H:%M:%S')}, state {state}", flush=True)
            replace(cluster, rng.choice(cluster.nodes))


if __name__ == "__main__":
    sys.exit(main())
