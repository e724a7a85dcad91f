"""The tables and the picture of the finished runs."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ablation.intervals import MIN_SEEDS, cell, interval, paired, plus_minus, shown
from ablation.results import results
from ablation.worlds import worlds as kind_of


def report(args: argparse.Namespace) -> None:
    """Print the tables of the finished runs, and draw the paired differences beside their file."""
    found = {arm: rows for arm in args.arms if (rows := results(args, arm))}
    plain, kind = args.arms[0], kind_of(args)
    metrics = kind.METRICS
    if plain not in found:
        sys.exit(f"{args.results} has no finished run of {plain} with these settings")
    print("\n| arm | runs | " + " | ".join(metrics.values()) + " | pairs | tokens generated |")
    print("|---" * (len(metrics) + 4) + "|")
    for arm, rows in found.items():
        cells = [cell({key: row[m] for key, row in rows.items()}) for m in metrics]
        costs = [f"{statistics.fmean(row[m] for row in rows.values()):.0f}" for m in ("pairs", "generated")]
        print(f"| {arm} | {len(rows)} | " + " | ".join([*cells, *costs]) + " |")
    print(
        f"\nPaired differences to {plain}, mean [95 % interval]; of few seeds, or one world, mean ± standard error:\n"
    )
    print("| arm | seeds | " + " | ".join(metrics.values()) + " |")
    print("|---" * (len(metrics) + 2) + "|")
    worlds = sorted({world for world, _ in found[plain]})
    for arm in list(found)[1:]:
        both = [paired(found, arm, plain, m) for m in metrics]
        print(f"| {arm} | {len(both[0])} | " + " | ".join(map(cell, both)) + " |")
        for world in worlds if len(worlds) > 1 else []:
            own = [{key: d for key, d in each.items() if key[0] == world} for each in both]
            if len(own[0]) > 1:
                print(f"| … world {world} | {len(own[0])} | " + " | ".join(map(plus_minus, own)) + " |")
    print("\nWhat was expected before the runs:\n")
    for arm, against, metric, least in kind.expected(args):
        if arm in found and against in found:
            differences = paired(found, arm, against, metric)
            mean, low, high = interval(differences)
            few = len(differences) < MIN_SEEDS
            verdict = "too few seeds" if few else "shown" if low > least else "refuted" if high < least else "open"
            print(f"- {arm} − {against}, {metrics[metric]} > {least:g}: {shown(mean, low, high)}: {verdict}")
    picture = args.results.with_suffix(".png")
    which = [name for name, usual in ((args.world, "tiny"), (args.pool, "usual")) if name != usual]
    draw(
        found,
        plain,
        picture.with_stem("-".join([picture.stem, *which])),
        {name: metrics[name] for name in kind.PICTURED},
    )


def draw(found: dict[str, Any], against: str, path: Path, metrics: Mapping[str, str]) -> None:
    """Draw the paired differences of every arm to the one named `against`, a panel for each metric."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = [arm for arm in found if arm != against]
    if against not in found or not arms:
        return
    figure, panels = pyplot.subplots(1, len(metrics), figsize=(3 * len(metrics), 0.5 * len(arms) + 1.4), sharey=True)
    for panel, metric in zip(panels, metrics, strict=True):
        for row, arm in enumerate(arms):
            differences = paired(found, arm, against, metric)
            mean, low, high = interval(differences)
            values = list(differences.values())
            panel.plot(values, [row + 0.18] * len(values), "|", color="#9aa3af", markersize=5)
            panel.plot([low, high], [row, row], color="#2563c9", linewidth=2)
            panel.plot(mean, row, "o", color="#2563c9", markersize=5)
        panel.axvline(0, color="#6b7280", linewidth=0.8)
        panel.set_title(metrics[metric], fontsize=9)
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
