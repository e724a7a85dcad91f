"""The charts of a report. Each is drawn by one function, for the picture and for the page."""

from __future__ import annotations

from itertools import cycle
from typing import Any

from selfplay.planning.gantt import length
from selfplay.reporting import gold, suites, who_worked
from selfplay.reporting.drawing import MANY, C, Chart, beyond, histogram, hollow, line, stacked
from selfplay.reporting.history import Run

PART_COLOURS = ("orange", "green", "blue", "purple", "teal", "red")  # of the rubric's parts, total first
AUDIT: dict[str, Any] = {"marker": "D", "markersize": 3, "linewidth": 1, "linestyle": ":"}
STAGE_COLOURS = {"generate": "blue", "score": "teal", "train": "orange", "evaluate": "purple", "promote": "green"}
NARROW = 0.1  # share of a round below which the bar of a stage has no room for its name


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
    for part, colour in zip(gold.parts(run.figures), cycle(PART_COLOURS)):
        _, metric = gold.champion_and_candidate(part)
        line(ax, run, metric, part, colour)
        hollow(ax, run, metric, colour)
    _, metric = gold.initial_and_candidate("total")
    line(ax, run, metric, "total, audit", PART_COLOURS[0], **AUDIT)
    ax.set_ylabel("gold score (mean)")


def draw_suites(ax: Any, run: Run) -> None:
    """Each suite's score with its interval where the rounds are few, and the champion's where it was asked."""
    for name, colour in zip(suites.names(run.figures), cycle(PART_COLOURS)):
        _, metric = suites.champion_and_candidate(name)
        known = [r for r in run.spread if f"{metric}_low" in r.metrics]
        if len(known) <= MANY:
            bounds = [[r.metrics[f"{metric}_{bound}"] for r in known] for bound in ("low", "high")]
            ax.vlines([r.index for r in known], *bounds, color=C[colour], linewidth=1, alpha=0.5)
        line(ax, run, metric, name, colour)
        hollow(ax, run, metric, colour)
    ax.set_ylabel("score (mean)")


def draw_win_rate(ax: Any, run: Run) -> None:
    low, high = "evaluate/win_rate_low", "evaluate/win_rate_high"
    known = [r for r in run.spread if low in r.metrics and high in r.metrics]
    x, lows, highs = [r.index for r in known], [r.metrics[low] for r in known], [r.metrics[high] for r in known]
    ax.axhline(0.5, color=C["soft"], linewidth=0.9)
    if len(x) > MANY:
        ax.fill_between(x, lows, highs, color=C["blue"], alpha=0.18, linewidth=0)
    else:
        ax.vlines(x, lows, highs, color=C["blue"], linewidth=1.4)
    line(ax, run, "evaluate/win_rate", "against champion", "blue", linestyle="")
    hollow(ax, run, "evaluate/win_rate", "blue")
    judged = [r for r in run.spread if "evaluate/win_rate" in r.metrics]
    limits = [(r.index, r.gate["win_rate_lower"]) for r in judged if "win_rate_lower" in r.gate]
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
    line(ax, run, "evaluate/audit_win_rate", "against initial", "purple", **AUDIT)
    line(ax, run, "evaluate/audit_gold_win_rate", "same, by gold", "orange", **AUDIT)
    ax.set_ylabel("win rate")


def draw_margins(ax: Any, run: Run) -> None:
    for name, colour in (("explicit", "blue"), ("implicit", "purple")):
        line(ax, run, f"pairs/{name}_margin", f"{name}, kept", colour)
        line(ax, run, f"pairs/base_{name}_margin", f"{name}, all", colour, markersize=2, linestyle="--", linewidth=1)
    ax.set_ylabel("mean margin")


def draw_pairs(ax: Any, run: Run) -> None:
    counted = [r for r in run.spread if "pairs/kept" in r.metrics]
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
    trained = [r for r in run.spread if {"train/beta_start", "train/beta"} <= r.metrics.keys()]
    start, end = ([r.metrics[name] for r in trained] for name in ("train/beta_start", "train/beta"))
    ax.vlines([r.index for r in trained], end, start, color=C["grey"], linewidth=1.4 if len(trained) <= MANY else 0.6)
    line(ax, run, "train/beta_start", "start", "grey", linestyle="", markersize=3)
    line(ax, run, "train/beta", "end", "orange", linestyle="")
    values = [v for name in ("train/beta_start", "train/beta") for v in run.series(name)[1]]
    if min(values) > 0 and max(values) > 10 * min(values):
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
    timed = [r for r in run.spread if r.seconds]
    groups = {stage: (colour, {stage}) for stage, colour in STAGE_COLOURS.items()}
    groups["others"] = ("grey", {stage for r in timed for stage in r.seconds} - set(STAGE_COLOURS))
    bars = {
        name: (colour, [sum(v for stage, v in r.seconds.items() if stage in members) for r in timed])
        for name, (colour, members) in groups.items()
    }
    bars = {name: bar for name, bar in bars.items() if any(bar[1])}
    stacked(ax, [r.index for r in timed], [v for _, v in bars.values()], list(bars), [c for c, _ in bars.values()])
    ax.set_ylabel("seconds")


def draw_worked(ax: Any, run: Run) -> None:
    found, whole = who_worked.lanes(run.worked), length(run.worked)
    for place, (lane, _) in enumerate(found):
        for span in run.worked:
            if span.lane != lane:
                continue
            colour = C[STAGE_COLOURS.get(span.what, "grey")]
            ax.barh(place, span.seconds, 0.62, left=span.start, color=colour, alpha=0.4 + 0.6 * span.busy, linewidth=0)
            if span.seconds > NARROW * whole:
                middle = span.start + span.seconds / 2
                ax.text(middle, place, span.what, ha="center", va="center", fontsize=7.5, color=C["ground"])
    ax.set_yticks(range(len(found)), [f"{lane}\n{share:.0%}" for lane, share in found])
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set_xlim(0, whole)
    ax.set_xlabel(f"seconds of round {run.worked_round}")


def charts(run: Run) -> list[Chart]:
    """The charts that have something to show, in reading order."""
    last = f"round {run.pairs_round}"
    judge = "the judge, which is another reward," if run.independent else "the reward that trains"
    parts = [part for part in gold.parts(run.figures) if part != "total"]
    rubric = f"the gold rubric ({', '.join(['total', *parts])})" if parts else "the gold rubric"
    sampled = run.has("score/reward_mean") and (run.independent or not run.has("evaluate/reward"))
    table = [
        (run.has("evaluate/reward"), Chart(
            title="Reward", draw=draw_reward,
            caption=f"Mean reward by {judge} on the same held-out prompts for champion and candidate. They are drawn anew each "
            "round. A hollow point was rejected.")),
        (run.has(*map("evaluate/gold_{}".format, gold.parts(run.figures))), Chart(
            title="Gold", draw=draw_gold,
            caption=f"Mean score of the candidate by {rubric}, which never trains nor gates: on the prompts of the gate, and the total "
            "on the fixed audit set too.")),
        (bool(suites.names(run.figures)), Chart(
            title="Suites", draw=draw_suites,
            caption="Mean score of the candidate on benchmarks between rounds, with its interval by bootstrap. A hollow point was "
            "rejected.")),
        (run.has("evaluate/win_rate"), Chart(
            title="Win rate", draw=draw_win_rate,
            caption="Share of held-out prompts where the candidate's answer has the higher reward. Ties count half. The interval is "
            "by bootstrap. A hollow point was rejected.")),
        (sampled, Chart(
            title="Reward of the candidates", draw=draw_sampled,
            caption="Mean reward of the round's sampled candidates, by the reward that trains.")),
        (run.has("evaluate/length_ratio"), Chart(
            title="Length", draw=draw_length,
            caption="Mean answer length of the candidate policy over that of the champion. Dashed lines are limits of the gate.")),
        (run.has("evaluate/kl_current"), Chart(
            title="KL", draw=draw_kl, caption="KL of the candidate policy, estimated on its own answers, in nats an answer.")),
        (run.has("train/beta"), Chart(
            title="β", draw=draw_beta, caption="β of ε-DPO at the start and at the end of each round's training. It has no unit.")),
        (run.has("train/update_relative_norm"), Chart(
            title="Update", draw=draw_update,
            caption="Norm of the weight change of a round over the norm of the weights. It has no unit.")),
        (run.has("pairs/explicit_margin"), Chart(
            title="Margins by round", draw=draw_margins,
            caption="Means over the kept and over all base pairs. Explicit margins are in reward units, implicit ones in nats a token.")),
        (bool(run.pairs), Chart(
            title=f"Explicit margins, {last}", draw=draw_explicit, counts=True,
            caption="Reward of the chosen minus reward of the rejected response, for each base pair.")),
        (bool(run.pairs), Chart(
            title=f"Implicit margins, {last}", draw=draw_implicit, counts=True,
            caption="Absolute difference of the two mean token log-probabilities under the sampling policy.")),
        (run.has("pairs/base"), Chart(
            title="Pairs", draw=draw_pairs, counts=True,
            caption="Base pairs of each round, one a prompt at most. They are kept for training, or dropped for a reason.")),
        (any(r.seconds for r in run.spread), Chart(
            title="Where the time went", draw=draw_time, caption="Seconds of the stages of each round.")),
        (bool(run.worked), Chart(
            title=f"Who worked when, round {run.worked_round}", draw=draw_worked,
            caption="The stages of the round, by the role that worked, and the share of the round that it worked.")),
    ]  # fmt: skip
    return [chart for shown, chart in table if shown]
