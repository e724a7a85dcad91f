"""The report of a run: `python -m selfplay.report RUN_DIR` writes report.html and report.png into the run folder.

It reads the ledger and the artifacts alone, and runs as a process of its own: the controller has no matplotlib. Each chart
is drawn by one function for both files. In the page a chart is inline SVG whose colours are CSS variables, so that it
follows the reader's light or dark setting; the page has no script and loads nothing.
"""

from __future__ import annotations

import argparse
import io
import math
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from selfplay import artifacts
from selfplay.children import die_with_parent
from selfplay.display import NOT_INDEPENDENT, STAGES, change, interval, join, number, verdict
from selfplay.errors import InputError, SelfplayError
from selfplay.policies import Policies
from selfplay.store import Store
from selfplay.types import Pair, Prompt

# light, dark: a role has one colour in every chart. Each light one is unique, so the page can swap it for a variable.
COLOURS = {
    "ink": ("#1f2328", "#e6e8eb"),
    "soft": ("#6b7280", "#9aa4b2"),
    "faint": ("#d5d9e0", "#3a4250"),
    "ground": ("#fffffe", "#161b22"),
    "blue": ("#2563c9", "#6ea8fe"),
    "orange": ("#d9730d", "#ffa657"),
    "green": ("#1a8f5a", "#56d08f"),
    "purple": ("#8046c7", "#c297ff"),
    "red": ("#c9363a", "#ff7b72"),
    "teal": ("#0e8a9c", "#4fd0e0"),
    "grey": ("#a3abb8", "#7d8898"),
}
C = {name: light for name, (light, _) in COLOURS.items()}
STAGE_COLOURS = {"generate": "blue", "score": "teal", "train": "orange", "evaluate": "purple", "promote": "green"}
MANY = 40  # rounds past which markers and bars give way to plain lines and areas
SAMPLE_KEPT, SAMPLE_DROPPED, LONGEST_TEXT, LATEST = 6, 3, 4000, 8
NOISE = 0.01  # relative fall of a gold score that a few hundred answers cannot tell from none


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One row of the ledger with its metrics and seconds."""

    index: int
    state: str  # running | promoted | rejected | skipped
    policy: int | None
    reasons: list[str]
    metrics: dict[str, float]
    seconds: dict[str, float]
    gate: dict[str, float]  # the gate's limits in this round's configuration


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Everything that the report shows, as it is on disk."""

    name: str
    current: int | None
    rounds: list[Round]  # oldest first
    policies: list[dict[str, Any]]
    events: list[dict[str, Any]]
    pairs_round: int | None  # the last round that has pairs; what follows is of this round
    pairs: list[Pair]  # its base pairs, kept and dropped
    added: list[Pair]  # pairs that depth added to them
    prompts: dict[str, Prompt]

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Rounds that have the metric, and its values."""
        having = [r for r in self.rounds if math.isfinite(r.metrics.get(name, math.nan))]
        return [r.index for r in having], [r.metrics[name] for r in having]

    def has(self, *names: str) -> bool:
        return any(self.series(name)[0] for name in names)

    @property
    def independent(self) -> bool:
        return all(r.metrics.get("evaluate/independent", 1) == 1 for r in self.rounds)


def read(run_dir: Path) -> Run:
    """Read a run folder. Raises InputError where there is none; missing artifacts only make the report shorter."""
    if not (run_dir / "ledger.sqlite").is_file():
        raise InputError(
            f"{run_dir} is not a run folder: it has no ledger", "give the folder of a run, such as runs/tiny"
        )
    store = Store(run_dir)
    try:
        name, rounds = run_dir.resolve().name, []
        for row in store.rounds():
            config = row["config"] if isinstance(row["config"], dict) else {}
            name = config.get("run", {}).get("name", name)
            rounds.append(
                Round(
                    index=row["round"], state=row["state"], policy=row["policy"], reasons=row["reasons"],
                    metrics=store.metrics(row["round"]), seconds=store.seconds(row["round"]),
                    gate=config.get("evaluate", {}).get("gate", {}),
                )
            )  # fmt: skip
        policies, events = store.policies(), store.events()
    finally:
        store.close()
    served = [r.policy for r in rounds if r.policy is not None]
    current = Policies(run_dir).current
    index = next((r.index for r in reversed(rounds) if r.metrics.get("pairs/base")), None)
    folder = run_dir / "rounds" / f"{index or 0:04d}"
    return Run(
        name=name,
        current=current if current is not None else served[-1] if served else None,
        rounds=rounds,
        policies=policies,
        events=events,
        pairs_round=index,
        pairs=_rows(folder / "pairs" / "pairs.parquet", Pair),
        added=[p for p in _rows(folder / "depth" / "pairs.parquet", Pair) if p.kept_because == "depth"],
        prompts={p.prompt_id: p for p in _rows(folder / "prompts" / "prompts.parquet", Prompt)},
    )


def _rows(path: Path, row_type: Any) -> list[Any]:
    return artifacts.read_rows(path, row_type) if path.is_file() else []


# --- charts: each draws one thing into one axes, for the picture and for the page -----------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    title: str
    caption: str  # what it shows, and the unit
    draw: Callable[[Any, Run], None]

    @property
    def counts(self) -> bool:
        """Whether the vertical axis counts pairs."""
        return self.draw in (draw_explicit, draw_implicit, draw_pairs)


def line(ax: Any, run: Run, name: str, label: str, colour: str, **style: Any) -> None:
    """One metric by round; an absent one draws nothing. Rounds without it are crossed, since skipped ones are normal."""
    x, y = run.series(name)
    if x:
        style = {"marker": "o", "markersize": 4, "linewidth": 1.6} | style
        if len(run.rounds) > MANY:  # markers would run into each other
            style |= {"marker": "", "linewidth": 0.9, "linestyle": style.get("linestyle") or "-"}
        ax.plot(x, y, color=C[colour], label=label, **style)


def draw_reward(ax: Any, run: Run) -> None:
    if run.independent:
        line(ax, run, "evaluate/reward_champion", "champion", "grey", linestyle="--")
    else:  # one scale only where the judge is the reward that trains
        line(ax, run, "score/reward_mean", "sampled", "teal", linewidth=1.0, markersize=2.5)
        line(ax, run, "evaluate/reward_champion", "champion, held-out", "grey", linestyle="--")
    line(ax, run, "evaluate/reward", "candidate" if run.independent else "candidate, held-out", "blue")
    hollow(ax, run, "evaluate/reward", "blue")
    ax.set_ylabel("mean reward")


def draw_sampled(ax: Any, run: Run) -> None:
    line(ax, run, "score/reward_mean", "sampled", "teal")
    ax.set_ylabel("mean reward")


def draw_gold(ax: Any, run: Run) -> None:
    for part, colour in (("total", "orange"), ("content", "green")):
        line(ax, run, f"evaluate/gold_{part}", part, colour)
        hollow(ax, run, f"evaluate/gold_{part}", colour)
        line(
            ax,
            run,
            f"evaluate/audit_gold_{part}",
            f"{part}, audit",
            colour,
            marker="D",
            markersize=3,
            linewidth=1,
            linestyle=":",
        )
    ax.set_ylabel("gold score (mean)")


def draw_win_rate(ax: Any, run: Run) -> None:
    x, rate = run.series("evaluate/win_rate")
    bounds = {r.index: r for r in run.rounds if "evaluate/win_rate_low" in r.metrics and r.index in x}
    low = [bounds[i].metrics["evaluate/win_rate_low"] if i in bounds else v for i, v in zip(x, rate, strict=True)]
    high = [bounds[i].metrics["evaluate/win_rate_high"] if i in bounds else v for i, v in zip(x, rate, strict=True)]
    ax.axhline(0.5, color=C["soft"], linewidth=0.9)
    if len(x) > MANY:
        ax.fill_between(x, low, high, color=C["blue"], alpha=0.18, linewidth=0)
    else:
        ax.vlines(x, low, high, color=C["blue"], linewidth=1.4)
    line(ax, run, "evaluate/win_rate", "against champion", "blue", linestyle="")
    hollow(ax, run, "evaluate/win_rate", "blue")
    limits = [(r.index, r.gate["win_rate_lower"]) for r in run.rounds if r.index in x and "win_rate_lower" in r.gate]
    if limits:  # the configuration may change between rounds
        edges = [e for i, _ in limits for e in (i - 0.5, i + 0.5)]
        ax.plot(
            edges,
            [v for _, v in limits for _ in (0, 1)],
            color=C["red"],
            linewidth=1,
            linestyle="--",
            label="gate's bound",
        )
    line(
        ax,
        run,
        "evaluate/audit_win_rate",
        "against initial",
        "purple",
        marker="D",
        markersize=3,
        linewidth=1,
        linestyle=":",
    )
    line(
        ax,
        run,
        "evaluate/audit_gold_win_rate",
        "same, by gold",
        "orange",
        marker="D",
        markersize=3,
        linewidth=1,
        linestyle=":",
    )
    ax.set_ylabel("win rate")


def draw_margins(ax: Any, run: Run) -> None:
    for name, colour in (("explicit", "blue"), ("implicit", "purple")):
        line(ax, run, f"pairs/{name}_margin", f"{name}, kept", colour)
        line(ax, run, f"pairs/base_{name}_margin", f"{name}, all", colour, markersize=2, linestyle="--", linewidth=1)
    ax.set_ylabel("mean margin")


def draw_pairs(ax: Any, run: Run) -> None:
    counted = [r for r in run.rounds if "pairs/kept" in r.metrics]
    dropped = {n for r in counted for n, v in r.metrics.items() if n.startswith("pairs/dropped_") and v}
    faults = ["pairs/dropped_noise", "pairs/dropped_nonfinite"]  # last and loud; the selection's own drops are grey
    names = ["pairs/kept", *sorted(dropped - set(faults)), *(n for n in faults if n in dropped)]
    colours = dict(zip(names, ("blue", "grey", "teal", "purple", "green", "soft"), strict=False))
    colours |= dict(zip(faults, ("orange", "red"), strict=True))
    stacked(
        ax,
        [r.index for r in counted],
        [[r.metrics.get(n, 0.0) for r in counted] for n in names],
        [n.removeprefix("pairs/").replace("_", ": ") for n in names],
        [colours.get(n, "soft") for n in names],
    )
    ax.set_ylabel("base pairs")


def draw_beta(ax: Any, run: Run) -> None:
    x, end = run.series("train/beta")
    starts = {r.index: r.metrics["train/beta_start"] for r in run.rounds if "train/beta_start" in r.metrics}
    start = [starts.get(i, v) for i, v in zip(x, end, strict=True)]
    ax.vlines(x, end, start, color=C["grey"], linewidth=1.4 if len(x) <= MANY else 0.6)
    line(ax, run, "train/beta_start", "start", "grey", linestyle="", markersize=3)
    line(ax, run, "train/beta", "end", "orange", linestyle="")
    if min(start + end) > 0 and max(start + end) > 10 * min(start + end):
        ax.set_yscale("log")
    ax.set_ylabel("β")


def draw_update(ax: Any, run: Run) -> None:
    line(ax, run, "train/update_relative_norm", "relative norm", "orange")
    _, y = run.series("train/update_relative_norm")
    if y and min(y) > 0 and max(y) > 20 * min(y):
        ax.set_yscale("log")
    else:
        ax.set_ylim(0, 1.15 * max(y, default=1) or 1)
    ax.set_ylabel("relative norm")


def draw_length(ax: Any, run: Run) -> None:
    line(ax, run, "evaluate/length_ratio", "candidate / champion", "teal")
    hollow(ax, run, "evaluate/length_ratio", "teal")
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, 0.95), max(high, 1.05))
    ax.axhline(1, color=C["soft"], linewidth=0.9)
    limit = next((r.gate["max_length_ratio"] for r in reversed(run.rounds) if "max_length_ratio" in r.gate), None)
    beyond(ax, [limit, 1 / limit] if limit else [])
    ax.set_ylabel("length ratio")


def draw_kl(ax: Any, run: Run) -> None:
    line(ax, run, "evaluate/kl_initial", "to the initial policy", "grey")
    line(ax, run, "evaluate/kl_current", "to the current policy", "purple")
    hollow(ax, run, "evaluate/kl_current", "purple")
    beyond(ax, [r.gate["max_kl"] for r in run.rounds[-1:] if "max_kl" in r.gate])
    ax.set_ylabel("KL (nats an answer)")


def draw_explicit(ax: Any, run: Run) -> None:
    histogram(ax, run, "explicit_margin")
    ax.set_xlabel("explicit margin (reward units)")


def draw_implicit(ax: Any, run: Run) -> None:
    histogram(ax, run, "implicit_margin")
    ax.set_xlabel("implicit margin (nats a token)")


def draw_time(ax: Any, run: Run) -> None:
    timed = [r for r in run.rounds if r.seconds]
    groups = {stage: (colour, {stage}) for stage, colour in STAGE_COLOURS.items()}
    groups["others"] = ("grey", {stage for r in timed for stage in r.seconds} - set(STAGE_COLOURS))
    bars = {
        name: (colour, [sum(v for stage, v in r.seconds.items() if stage in members) for r in timed])
        for name, (colour, members) in groups.items()
    }
    bars = {name: bar for name, bar in bars.items() if any(bar[1])}
    stacked(ax, [r.index for r in timed], [v for _, v in bars.values()], list(bars), [c for c, _ in bars.values()])
    ax.set_ylabel("seconds")


def hollow(ax: Any, run: Run, name: str, colour: str) -> None:
    """Mark rounds that the gate rejected: an empty circle over the point."""
    points = [(r.index, r.metrics[name]) for r in run.rounds if r.state == "rejected" and name in r.metrics]
    if points:
        ax.plot(*zip(*points, strict=True), linestyle="", marker="o", markersize=5 if len(run.rounds) <= MANY else 3, markerfacecolor=C["ground"], markeredgecolor=C[colour], markeredgewidth=1.4 if len(run.rounds) <= MANY else 0.8)  # fmt: skip


def beyond(ax: Any, limits: Iterable[float]) -> None:
    """Draw those limits of the gate that the data come near; a far one would flatten everything else."""
    low, high = ax.get_ylim()
    for limit in limits:
        if low - 0.5 * (high - low) <= limit <= high + 0.5 * (high - low):
            ax.axhline(limit, color=C["red"], linewidth=1, linestyle="--", label="limit of the gate")


def stacked(ax: Any, x: list[int], values: list[list[float]], labels: list[str], colours: list[str]) -> None:
    if len(x) > MANY:
        ax.stackplot(x, *values, labels=labels, colors=[C[c] for c in colours], linewidth=0)
        return
    base = [0.0] * len(x)
    for row, label, colour in zip(values, labels, colours, strict=True):
        ax.bar(x, row, 0.62, bottom=base, label=label, color=C[colour], linewidth=0)
        base = [b + v for b, v in zip(base, row, strict=True)]


def histogram(ax: Any, run: Run, field: str) -> None:
    """Base pairs by margin, the kept at the bottom of each bar."""
    groups = [
        [v for p in run.pairs if bool(p.kept_because) == kept and math.isfinite(v := getattr(p, field))]
        for kept in (True, False)
    ]
    bins = min(30, max(8, round(math.sqrt(len(run.pairs)) * 1.5)))
    ax.hist(
        groups,
        bins=bins,
        stacked=True,
        color=[C["blue"], C["grey"]],
        label=["kept", "dropped"],
        rwidth=0.92,
        linewidth=0,
    )
    ax.set_ylabel("base pairs")


def charts(run: Run) -> list[Chart]:
    """The charts that have something to show, in reading order."""
    last = f"round {run.pairs_round}"
    judge = "the judge, another reward" if run.independent else "the reward that trains"
    table = [
        (run.has("evaluate/reward"), "Reward", f"Mean reward by {judge}. Champion and candidate answer the same held-out prompts, drawn anew each round; hollow: rejected.", draw_reward),
        (run.has("evaluate/gold_total"), "Gold", "Mean score by the gold rubric (total, and its content part), which never trains nor gates; candidate on the gate's prompts, and on the fixed audit set.", draw_gold),
        (run.has("evaluate/win_rate"), "Win rate", "Share of held-out prompts where the candidate's answer has the higher reward (ties half), with bootstrap interval; hollow: rejected.", draw_win_rate),
        ((run.independent and run.has("score/reward_mean")) or (not run.has("evaluate/reward") and run.has("score/reward_mean")), "Reward of the candidates", "Mean reward of the round's sampled candidates, by the reward that trains.", draw_sampled),
        (run.has("evaluate/length_ratio"), "Length", "Mean answer length of the candidate policy over the champion's (1: the same); dashed: the gate's limits where near.", draw_length),
        (run.has("evaluate/kl_current"), "KL", "Estimated KL of the candidate policy, on its own answers: nats an answer.", draw_kl),
        (run.has("train/beta"), "β", "β of ε-DPO at the start and the end of each round's training (no unit).", draw_beta),
        (run.has("train/update_relative_norm"), "Update", "Norm of the weight change of a round over the norm of the weights (no unit).", draw_update),
        (run.has("pairs/explicit_margin"), "Margins by round", "Means over kept and over all base pairs. Explicit: reward units; implicit: nats a token.", draw_margins),
        (bool(run.pairs), f"Explicit margins, {last}", "Reward of the chosen minus reward of the rejected response, for each base pair.", draw_explicit),
        (bool(run.pairs), f"Implicit margins, {last}", "Absolute difference of the two mean token log-probabilities under the sampling policy.", draw_implicit),
        (run.has("pairs/base"), "Pairs", "Base pairs of each round (one a prompt at most): kept for training, or dropped and why.", draw_pairs),
        (any(r.seconds for r in run.rounds), "Where the time went", "Seconds of each stage of a round; others: prompts, pairs, depth.", draw_time),
    ]  # fmt: skip
    return [Chart(title=title, caption=caption, draw=draw) for shown, title, caption, draw in table if shown]


STYLE = {
    "font.size": 8.5, "font.family": "DejaVu Sans", "text.color": C["ink"], "text.parse_math": False, "axes.labelcolor": C["soft"],
    "axes.edgecolor": C["faint"], "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none", "axes.grid": True,
    "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": C["faint"], "grid.linewidth": 0.6, "xtick.color": C["soft"],
    "ytick.color": C["soft"], "xtick.major.size": 3, "ytick.major.size": 0, "legend.frameon": False, "legend.fontsize": 8,
    "svg.fonttype": "none", "path.simplify": True,
}  # fmt: skip


def panel(figure: Any, run: Run, chart: Chart, left: float, bottom: float, width: float, height: float) -> float:
    """Draw a chart into a rectangle (inches) of a figure, with its round axis and its legend; returns its top edge.

    The rectangle leaves room for tick labels and the axis names itself. Fixed places keep the axes of all charts in line.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator  # takes a second to import: `--help` does without

    ax = figure.add_axes((0, 0, 1, 1))
    chart.draw(ax, run)
    if chart.counts:
        ax.yaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    elif ax.get_yscale() == "linear":
        largest = max(map(abs, ax.get_ylim()))
        if 1e-3 <= largest < 1e5:
            ax.ticklabel_format(axis="y", useOffset=False, style="plain")
        else:
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    if not ax.get_xlabel():
        first, last = run.rounds[0].index, run.rounds[-1].index
        pad = 0.5 if len(run.rounds) <= MANY else 0.01 * (last - first)
        ax.set_xlim(first - pad, last + pad)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        ax.set_xlabel("round")
    rows = 0
    by_label = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    if len(by_label) > 1:
        columns = 3 if max(map(len, by_label)) <= 16 else 2
        rows = math.ceil(len(by_label) / columns)
        ax.legend(
            by_label.values(), by_label.keys(), loc="lower left", bbox_to_anchor=(-0.02, 0.99), ncols=columns, borderaxespad=0.2,
            handlelength=1.6, handletextpad=0.5, columnspacing=1.1, labelspacing=0.25, borderpad=0.2,
        )  # fmt: skip
    x, y = left + 0.62, bottom + 0.42
    w, h = width - 0.68, height - 0.42 - 0.08 - 0.165 * rows
    total_width, total_height = figure.get_size_inches()
    ax.set_position((x / total_width, y / total_height, w / total_width, h / total_height))
    ax.yaxis.set_label_coords(-0.54 / w, 0.5)
    return y + h + 0.165 * rows


def svg(run: Run, chart: Chart) -> Markup:
    """One chart as inline SVG: CSS variables for colours, no fixed size, no address of any kind."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    out = io.StringIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": chart.title}):
        figure = Figure(figsize=(4.3, 2.8))
        panel(figure, run, chart, 0, 0, 4.3, 2.8)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    text = out.getvalue()[out.getvalue().index("<svg") :]
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)  # HTML needs none
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    for name, (light, _) in COLOURS.items():
        text = text.replace(light, f"var(--{name})")
    label = Markup.escape(f"{chart.title}. {chart.caption}")
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))


def png(run: Run, shown: Sequence[Chart], path: Path) -> None:
    """All charts in one picture, three a row."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows, cell_width, cell_height = math.ceil(len(shown) / 3), 5.0, 3.75  # inches
    height = 0.75 + (rows * cell_height or 1.5)
    with mpl.rc_context(STYLE), artifacts._whole(path) as partial:
        figure = Figure(figsize=(3 * cell_width, height), facecolor="#ffffff")

        def write(x: float, y: float, text: str, **style: Any) -> None:
            figure.text(x / (3 * cell_width), y / height, text, **style)

        write(0.25, height - 0.45, f"{run.name}: {state(run)}", fontsize=14, fontweight="bold")
        for i, chart in enumerate(shown):
            left, bottom = (i % 3) * cell_width + 0.25, height - 0.75 - (i // 3 + 1) * cell_height
            top = panel(figure, run, chart, left, bottom + 0.45, cell_width - 0.35, 2.85)
            write(left, top + 0.1, chart.title, fontsize=11, fontweight="bold")
            caption = "\n".join(textwrap.wrap(chart.caption, 88))
            write(left, bottom + 0.42, caption, fontsize=7.5, color=C["soft"], va="top")
        if not shown:
            write(0.25, 0.8, "No round has anything to show yet.", fontsize=11, color=C["soft"])
        figure.savefig(partial, format="png", dpi=110)


# --- the page --------------------------------------------------------------------------------------------------------


def state(run: Run) -> str:
    """Where the run stands, in words."""
    closed = Counter(r.state for r in run.rounds if r.state != "running")
    if not run.rounds:
        return "no rounds yet"
    parts = [f"{count} {name}" for name in ("promoted", "rejected", "skipped") if (count := closed[name])]
    done = sum(closed.values())
    text = f"{done} {'round' if done == 1 else 'rounds'} finished" + (f" ({', '.join(parts)})" if parts else "")
    running = [r for r in run.rounds if r.state == "running"]
    if running:
        at = next((s for s in STAGES if s not in running[0].seconds), "promote")
        text += f", round {running[0].index} unfinished (at {at})"
    return text


def warnings(run: Run) -> list[str]:
    """What a reader should know before believing the curves."""
    found = [] if run.independent else [NOT_INDEPENDENT]
    if drift := gold_against_reward(run):
        found.append(drift)
    stopped = [
        f"round {r.index} {verdict(r.state, r.policy, r.reasons)}"
        for r in run.rounds
        if r.state in ("rejected", "skipped")
    ]
    told = [
        f"{e['time'][:16].replace('T', ' ')} UTC"
        + (f", round {e['round']}" if e["round"] is not None else "")
        + f": {e['text']}"
        for e in run.events
        if e["kind"] in ("warning", "failed", "error", "alert")
    ]
    for texts, where in (
        (stopped, "rejected or skipped rounds are in the table"),
        (told, "warnings are in the ledger"),
    ):
        if len(texts) > LATEST:
            found.append(f"{len(texts) - LATEST} earlier {where}")
        found += texts[-LATEST:]
    return found


def gold_against_reward(run: Run) -> str:
    """A warning where the reward says better and the gold rubric, on the same audit answers, says worse."""
    audited = [r for r in run.rounds if r.state != "rejected" and "evaluate/audit_reward" in r.metrics]
    for r in audited[-1:]:
        m, fell = r.metrics, []
        for part in ("total", "content"):
            before, after = (m.get(f"evaluate/audit_gold_{part}{of}") for of in ("_initial", ""))
            if before is not None and after is not None and after < before - NOISE * abs(before):
                fell.append(f"gold {part} {number(before, '.3f')} → {number(after, '.3f')}")
        if fell and m["evaluate/audit_reward"] > m.get("evaluate/audit_reward_initial", math.inf):
            return (
                f"against the initial policy the reward rose but {', '.join(fell)} (audit set, round {r.index}): "
                "training may be exploiting the reward"
            )
    return ""


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """The figures at the top: name, value, what it is."""
    found = [("current policy", number(run.current, "d"), "the one that serves")]
    judged = [r for r in run.rounds if "evaluate/reward" in r.metrics]
    won = [r for r in judged if r.state == "promoted"]
    for name, key in (("held-out reward", "reward"), ("gold total", "gold_total"), ("gold content", "gold_content")):
        before = judged[0].metrics.get(f"evaluate/{key}_champion") if judged else None
        after = won[-1].metrics.get(f"evaluate/{key}") if won else before
        if before is not None:
            found.append((name, f"{number(before, '.3f')} → {number(after, '.3f')}", "first champion → last promoted; prompts drawn anew each round"))  # fmt: skip
    audited = [r for r in run.rounds if r.state != "rejected" and "evaluate/audit_win_rate" in r.metrics]
    if audited:
        m = audited[-1].metrics
        gold = (
            f"; by gold {number(m['evaluate/audit_gold_win_rate'], '.3f')}"
            if "evaluate/audit_gold_win_rate" in m
            else ""
        )
        found.append(
            (
                "win rate against initial",
                number(m["evaluate/audit_win_rate"], ".3f"),
                f"audit set, round {audited[-1].index}{gold}",
            )
        )
    if judged:
        m = judged[-1].metrics
        bounds = interval(m).partition(" ")[2]
        found.append(
            (
                "last win rate",
                number(m.get("evaluate/win_rate"), ".3f"),
                join([bounds, f"against the champion, round {judged[-1].index}"], " "),
            )
        )
    seconds = [sum(r.seconds.values()) for r in run.rounds if r.state != "running"]
    if seconds:
        found.append(
            ("seconds a round", number(sorted(seconds)[len(seconds) // 2], ".1f"), "median of the stages' sum")
        )
    return found


# column, metric(s), format
COLUMNS: list[tuple[str, str | tuple[str, str], str]] = [
    ("candidates", "generate/candidates", ".0f"),
    ("sampled reward", "score/reward_mean", ".3f"),
    ("held-out reward", ("evaluate/reward_champion", "evaluate/reward"), ".3f"),
    ("win rate", "evaluate/win_rate", ""),
    ("length-controlled", "evaluate/win_rate_length_controlled", ".3f"),
    ("gold total", ("evaluate/gold_total_champion", "evaluate/gold_total"), ".3f"),
    ("gold content", ("evaluate/gold_content_champion", "evaluate/gold_content"), ".3f"),
    ("base pairs", "pairs/base", ".0f"),
    ("kept", "pairs/kept", ".0f"),
    ("trained on", "depth/pairs", ".0f"),
    ("explicit margin", "pairs/explicit_margin", ".3f"),
    ("implicit margin", "pairs/implicit_margin", ".3f"),
    ("alignment potential", "pairs/potential", ".2f"),
    ("β", ("train/beta_start", "train/beta"), ".4g"),
    ("update", "train/update_relative_norm", ".2e"),
    ("changed", "train/share_changed", ".1%"),
    ("length ratio", "evaluate/length_ratio", ".2f"),
    ("KL current", "evaluate/kl_current", ".2f"),
    ("KL initial", "evaluate/kl_initial", ".2f"),
    ("distinct-2", "evaluate/distinct_2", ".3f"),
    ("cut off", "evaluate/cut_off", ".1%"),
    ("audit win rate", "evaluate/audit_win_rate", ""),
    ("audit gold total", ("evaluate/audit_gold_total_initial", "evaluate/audit_gold_total"), ".3f"),
    ("audit gold content", ("evaluate/audit_gold_content_initial", "evaluate/audit_gold_content"), ".3f"),
    ("swap (s)", "promote/swap_seconds", ".3f"),
]


def cell(m: dict[str, float], names: str | tuple[str, str], form: str) -> str:
    if isinstance(names, tuple):
        return change(m, *names, form) or "–"
    return (number(m.get(names), form) if form else interval(m, names)) or "–"


def sample(run: Run) -> list[dict[str, Any]]:
    """Pairs of the last round to read: kept ones from the highest alignment potential to the lowest, then added, then dropped."""

    def spread(pairs: list[Pair], count: int) -> list[Pair]:
        pairs = sorted(pairs, key=lambda p: -(p.potential if p.potential is not None else -math.inf))
        if len(pairs) <= count:
            return pairs
        return [pairs[round(i * (len(pairs) - 1) / (count - 1))] for i in range(count)]

    kept, dropped = [p for p in run.pairs if p.kept_because], [p for p in run.pairs if not p.kept_because]
    chosen = [*spread(kept, SAMPLE_KEPT), *spread(run.added, 2), *spread(dropped, SAMPLE_DROPPED)]
    return [
        {
            "pair": p,
            "why": f"kept ({p.kept_because})" if p.kept_because else f"dropped ({p.dropped_because})",
            "kept": bool(p.kept_because),
            "messages": run.prompts[p.prompt_id].messages if p.prompt_id in run.prompts else [],
            "sides": [
                (side, _short(getattr(p, side)), getattr(p, f"{side}_reward"), getattr(p, f"{side}_logp"), len(getattr(p, f"{side}_ids")))
                for side in ("chosen", "rejected")
            ],
        }
        for p in chosen
    ]  # fmt: skip


def _short(text: str) -> str:
    return (
        text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} … ({len(text) - LONGEST_TEXT} more characters)"
    )


def html(run: Run, shown: Sequence[Chart]) -> str:
    """The whole page. Jinja escapes every value; only the charts, which hold our own words, go in as they are."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number
    stages = [s for s in STAGES if any(s in r.seconds for r in run.rounds)]
    stages += sorted({s for r in run.rounds for s in r.seconds} - set(STAGES))
    return environment.from_string(PAGE).render(
        run=run,
        state=state(run),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        tiles=tiles(run),
        warnings=warnings(run),
        charts=[(chart, svg(run, chart)) for chart in shown],
        columns=[c for c in COLUMNS if run.has(*([c[1]] if isinstance(c[1], str) else c[1]))],
        cell=cell,
        newest=run.rounds[::-1],
        stages=stages,
        verdict=verdict,
        sample=sample(run),
        variables={mode: [(n, c[mode]) for n, c in COLOURS.items()] for mode in (0, 1)},
    )


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{{ run.name }}: {{ state }}</title>
<style>
:root { {% for name, value in variables[0] %}--{{ name }}: {{ value }}; {% endfor %}--page: #f5f6f8; }
@media (prefers-color-scheme: dark) { :root { {% for name, value in variables[1] %}--{{ name }}: {{ value }}; {% endfor %}--page: #0d1117; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px 20px 60px; max-width: 1400px; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 26px; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 18px; margin: 34px 0 12px; } h3 { font-size: 15px; margin: 0; }
p { margin: 4px 0; } .soft, figcaption, summary { color: var(--soft); } figcaption { font-size: 12.5px; }
.tiles, .charts { display: grid; gap: 12px; } .tiles { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); margin-top: 18px; }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(360px, 100%), 1fr)); }
.card { background: var(--ground); border: 1px solid var(--faint); border-radius: 8px; padding: 12px 14px; margin: 0; min-width: 0; }
.tiles b { display: block; font-size: 16px; white-space: nowrap; font-variant-numeric: tabular-nums; } .tiles small { color: var(--soft); display: block; line-height: 1.3; }
.warnings { border-left: 4px solid var(--orange); margin-top: 14px; } .warnings ul { margin: 4px 0; padding-left: 18px; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; overflow: visible; } svg text { font-family: system-ui, "Segoe UI", "DejaVu Sans", sans-serif !important; }
.scroll { overflow: auto; max-height: 75vh; padding: 0; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: 5px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--faint); }
th { position: sticky; top: 0; background: var(--ground); color: var(--soft); font-weight: 600; z-index: 1; }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--ground); } th:first-child { z-index: 2; }
td.words { text-align: left; white-space: normal; min-width: 420px; overflow-wrap: anywhere; } th.words, .left { text-align: left; }
.promoted { color: var(--green); } .rejected { color: var(--orange); } .skipped, .running { color: var(--teal); }
.pair { margin-bottom: 12px; } .sides { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); margin-top: 8px; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 320px; overflow: auto; unicode-bidi: isolate; font-size: 14px; }
.prompt { border-left: 3px solid var(--faint); padding-left: 10px; margin: 6px 0; } .side { border-top: 3px solid var(--blue); padding-top: 6px; min-width: 0; }
.side.rejected-side { border-color: var(--grey); } .numbers { font-size: 12.5px; color: var(--soft); font-variant-numeric: tabular-nums; }
.tag { border-radius: 4px; padding: 1px 6px; border: 1px solid var(--blue); color: var(--blue); font-size: 12px; } .tag.out { border-color: var(--grey); color: var(--soft); }
</style>
</head>
<body>
<header>
<h1>{{ run.name }}</h1>
<p>{{ state }} · {% if run.current is none %}no policy serves yet{% else %}policy {{ run.current }} serves{% endif %}</p>
<p class="soft">written {{ made }}</p>
</header>
<section class="tiles">
{% for name, value, what in tiles %}
<div class="card"><span class="soft">{{ name }}</span><b>{{ value or "–" }}</b><small>{{ what }}</small></div>
{% endfor %}
</section>
{% if warnings %}
<section class="card warnings"><h3>Warnings</h3><ul>{% for text in warnings %}<li>{{ text }}</li>{% endfor %}</ul></section>
{% endif %}
{% if charts %}
<h2>By round</h2>
<section class="charts">
{% for chart, drawing in charts %}
<figure class="card"><h3>{{ chart.title }}</h3>{{ drawing }}<figcaption>{{ chart.caption }}</figcaption></figure>
{% endfor %}
</section>
{% endif %}
<h2>Rounds</h2>
{% if newest %}
<div class="card scroll"><table>
<tr><th>round</th><th class="left">verdict</th><th>policy</th>{% for name, _, _ in columns %}<th>{{ name }}</th>{% endfor %}<th>seconds</th><th class="words">in words</th></tr>
{% for r in newest %}
<tr><td>{{ r.index }}</td><td class="left {{ r.state }}">{{ "unfinished" if r.state == "running" else r.state }}</td><td>{{ "–" if r.policy is none else r.policy }}</td>
{%- for _, names, form in columns %}<td>{{ cell(r.metrics, names, form) }}</td>{% endfor %}<td>{{ r.seconds.values() | sum | number(".1f") }}</td><td class="words">{{ verdict(r.state, r.policy, r.reasons) }}</td></tr>
{% endfor %}
</table></div>
<p class="soft">a → b is champion → candidate for held-out reward and gold, initial → candidate on the audit set, start → end for β. Margins and potential: means over the kept pairs (reward units; nats a token; standard deviations). KL: nats an answer. Update: norm of the change over norm of the weights; changed: share of the elements.</p>
<details><summary>Seconds by stage</summary><div class="card scroll"><table>
<tr><th>round</th>{% for stage in stages %}<th>{{ stage }}</th>{% endfor %}<th>sum</th></tr>
{% for r in newest %}
<tr><td>{{ r.index }}</td>{% for stage in stages %}<td>{{ r.seconds.get(stage) | number(".2f") }}</td>{% endfor %}<td>{{ r.seconds.values() | sum | number(".2f") }}</td></tr>
{% endfor %}
</table></div></details>
<details><summary>Every metric of round {{ newest[0].index }}</summary><div class="card scroll"><table>
<tr><th class="left">metric</th><th>value</th></tr>
{% for name, value in newest[0].metrics.items() %}
<tr><td class="left">{{ name }}</td><td>{{ value | number(".6g") }}</td></tr>
{% endfor %}
</table></div></details>
{% else %}
<p>No round has started yet.</p>
{% endif %}
{% if run.policies %}
<h2>Policies</h2>
<div class="card scroll"><table>
<tr><th>policy</th><th class="left">state</th><th>round</th><th>parent</th><th>reference</th><th>β</th><th class="left">weights</th></tr>
{% for p in run.policies | reverse %}
<tr><td>{{ p.version }}</td><td class="left {{ p.state }}">{{ p.state }}{% if p.version == run.current %} · current{% endif %}</td><td>{{ p.round }}</td><td>{{ "–" if p.parent is none else p.parent }}</td><td>{{ "–" if p.reference is none else p.reference }}</td><td>{{ p.beta | number(".4g") }}</td><td class="left">{{ "on disk" if p.weights else "deleted" }}</td></tr>
{% endfor %}
</table></div>
{% endif %}
{% if sample %}
<h2>A sample of the pairs of round {{ run.pairs_round }}</h2>
<p class="soft">{{ run.pairs | length }} base pairs{% if run.added %} and {{ run.added | length }} added by depth{% endif %}; kept ones from the highest alignment potential to the lowest, then dropped ones. logp: nats, summed, under the policy that sampled.</p>
{% for s in sample %}
<article class="card pair">
<p class="numbers"><span class="tag{{ '' if s.kept else ' out' }}">{{ s.why }}</span> explicit margin {{ s.pair.explicit_margin | number(".4g") }} · implicit margin {{ s.pair.implicit_margin | number(".4g") }} (signed {{ s.pair.implicit_signed | number("+.4g") }}) · alignment potential {{ s.pair.potential | number("+.3f") }}{% if s.pair.cluster is not none %} · cluster {{ s.pair.cluster }}, closeness {{ s.pair.closeness | number(".3f") }}{% endif %} · prompt {{ s.pair.prompt_id }}</p>
{% for message in s.messages %}
<div class="prompt"><span class="numbers">{{ message.role }}</span><div class="text" dir="auto">{{ message.content }}</div></div>
{% endfor %}
<div class="sides">
{% for side, text, reward, logp, tokens in s.sides %}
<div class="side {{ side }}-side"><p class="numbers"><b>{{ side }}</b> · reward {{ reward | number(".4g") }} · logp {{ logp | number(".2f") }} · {{ tokens }} tokens</p><div class="text" dir="auto">{{ text }}</div></div>
{% endfor %}
</div>
</article>
{% endfor %}
{% endif %}
</body>
</html>
"""


def write(run_dir: Path) -> tuple[Path, Path]:
    """Write report.html and report.png, each whole or not at all; returns their paths. Raises InputError, DiskError."""
    run = read(run_dir)
    shown = charts(run)
    page, picture = run_dir / "report.html", run_dir / "report.png"
    with artifacts._whole(page) as partial:
        partial.write_text(html(run, shown), encoding="utf-8", errors="replace")
    png(run, shown, picture)
    return page, picture


def main(arguments: Sequence[str] | None = None) -> int:
    die_with_parent()
    parser = argparse.ArgumentParser(
        prog="python -m selfplay.report", description="Write report.html and report.png of a run."
    )
    parser.add_argument("run_dir", type=Path, help="folder of the run")
    try:
        for path in write(parser.parse_args(arguments).run_dir):
            print(path)
    except SelfplayError as error:
        print(f"error: {error}: {error.hint}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
