"""Charts as pictures: inline SVG for the page, and one PNG of all of them."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from selfplay.reporting.drawing import COLOURS, MANY, C, Chart
from selfplay.reporting.history import Run, state
from selfplay.storage import folders

STYLE = {
    "font.size": 8.5, "font.family": "DejaVu Sans", "text.color": C["ink"], "text.parse_math": False, "axes.labelcolor": C["soft"],
    "axes.edgecolor": C["faint"], "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none", "axes.grid": True,
    "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": C["faint"], "grid.linewidth": 0.6, "xtick.color": C["soft"],
    "ytick.color": C["soft"], "xtick.major.size": 3, "ytick.major.size": 0, "legend.frameon": False, "legend.fontsize": 8,
    "svg.fonttype": "none", "path.simplify": True,
}  # fmt: skip


def panel(figure: Any, run: Run, chart: Chart, left: float, bottom: float, width: float, height: float) -> float:
    """Draw a chart into a rectangle of a figure, with its round axis and its legend. All sizes are inches.

    Returns the top edge of the legend. Tick labels and axis names are inside the rectangle. Their places are fixed, so that the
    axes of all charts are in line.
    """
    from matplotlib.ticker import (
        FuncFormatter,
        MaxNLocator,
        ScalarFormatter,
    )  # takes a second to import: `--help` does without

    ax = figure.add_axes((0, 0, 1, 1))
    chart.draw(ax, run)
    if chart.counts:
        ax.yaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    elif isinstance(ax.yaxis.get_major_formatter(), ScalarFormatter):  # neither logarithms nor names
        largest = max(map(abs, ax.get_ylim()))
        if 1e-3 <= largest < 1e5:
            ax.ticklabel_format(axis="y", useOffset=False, style="plain")
        else:
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    if not ax.get_xlabel():
        first, last = min(run.states), max(run.states)
        pad = 0.5 if len(run.states) <= MANY else 0.01 * (last - first)
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
    """One chart as inline SVG. Its colours are CSS variables, and it has no fixed size and no address of any kind."""
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
    head = 0.8 if run.about_charts else 0.55
    height = head + (rows * cell_height or 1.5)
    with mpl.rc_context(STYLE), folders.whole(path) as partial:
        figure = Figure(figsize=(3 * cell_width, height), facecolor="#ffffff")

        def write(x: float, y: float, text: str, **style: Any) -> None:
            figure.text(x / (3 * cell_width), y / height, text, **style)

        write(0.25, height - 0.45, f"{run.name}: {state(run)}", fontsize=14, fontweight="bold")
        write(0.25, height - 0.68, run.about_charts, fontsize=9, color=C["soft"])
        for i, chart in enumerate(shown):
            left, bottom = (i % 3) * cell_width + 0.25, height - head - (i // 3 + 1) * cell_height
            top = panel(figure, run, chart, left, bottom + 0.45, cell_width - 0.35, 2.85)
            write(left, top + 0.1, chart.title, fontsize=11, fontweight="bold")
            caption = "\n".join(textwrap.wrap(chart.caption, 84))
            write(left, bottom + 0.42, caption, fontsize=7.5, color=C["soft"], va="top")
        if not shown:
            write(0.25, 0.8, "No round has anything to show yet.", fontsize=11, color=C["soft"])
        figure.savefig(partial, format="png", dpi=110)
