"""The charts of a report, each drawn by one function for the picture and, as inline SVG, for the page."""

import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from selfplay.reporting.history import Run, state
from selfplay.storage import folders

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
    height = 0.55 + (rows * cell_height or 1.5)
    with mpl.rc_context(STYLE), folders.whole(path) as partial:
        figure = Figure(figsize=(3 * cell_width, height), facecolor="#ffffff")

        def write(x: float, y: float, text: str, **style: Any) -> None:
            figure.text(x / (3 * cell_width), y / height, text, **style)

        write(0.25, height - 0.45, f"{run.name}: {state(run)}", fontsize=14, fontweight="bold")
        for i, chart in enumerate(shown):
            left, bottom = (i % 3) * cell_width + 0.25, height - 0.55 - (i // 3 + 1) * cell_height
            top = panel(figure, run, chart, left, bottom + 0.45, cell_width - 0.35, 2.85)
            write(left, top + 0.1, chart.title, fontsize=11, fontweight="bold")
            caption = "\n".join(textwrap.wrap(chart.caption, 88))
            write(left, bottom + 0.42, caption, fontsize=7.5, color=C["soft"], va="top")
        if not shown:
            write(0.25, 0.8, "No round has anything to show yet.", fontsize=11, color=C["soft"])
        figure.savefig(partial, format="png", dpi=110)
