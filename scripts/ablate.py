#!/usr/bin/env python
"""What each method is worth: whole runs on the tiny world, one per arm and seed, at equal budgets.

    python scripts/ablate.py [--arms plain potential …] [--seeds 7] [--worlds 0 1] [--rounds 3] [--out runs/ablation]

An arm is a name made of components joined by «+»: a selection (potential, explicit, implicit, signed; else random),
`epsilon` (ε-DPO instead of DPO), a depth (`gradient`, `uniform`), `breadth`; `plain` has none of them. Every arm generates
as many candidates and trains on as many pairs a round (depth: half the prompts, twice the candidates and pairs of each). Controls take an
arm's surroundings without its method: `deep` has depth's prompts and candidates and one pair of each prompt, `lower-beta` is DPO
at the β that ε-DPO has on average, `others` has depth follow closeness that leaves the pair itself out. A world is a base policy with its
own reward model, prompts and rubric (`make_tiny.py --seed`); a seed is one of prompts and sampling. With `--pool redundant` seven
of eight prompts that a run can draw ask one of twenty questions in other words, with `learnable` none of them one that the
policy cannot learn to answer (`hopeless`); both are evaluated on the same held-out prompts.

Arms of a seed share what is the same by construction: the imported prompts, and of round 1 the stages before selection.
The gate lets everything through, so that it cannot hide a bad arm. After the last round the policy answers every held-out
prompt. An interrupted call goes on; a finished run adds a line to --results, from which `--report` makes the table and the
picture beside it. A line counts for the settings, world and rounds it was made with, and a call with others does its own runs.
Intervals are of a bootstrap of Student's t over seeds within each world: a percentile interval of 14 values is too narrow.
One thread a process, --workers runs at a time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
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

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

ALL = "potential+epsilon+breadth+gradient"
ARMS = ["plain", "potential", "epsilon", "breadth+uniform", "breadth+gradient", ALL]
CONTROLS = ["deep", "uniform", "gradient", "others", "lower-beta"]
POOLS = ("redundant", "learnable")
REDUNDANT = [
    "plain", "deep", "uniform", "breadth+deep", "breadth-last+deep", "breadth-last+uniform", "breadth-last+gradient"
]  # fmt: skip

# What is expected of which difference, fixed before the runs: (arm, against, metric, least lower bound of the interval).
COMPARISONS = [
    ("potential", "plain", "reward", 0.0),
    *((arm, "plain", "gold", -0.02) for arm in ARMS[1:]),
    ("epsilon", "plain", "gold_per_nat", 0.0),
    ("breadth+gradient", "breadth+uniform", "gold", 0.0),
    ("breadth+gradient", "breadth+uniform", "reward", 0.0),
    ("breadth+gradient", "plain", "gold", 0.0),
    (ALL, "plain", "gold", 0.0),
    (ALL, "plain", "reward", 0.0),
]
# The same where prompts are redundant: breadth is to help with depth and without it, and both to beat one pair a prompt.
REDUNDANT_COMPARISONS = [
    *(("breadth-last+deep", "deep", metric, 0.0) for metric in ("gold", "reward")),
    *(("breadth-last+uniform", "uniform", metric, 0.0) for metric in ("gold", "reward")),
    *((arm, "plain", metric, 0.0) for arm in REDUNDANT[4:] for metric in ("gold", "reward")),
    *(("breadth-last+gradient", "breadth-last+uniform", metric, 0.0) for metric in ("gold", "reward")),
]

METRICS = {
    "reward": "held-out reward",
    "gold": "gold total",
    "content": "gold content",
    "win": "gold win rate against the initial policy",
    "kl": "KL to the initial policy (nats an answer)",
    "gold_per_nat": "gold gained per nat of KL",
    "length": "tokens an answer",
}

# Depth: half the prompts with twice the candidates, so the same tokens, and two pairs a kept prompt, so the same pairs.
DEEP = {"prompts.per_round": 96, "generate.candidates": 16, "generate.shard_prompts": 32}
BREADTH = {"breadth.method": "clusters", "breadth.oversample": 4}
COMPONENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    **{name: {"pairs.selection": name} for name in ("potential", "explicit", "implicit")},
    "signed": {"pairs.selection": "potential", "pairs.signed": True},
    # The papers' .01 over 470 steps moves β far; a round here has 12 steps, in which .01 would move it by 9 %.
    "epsilon": {"train.epsilon": 0.05},
    **{name: {"depth.method": name, "depth.pairs_per_prompt": 2} | DEEP for name in ("uniform", "gradient")},
    "breadth": BREADTH,
    # The tiny policy has learned answers, not prompts: on world 0 the mean of its states tells no question from another.
    "breadth-last": BREADTH | {"breadth.pooling": "last"},
    "deep": DEEP | {"pairs.keep": 1.0},
    "others": {"depth.method": "gradient", "depth.pairs_per_prompt": 2, "depth.closeness": "others"} | DEEP,
    "lower-beta": {"train.beta": 0.08},
}
BASE = {
    "pairs.selection": "random",
    "pairs.keep": 0.5,
    "train.epsilon": 0,
    "evaluate.prompts": 1,
    "evaluate.audit_every": 0,
    "evaluate.gate.win_rate_lower": 0,
    "evaluate.gate.reward_up": False,
    "evaluate.gate.max_length_ratio": 1000,
    "evaluate.gate.max_cut_off": 1,
    "evaluate.gate.max_kl": 1000000,
    "retention.last": 1,
}
LAST = {"evaluate.prompts": 100_000, "evaluate.audit_every": 1, "evaluate.audit_prompts": 100_000}
MIN_SEEDS = 5  # fewer make no interval
SHARED_STAGES = ("prompts", "generate", "score")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arms",
        nargs="+",
        help=f"the first is what others are held against; controls: {' '.join(CONTROLS)}",
    )
    parser.add_argument("--seeds", type=int, default=7, help="run seeds for each world (default: 7)")
    parser.add_argument("--first-seed", type=int, default=1000, help="the first run seed (default: 1000)")
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 3], help="seeds of the worlds (default: 2 3)")
    parser.add_argument("--pool", choices=["usual", *POOLS], default="usual", help="the prompts to draw from")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--config", default="configs/tiny.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="for every arm")
    parser.add_argument("--results", type=Path, default=Path("docs/ablations.jsonl"), help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/ablation"), help="folder of the runs (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--report", action="store_true", help="no runs: table and picture of what is there")
    parser.add_argument("--unit", nargs=2, metavar=("WORLD", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.arms = args.arms or (ARMS if args.pool == "usual" else REDUNDANT)
    for arm in args.arms:
        overrides(arm)
    if args.unit:
        unit(args, int(args.unit[0]), int(args.unit[1]))
        return
    if not args.report:
        run_all(args)
    report(args)


def overrides(arm: str) -> dict[str, Any]:
    """The settings of an arm; ends the program with the known names for one that is unknown."""
    settings = dict(BASE)
    for name in arm.split("+"):
        if name not in COMPONENTS:
            sys.exit(f"arm {arm!r}: unknown component {name!r}; known: {', '.join(COMPONENTS)}")
        settings |= COMPONENTS[name]
    return settings


def fingerprint(args: argparse.Namespace, arm: str) -> str:
    """What a run is of, beside its world and seed: two lines with the same one may be compared."""
    config = hashlib.sha256((ROOT / args.config).read_bytes()).hexdigest()
    drawn_from = [] if args.pool == "usual" else [args.pool]
    what = json.dumps([overrides(arm), args.set, args.rounds, config, *drawn_from], sort_keys=True)
    return hashlib.sha256(what.encode()).hexdigest()[:12]


def built(world: int) -> str:
    """The hash of the recipe that a world was built by."""
    return (world_dir(world) / "current").resolve().name


def sampling(arm: str) -> dict[str, Any]:
    """The settings of an arm that its first round's candidates depend on."""
    return {
        key: value for key, value in overrides(arm).items() if key.split(".")[0] in ("prompts", "generate", "breadth")
    }


# ---------------------------------------------------------------------------------------------------------- the runs


def run_all(args: argparse.Namespace) -> None:
    """Every unit (world, seed) in a process of its own, some at a time."""
    for world in args.worlds:
        if not (world_dir(world) / "current").exists():
            print(f"building the world of seed {world}", flush=True)
            argv = [sys.executable, str(ROOT / "scripts" / "make_tiny.py"), "--seed", str(world)]
            subprocess.run([*argv, "--out", str(world_dir(world))], check=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the units are to be stopped too
    units = [(world, args.first_seed + i) for i in range(args.seeds) for world in args.worlds]
    args.out.mkdir(parents=True, exist_ok=True)
    if args.pool != "usual":
        for world in args.worlds:
            write_pool(args, world)
    running: set[subprocess.Popen[bytes]] = set()
    stopping = threading.Event()

    def work(world: int, seed: int) -> None:
        if stopping.is_set():
            return
        argv = [sys.executable, *sys.argv, "--unit", str(world), str(seed)]
        process = subprocess.Popen(argv, env=os.environ | {"OMP_NUM_THREADS": "1"})
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


def world_dir(seed: int) -> Path:
    return ROOT / ".cache" / ("tiny" if seed == 0 else f"tiny-{seed}")


def pool(args: argparse.Namespace, world: int) -> Path:
    """The file of the prompts to draw from."""
    if args.pool == "usual":
        return world_dir(world) / "current" / "train.jsonl"
    return Path(args.out / f"world-{world}-{built(world)}-{args.pool}.jsonl")


def write_pool(args: argparse.Namespace, world: int) -> None:
    """Of each skill's train questions one in all its wordings and twelve others (or what there is) in one wording each."""
    from selfplay.worlds import tiny, tiny_rewriter

    wordings: dict[str, dict[str, list[str]]] = {}  # skill → matter → prompts
    for line in (world_dir(world) / "current" / "train.jsonl").read_text().splitlines():
        text = json.loads(line)["messages"][-1]["content"]
        parsed = tiny_rewriter.parse(text)
        assert parsed is not None, f"{text!r} is not of the tiny world"
        skill, _, matter = parsed
        wordings.setdefault(skill, {}).setdefault(matter, []).append(text)
    found: list[str] = []
    for skill, matters in wordings.items():
        if args.pool == "learnable" and tiny.SKILLS[skill].regime == "hopeless":
            continue
        popular, *others = sorted(matters, key=lambda matter: tiny.unit("redundant", skill, matter))
        found += tiny_rewriter.wordings(skill, popular)
        found += [matters[matter][0] for matter in others[:12]]
    rows = [{"messages": [{"role": "user", "content": text}]} for text in found if not tiny.held_out(text)]
    pool(args, world).write_text("".join(json.dumps(row) + "\n" for row in rows))


def unit(args: argparse.Namespace, world: int, seed: int) -> None:
    """All arms of one seed in one world, one after another, with one reward server."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    now = built(world)
    missing = [arm for arm in args.arms if results(args, arm).get((world, seed), {}).get("built") != now]
    if not missing:
        return
    work = args.out / f"world-{world}-{now}-seed-{seed}"
    here = (world_dir(world) / "current").resolve()
    server = subprocess.Popen(
        [sys.executable, "-m", "reward.server", "--model", str(here / "reward"), "--dtype", "float32", "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    try:
        assert server.stdout is not None
        url = json.loads(server.stdout.readline())["url"]
        for arm in missing:
            began = time.monotonic()
            settings = overrides(arm) | {
                "run.seed": seed,
                "policy.model": str(here / "policy"),
                "prompts.source": str(pool(args, world)),
                "prompts.heldout": str(here / "heldout.jsonl"),
                "reward.model": None,
                "evaluate.judge": None,  # arms are compared by the reward they were trained on, and by gold
                "reward.url": [url],
            }
            found = one_run(args, work, arm, [*assignments(settings), *args.set]) | {
                "world": world,
                "seed": seed,
                "arm": arm,
                "fingerprint": fingerprint(args, arm),
                "built": now,
            }
            with args.results.open("ab", buffering=0) as file:  # one write, so that lines of two processes never mix
                file.write(json.dumps(found).encode() + b"\n")
            took = time.monotonic() - began
            print(
                f"world {world} seed {seed} {arm}: reward {found['reward']:.3f} gold {found['gold']:.3f} {took:.0f} s",
                flush=True,
            )
        shutil.rmtree(work)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        server.terminate()
        server.wait()


def one_run(args: argparse.Namespace, work: Path, arm: str, sets: Sequence[str]) -> dict[str, Any]:
    """Do (or go on with) the run of an arm, in a folder that starts with what the arms before it share with it."""
    from rich.console import Console

    from selfplay.config import load
    from selfplay.reporting.terminal import Display
    from selfplay.rounds.round import run_round
    from selfplay.rounds.run import Run

    folders = {name: work / fingerprint(args, name) for name in args.arms[: args.arms.index(arm) + 1]}
    run_dir = folders.pop(arm)
    done = {name: folder for name, folder in folders.items() if (folder / "rounds" / "0001" / "score").is_dir()}
    if not run_dir.exists() and done:
        partial = work / f".{run_dir.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(next(iter(done.values())) / "pool", partial / "pool")
        if alike := [folder for name, folder in done.items() if sampling(name) == sampling(arm)]:
            for stage in SHARED_STAGES:
                shutil.copytree(alike[0] / "rounds" / "0001" / stage, partial / "rounds" / "0001" / stage)
        partial.rename(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    usual, last = load(args.config, sets), load(args.config, [*sets, *assignments(LAST)])
    with (run_dir / "display.log").open("a") as log, Run(usual, run_dir, Display(Console(file=log))) as run:
        while (finished := sum(row["state"] != "running" for row in run.store.rounds())) < args.rounds:
            run.config = last if finished + 1 == args.rounds else usual
            if (ended := run_round(run)).outcome != "promoted":
                sys.exit(f"{run_dir}: round {ended.round} was {ended.outcome}: {'; '.join(ended.reasons)}")
        return measured(run.store, run_dir, args.rounds)


def assignments(settings: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def measured(store: Any, run_dir: Path, rounds: int) -> dict[str, Any]:
    """What came of a run: means over the answers of the last policy to all held-out prompts, and what it cost."""
    from selfplay.storage import tables
    from selfplay.types import Scored

    folder = run_dir / "rounds" / f"{rounds:04d}" / "evaluate"
    answers = [row for name in ("candidate", "audit") for row in tables.read_rows(folder / f"{name}.parquet", Scored)]
    metrics = [store.metrics(index) for index in range(1, rounds + 1)]
    end = metrics[-1]
    gained = end["evaluate/audit_gold_total"] - end["evaluate/audit_gold_total_initial"]
    return {
        "reward": statistics.fmean(row.reward for row in answers if row.reward is not None),
        "gold": statistics.fmean(row.reward_parts["total"] for row in answers),
        "content": statistics.fmean(row.reward_parts["content"] for row in answers),
        "win": end["evaluate/audit_gold_win_rate"],
        "kl": end["evaluate/kl_initial"],
        "gold_per_nat": gained / end["evaluate/kl_initial"],
        "length": statistics.fmean(row.n_tokens for row in answers),
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
        "answers": len(answers),
    }


# -------------------------------------------------------------------------------------------------------- the report


def results(args: argparse.Namespace, arm: str) -> dict[tuple[int, int], dict[str, Any]]:
    """The finished runs of an arm with these settings, by world and seed; of two the later."""
    if not args.results.is_file():
        return {}
    lines, wanted = args.results.read_text().splitlines(), fingerprint(args, arm)
    rows = [row for row in map(json.loads, lines) if row["arm"] == arm and row.get("fingerprint") == wanted]
    return {(row["world"], row["seed"]): row for row in rows}


def report(args: argparse.Namespace) -> None:
    """Print the tables of the finished runs, and draw the paired differences beside their file."""
    found = {arm: rows for arm in args.arms if (rows := results(args, arm))}
    plain = args.arms[0]
    if plain not in found:
        sys.exit(f"{args.results} has no finished run of {plain} with these settings")
    print("\n| arm | runs | " + " | ".join(METRICS.values()) + " | pairs | tokens generated |")
    print("|---" * (len(METRICS) + 4) + "|")
    for arm, rows in found.items():
        cells = [cell({key: row[m] for key, row in rows.items()}) for m in METRICS]
        costs = [f"{statistics.fmean(row[m] for row in rows.values()):.0f}" for m in ("pairs", "generated")]
        print(f"| {arm} | {len(rows)} | " + " | ".join([*cells, *costs]) + " |")
    print(
        f"\nPaired differences to {plain}, mean [95 % interval]; of few seeds, or one world, mean ± standard error:\n"
    )
    print("| arm | seeds | " + " | ".join(METRICS.values()) + " |")
    print("|---" * (len(METRICS) + 2) + "|")
    worlds = sorted({world for world, _ in found[plain]})
    for arm in list(found)[1:]:
        both = [paired(found, arm, plain, m) for m in METRICS]
        print(f"| {arm} | {len(both[0])} | " + " | ".join(map(cell, both)) + " |")
        for world in worlds if len(worlds) > 1 else []:
            own = [{key: d for key, d in each.items() if key[0] == world} for each in both]
            if len(own[0]) > 1:
                print(f"| … world {world} | {len(own[0])} | " + " | ".join(map(plus_minus, own)) + " |")
    print("\nWhat was expected before the runs:\n")
    for arm, against, metric, least in COMPARISONS if args.pool == "usual" else REDUNDANT_COMPARISONS:
        if arm in found and against in found:
            differences = paired(found, arm, against, metric)
            mean, low, high = interval(differences)
            few = len(differences) < MIN_SEEDS
            verdict = "too few seeds" if few else "shown" if low > least else "refuted" if high < least else "open"
            print(f"- {arm} − {against}, {METRICS[metric]} > {least:g}: {shown(mean, low, high)}: {verdict}")
    picture = args.results.with_suffix(".png")
    draw(found, plain, picture if args.pool == "usual" else picture.with_stem(f"{picture.stem}-{args.pool}"))


def paired(found: Mapping[str, Any], arm: str, against: str, metric: str) -> dict[tuple[int, int], float]:
    """Differences of a metric between two arms, by world and seed, where both have a run."""
    other = found[against]
    return {key: row[metric] - other[key][metric] for key, row in found[arm].items() if key in other}


def cell(values: Mapping[tuple[int, int], float]) -> str:
    return shown(*interval(values)) if len(values) >= MIN_SEEDS else plus_minus(values)


def plus_minus(values: Mapping[tuple[int, int], float]) -> str:
    """Mean ± its standard error."""
    found = list(values.values())
    error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan
    return f"{statistics.fmean(found):.3f} ± {error:.3f}"


def interval(values: Mapping[tuple[int, int], float], samples: int = 10_000) -> tuple[float, float, float]:
    """Mean of values by world and seed, and its 95 % interval: bootstrap of Student's t, seeds drawn within each world.

    Worlds count by their number of seeds and are not drawn: the interval speaks of these worlds. With one seed in a world
    there is none (NaN).
    """
    groups = [
        np.array([v for key, v in values.items() if key[0] == world], np.float64)
        for world in sorted({world for world, _ in values})
    ]
    total = sum(map(len, groups))
    mean = sum(group.sum() for group in groups) / total
    if min(map(len, groups)) < 2:
        return float(mean), float("nan"), float("nan")

    def spread(drawn: list[np.ndarray]) -> Any:
        """Standard error of the mean over the last axis."""
        return np.sqrt(sum(len(g) * d.var(axis=-1, ddof=1) for g, d in zip(groups, drawn, strict=True))) / total

    rng = np.random.default_rng(0)
    drawn = [rng.choice(group, (samples, len(group))) for group in groups]
    means = sum(d.sum(axis=1) for d in drawn) / total
    errors = spread(drawn)
    usable = errors > 0  # a sample of one seed drawn every time has no error of its own
    low, high = np.quantile((means - mean)[usable] / errors[usable], [0.025, 0.975]) if usable.any() else (0.0, 0.0)
    own = float(spread(groups))
    return float(mean), float(mean - high * own), float(mean - low * own)


def shown(mean: float, low: float, high: float) -> str:
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def draw(found: dict[str, Any], against: str, path: Path) -> None:
    """Paired differences of every arm to the plain one, a panel a metric."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = [arm for arm in found if arm != against]
    if against not in found or not arms:
        return
    names = ("reward", "gold", "content", "kl", "length")
    figure, panels = pyplot.subplots(1, len(names), figsize=(3 * len(names), 0.5 * len(arms) + 1.4), sharey=True)
    for panel, metric in zip(panels, names, strict=True):
        for row, arm in enumerate(arms):
            differences = paired(found, arm, against, metric)
            mean, low, high = interval(differences)
            values = list(differences.values())
            panel.plot(values, [row + 0.18] * len(values), "|", color="#9aa3af", markersize=5)
            panel.plot([low, high], [row, row], color="#2563c9", linewidth=2)
            panel.plot(mean, row, "o", color="#2563c9", markersize=5)
        panel.axvline(0, color="#6b7280", linewidth=0.8)
        panel.set_title(METRICS[metric], fontsize=9)
        panel.tick_params(labelsize=8)
        panel.locator_params(axis="x", nbins=4)
        for side in ("top", "right", "left"):
            panel.spines[side].set_visible(False)
    panels[0].set_yticks(range(len(arms)), arms)
    panels[0].invert_yaxis()
    figure.suptitle(
        f"Difference to {against}: mean, 95 % bootstrap interval, each seed", fontsize=10, x=0.01, ha="left"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(f"\npicture: {path}")


if __name__ == "__main__":
    main()
