"""The report of a run: `python -m selfplay.reporting.report RUN_DIR` writes report.html and report.png into the run folder.

It reads the ledger and the artifacts alone. It runs as a process of its own, because the controller has no matplotlib. Each
chart is drawn by one function for both files. In the page a chart is inline SVG whose colours are CSS variables, so that it
follows the reader's light or dark setting. The page has no script and loads nothing.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from selfplay.errors import SelfplayError
from selfplay.processes.protocol import die_with_parent
from selfplay.reporting import gold, suites, word_diff
from selfplay.reporting.answers import about
from selfplay.reporting.charts import charts
from selfplay.reporting.drawing import COLOURS, Chart
from selfplay.reporting.history import Run, read, state
from selfplay.reporting.pictures import png, svg
from selfplay.reporting.words import NOT_INDEPENDENT, change, interval, join, number, verdict
from selfplay.storage import folders
from selfplay.types import Pair
from selfplay.visible import filter_stderr, say, visible, when

SAMPLE_KEPT, SAMPLE_ADDED, SAMPLE_DROPPED = 6, 2, 3  # pairs to read
LONGEST_TEXT = 4000  # characters of a response
LATEST = 8  # warnings of a kind
TILE_PARTS = 5  # parts of the rubric that have a figure at the top
NOISE = 0.01  # relative fall of a gold score that a few hundred answers cannot tell from none
TROUBLES = ("warning", "failed", "error", "alert", "reward_restart", "trainer_restart")  # kinds of events

Names = str | tuple[str, str]  # a metric, or the two of «before → after»


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
        when(e["time"]) + (f", round {e['round']}" if e["round"] is not None else "") + f": {e['text']}"
        for e in run.events
        if e["kind"] in TROUBLES
    ]
    guarded = [f"round {e['round']}: {e['text']}" for e in run.events if e["kind"] == "guard"]
    for texts, count, where in (
        (
            stopped,
            sum(ended in ("rejected", "skipped") for ended in run.states.values()),
            f"rejected or skipped rounds are in the {'ledger' if run.about_tables else 'table'}",
        ),
        (told, len(told), "warnings are in the ledger"),
        (guarded, len(guarded), "warnings of the guard are in the ledger"),
    ):
        if count > LATEST:
            found.append(f"{count - len(texts[-LATEST:])} earlier {where}")
        found += texts[-LATEST:]
    return found


def gold_against_reward(run: Run) -> str:
    """A warning where the reward says better and the gold rubric, on the same audit answers, says worse."""
    audited = [r for r in run.rounds if r.state != "rejected" and "evaluate/audit_reward" in r.metrics]
    for r in audited[-1:]:
        m, fell = r.metrics, []
        for part in gold.parts(m):
            before, after = map(m.get, gold.initial_and_candidate(part))
            if before is not None and after is not None and after < before - NOISE * abs(before):
                fell.append(f"gold {part} {number(before, '.3f')} → {number(after, '.3f')}")
        if fell and m["evaluate/audit_reward"] > m.get("evaluate/audit_reward_initial", math.inf):
            return (
                f"against the initial policy the reward rose but {', '.join(fell)} (audit set, round {r.index}): "
                "training may be exploiting the reward"
            )
    return ""


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """The figures at the top: name, value, and what it is."""
    found = [("current policy", number(run.current, "d"), "the one that serves")]
    gates = [("held-out reward", ("evaluate/reward_champion", "evaluate/reward"))]
    gates += [(f"gold {part}", gold.champion_and_candidate(part)) for part in gold.parts(run.figures)[:TILE_PARTS]]
    for name, (champion, candidate) in gates:
        before = run.first_judged.metrics.get(champion) if run.first_judged else None
        after = run.last_promoted.metrics.get(candidate) if run.last_promoted else before
        if before is not None:
            value = f"{number(before, '.3f')} → {number(after, '.3f')}"
            found.append((name, value, "first champion → last promoted; prompts drawn anew each round"))
    audited = [r for r in run.rounds if r.state != "rejected" and "evaluate/audit_win_rate" in r.metrics]
    for r in audited[-1:]:
        rate = r.metrics.get("evaluate/audit_gold_win_rate")
        by_gold = "" if rate is None else f"; by gold {number(rate, '.3f')}"
        value = number(r.metrics["evaluate/audit_win_rate"], ".3f")
        found.append(("win rate against initial", value, f"audit set, round {r.index}{by_gold}"))
    for r in [r for r in run.rounds if "evaluate/reward" in r.metrics][-1:]:
        bounds = interval(r.metrics).partition(" ")[2]
        value = number(r.metrics.get("evaluate/win_rate"), ".3f")
        found.append(("last win rate", value, join([bounds, f"against the champion, round {r.index}"], " ")))
    seconds = sorted(sum(r.seconds.values()) for r in run.rounds if r.state != "running")
    if seconds:
        found.append(("seconds a round", number(seconds[len(seconds) // 2], ".1f"), "median of the stages' sum"))
    return found


def columns(run: Run) -> list[tuple[str, Names, str]]:
    """The columns of the table of rounds that have something to show: name, metrics, and the format of a number."""
    parts, benchmarks = gold.parts(run.figures), suites.names(run.figures)
    found: list[tuple[str, Names, str]] = [
        ("candidates", "generate/candidates", ".0f"),
        ("sampled reward", "score/reward_mean", ".3f"),
        ("held-out reward", ("evaluate/reward_champion", "evaluate/reward"), ".3f"),
        ("win rate", "evaluate/win_rate", ""),
        ("length-controlled", "evaluate/win_rate_length_controlled", ".3f"),
        *((f"gold {part}", gold.champion_and_candidate(part), ".3f") for part in parts),
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
        ("thinks", "evaluate/thinking_share", ".1%"),
        ("thinking tokens", "evaluate/thinking_tokens", ".0f"),
        *((f"suite {name}", suites.champion_and_candidate(name), ".3f") for name in benchmarks),
        *((f"{name}: difference", suites.difference(name), "") for name in benchmarks),
        ("audit win rate", "evaluate/audit_win_rate", ""),
        *((f"audit gold {part}", gold.initial_and_candidate(part), ".3f") for part in parts),
        ("ties", "guard/ties", ".1%"),
        ("saturation", "guard/saturation", ".1%"),
        ("reward × length", "guard/length_correlation", ".2f"),
        ("shift", "guard/shift", ".2f"),
        ("disagreement", "guard/disagreement", ".2f"),
        ("gold fell by", "guard/gold_drop", ".3f"),
        ("sampled cut off", "guard/cut_off", ".1%"),
        ("chosen × rejected length", "guard/length_gap", ".2f"),
        ("decided by length", "guard/decided_by_length", ".1%"),
        ("duplicates", "guard/duplicates", ".1%"),
        ("4-grams repeated", "guard/repetition", ".1%"),
        ("probes changed by", "guard/probe_change", ".1e"),
        ("probes without a score", "guard/probe_missing", ".1%"),
        ("swap (s)", "promote/swap_seconds", ".3f"),
    ]
    return [column for column in found if run.has(*([column[1]] if isinstance(column[1], str) else column[1]))]


def cell(m: dict[str, float], names: Names, form: str) -> str:
    """One cell of that table; without a format the metric is shown with its interval."""
    if isinstance(names, tuple):
        return change(m, *names, form) or "–"
    return (number(m.get(names), form) if form else interval(m, names)) or "–"


def sample(run: Run) -> list[dict[str, Any]]:
    """Some pairs of the last round to read: kept ones from the highest alignment potential to the lowest, then those that depth
    added, then dropped ones."""

    def spread(pairs: list[Pair], count: int) -> list[Pair]:
        pairs = sorted(pairs, key=lambda p: -(p.potential if p.potential is not None else -math.inf))
        if len(pairs) <= count:
            return pairs
        return [pairs[round(i * (len(pairs) - 1) / (count - 1))] for i in range(count)]

    kept, dropped = [p for p in run.pairs if p.kept_because], [p for p in run.pairs if not p.kept_because]
    chosen = [*spread(kept, SAMPLE_KEPT), *spread(run.added, SAMPLE_ADDED), *spread(dropped, SAMPLE_DROPPED)]
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


def answered(run: Run) -> list[dict[str, Any]]:
    """Audit prompts, each with what every column says to it: about the answer, and its parts (`word_diff`)."""
    return [
        {
            "prompt_id": line.prompt_id,
            "messages": [(m["role"], word_diff.reveal([("same", _short(m["content"]))])) for m in line.messages],
            "said": [
                (about(said, before) if said else "not asked", parts)
                for before, said, parts in zip(
                    [None, *line.said],
                    line.said,
                    word_diff.along(_short(said.text) if said else None for said in line.said),
                    strict=False,
                )
            ],
        }
        for line in run.answers.lines
    ]


def _short(text: str) -> str:
    return (
        text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} … ({len(text) - LONGEST_TEXT} more characters)"
    )


def _finalize(value: Any) -> Any:
    """A value as it goes into the page, before it is escaped."""
    if isinstance(value, Markup):
        return Markup(visible(value))
    return visible(value) if isinstance(value, str) else value


def html(run: Run, shown: Sequence[Chart]) -> str:
    """The whole page. Jinja escapes every value. Only the charts go in as they are, because matplotlib escapes their words.

    No value has characters that a browser or an editor would obey."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("selfplay.reporting", "."),
        autoescape=True,
        finalize=_finalize,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    stages = [s for s in run.stages if any(s in r.seconds for r in run.rounds)]
    stages += sorted({s for r in run.rounds for s in r.seconds} - set(run.stages))
    return environment.get_template("report.html.jinja").render(
        run=run,
        state=state(run),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        tiles=tiles(run),
        warnings=warnings(run),
        charts=[(chart, svg(run, chart)) for chart in shown],
        columns=columns(run),
        cell=cell,
        newest=run.rounds[::-1],
        stages=stages,
        verdict=verdict,
        sample=sample(run),
        answered=answered(run),
        variables={mode: [(n, c[mode]) for n, c in COLOURS.items()] for mode in (0, 1)},
    )


def write(run_dir: Path) -> tuple[Path, Path]:
    """Write report.html and report.png, each whole or not at all; returns their paths. Raises InputError, DiskError."""
    run = read(run_dir)
    shown = charts(run)
    page, picture = run_dir / "report.html", run_dir / "report.png"
    with folders.whole(page) as partial:
        partial.write_text(html(run, shown), encoding="utf-8", errors="replace")
    png(run, shown, picture)
    return page, picture


def main(arguments: Sequence[str] | None = None) -> int:
    die_with_parent()
    filter_stderr()
    parser = argparse.ArgumentParser(
        prog="python -m selfplay.reporting.report", description="Write report.html and report.png of a run."
    )
    parser.add_argument("run_dir", type=Path, help="folder of the run")
    try:
        for path in write(parser.parse_args(arguments).run_dir):
            say(str(path))
    except SelfplayError as error:
        print(f"error: {error}: {error.hint}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
