"""The stage `guard` and the probes: is the reward still what it was, and does it still tell good from better?"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from selfplay.errors import GuardError
from selfplay.pairs import selection as pairs
from selfplay.reporting.terminal import Line
from selfplay.rewards import signs as guard
from selfplay.rewards.scorer import name
from selfplay.storage import folders, tables
from selfplay.types import DISAGREEMENT, EXTERNAL, Candidate, Message, Scored

if TYPE_CHECKING:
    from selfplay.rounds.round import Round

PROBED = ("probe_change", "probe_missing")
ALIKE = 0.01  # standard deviations: what a model makes of the same text on another machine
SHOWN = {
    "ties": "pairs of answers with equal rewards (share)",
    "saturation": "rewards at the end of their range (share)",
    "length_correlation": "correlation of reward and length",
    "shift": "shift of the rewards against the last rounds (Kolmogorov-Smirnov distance)",
    "disagreement": "disagreement within the ensemble (standard deviations)",
    "gold_drop": "fall of the gold score from its best while the reward rose",
    "probe_change": "change of the score of a text that did not change (standard deviations)",
    "probe_missing": "texts that did not change, but lost their score or got one (share)",
}


def probes_file(r: Round) -> Path:
    return r.run.dir / "reward" / "probes.json"


def probe(r: Round, candidates: Sequence[Candidate]) -> dict[str, float]:
    """Score the probe texts past the cache; how far they are from their first scores, by the names in the configuration.

    The first time, texts are chosen among `candidates` and their scores kept; so again for a member where the
    configuration names another reward. Empty without probes. Raises GuardError when a change is above its `stop`.
    """
    scorer, path, settings = r.run.reward, probes_file(r), r.config.guard
    if not settings.probes:
        return {}
    sources = [source.which() for source in scorer.sources]
    first = folders.read_json(path) if path.is_file() else None
    items = (
        _texts(r, candidates, settings.probes)
        if first is None
        else [(i["messages"], i["response"]) for i in first["items"]]
    )
    answer = scorer.ask(items, fresh=True)
    now = [[v if math.isfinite(v) else None for v in scores] for scores in answer.scores.tolist()]
    if first is None:
        if r.run.store.metrics_by_round(["score/probe_change"]):  # the file was deleted: a change is meant
            scorer.begin_anew(answer.identities)
            r.run.store.event("guard", "the reward is taken as it is: probes, scale and cache begin anew", r.index)
        _keep(path, r.index, sources, answer.identities, items, now)
        return dict.fromkeys(PROBED, 0.0)
    places = [_place(member, sources, first["sources"]) for member in range(len(sources))]
    changes = [
        (math.inf, 1.0)
        if place is None
        else (guard.probe_change(first["scores"][place], own), guard.probe_missing(first["scores"][place], own))
        for place, own in zip(places, now, strict=True)
    ]
    alike = [change <= ALIKE and not missing for change, missing in changes]
    moved = [place is None or first["sources"][place] != s for place, s in zip(places, sources, strict=True)]
    # another place in the configuration with the same scores is another address of the same reward
    new = [is_moved and not is_alike for is_moved, is_alike in zip(moved, alike, strict=True)]
    kept = [change for change, is_new in zip(changes, new, strict=True) if not is_new]
    found = {name: max((c[i] for c in kept), default=0.0) for i, name in enumerate(PROBED)}
    told = guard.alarms(found, {name: getattr(settings, name) for name in found})
    if stops := [alarm for alarm in told if alarm.level == "stop"]:
        raise GuardError(
            "the reward is not the one this run began with: "
            + "; ".join(_said(alarm) for alarm in stops)
            + f"; weights {_short(first['identities'])} in round {first['round']}, {_short(answer.identities)} now",
            "nothing was trained or promoted on it. Serve the earlier reward model again, then run the same command again; if the change is "
            f"meant, delete {path}, and the next round takes the reward as it is",
        )
    for alarm in told:
        _warn(r, alarm)
    if any(new):
        r.run.store.event("guard", "the configuration names another reward: the probes begin anew", r.index)
    before = [None if new[m] else place for m, place in enumerate(places)]
    if others := [m for m, p in enumerate(before) if p is not None and first["identities"][p] != answer.identities[m]]:
        text = (
            f"the reward server names other weights ({_short([answer.identities[m] for m in others])} instead of "
            f"{_short([first['identities'][before[m]] for m in others])}); the probes' scores changed by "
            f"{max(changes[m][0] for m in others):.3g} standard deviations"
        )
        r.run.store.event("guard", text, r.index)
        r.run.display.warn(text)
    if others or any(moved):
        names = scorer.names(answer.identities)
        known = [
            name(first["identities"][p], first["sources"][p]) if p is not None and alike[m] else names[m]
            for m, p in enumerate(before)
        ]
        scorer.rename(known, names)
        scores = [now[m] if p is None else first["scores"][p] for m, p in enumerate(before)]
        _keep(path, r.index if all(new) else first["round"], sources, answer.identities, items, scores)
    return found


def _place(member: int, sources: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]) -> int | None:
    """Which of the sources `before` a member is compared with: the same one, or the one that had its place and is gone."""
    if sources[member] in before:
        return before.index(sources[member])
    return member if member < len(before) and before[member] not in sources else None


def _texts(r: Round, candidates: Sequence[Candidate], count: int) -> list[tuple[list[Message], str]]:
    """Responses of this round, spread evenly over its prompts; two at least of each, for a judge that compares."""
    messages = {p.prompt_id: p.messages for p in r.drawn}
    by_prompt: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        by_prompt.setdefault(candidate.prompt_id, []).append(candidate)
    groups = list(by_prompt.values())
    each = max(2, math.ceil(count / len(groups)))
    places = sorted({int(i) for i in np.linspace(0, len(groups) - 1, max(1, min(count // each, len(groups))))})
    return [(messages[c.prompt_id], c.text) for i in places for c in groups[i][:each]][:count]


def _keep(
    path: Path,
    index: int,
    sources: list[dict[str, Any]],
    identities: Sequence[str],
    items: Sequence[tuple[list[Message], str]],
    scores: list[list[float | None]],
) -> None:
    path.parent.mkdir(exist_ok=True)
    folders.write_json(
        path,
        {
            "round": index,
            "sources": sources,
            "identities": list(identities),
            "items": [{"messages": messages, "response": response} for messages, response in items],
            "scores": scores,
        },
    )


def _short(identities: Sequence[str]) -> str:
    """The beginning of the weights' hash, and the precision."""
    parts = [identity.split("/") for identity in identities]
    return ", ".join(" ".join([p[0][:12], *p[2:]]) if p[0] else "unnamed" for p in parts)


def watch(r: Round, folder: Path, line: Line) -> Mapping[str, float]:
    """Compute the guard's numbers of a scored round, tell what is above a limit, and raise GuardError for a stop."""
    values = measure(r)
    limits = {sign: getattr(r.config.guard, sign) for sign in values}
    folders.write_json(folder / "guard.json", {k: v if math.isfinite(v) else None for k, v in values.items()})
    # of their own change the probes have told
    alarms = guard.alarms({k: v for k, v in values.items() if k not in PROBED}, limits)
    for alarm in alarms:
        _warn(r, alarm)
    if stops := [alarm for alarm in alarms if alarm.level == "stop"]:
        known = ", ".join(f"{name} {value:.3g}" for name, value in values.items() if math.isfinite(value))
        # the stage leaves no trace but these
        r.run.store.record_metrics(r.index, "guard", {k: v for k, v in values.items() if math.isfinite(v)})
        r.run.store.event("guard", f"stopped before training; all signs: {known}", r.index)
        raise GuardError(
            "the reward looks wrong: " + "; ".join(_said(alarm) for alarm in stops),
            f"nothing was trained on. Look at rounds/{r.index:04d}/score/scored.parquet; then mend the reward and give the "
            "round up (selfplay cancel), or raise the limit to go on with it",
        )
    line.update(text=f"{len(alarms)} warnings" if alarms else "nothing above a limit")
    return values


def measure(r: Round) -> dict[str, float]:
    """The guard's numbers by their names in the configuration; NaN where a number has no meaning yet.

    They are the external reward's; a round that was given up, or that another reward scored, is no measure for this one.
    """
    rows: list[Scored] = r.rows("score", "scored", Scored)
    by_prompt: dict[str, list[Scored]] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt_id, []).append(row)
    cut_off = r.config.pairs.cut_off
    different = [c for group in by_prompt.values() for c in pairs.usable(group, cut_off)]  # equal answers are no tie
    noise, prompts = r.config.reward.noise, [c.prompt_id for c in different]
    rewards, lengths = [_external(c) for c in different], [c.n_tokens for c in different]
    apart = [c.reward_parts[DISAGREEMENT] for c in rows if DISAGREEMENT in c.reward_parts]
    given_up = {row["round"] for row in r.run.store.rounds() if row["state"] == "cancelled"}  # perhaps for its rewards
    ours = _scored_by(r, r.index)  # another reward has another range, and likes other things
    before = [index for index in range(1, r.index) if index not in given_up and _scored_by(r, index) == ours]
    earlier = [v for index in before if index >= r.index - r.config.guard.history for v in _externals(r, index)]
    means = ("score/part_external", "score/reward_mean")
    gold = "evaluate/gold_total_champion"
    metrics = r.run.store.metrics_by_round([*means, gold])
    past = [
        (next(m[name] for name in means if name in m), m[gold])
        for index in before
        if gold in (m := metrics.get(index, {})) and not m.keys().isdisjoint(means)
    ]
    found = {
        "ties": guard.ties(rewards, prompts, noise),
        "saturation": guard.saturation(rewards, noise),
        "length_correlation": guard.length_correlation(rewards, lengths, prompts),
        "shift": guard.shift(earlier, [_external(row) for row in rows]),
        "disagreement": float(np.mean(apart)) if apart else math.nan,
        "gold_drop": guard.gold_drop([v for v, _ in past], [v for _, v in past], r.config.guard.history),
        **{name: r.metric("score", name) for name in PROBED},
    }
    return found


def _external(row: Scored) -> float:
    """What the reward gave, before shaping: that is what may go wrong, and shaping would hide it. NaN where it gave none."""
    return row.reward_parts.get(EXTERNAL, math.nan if row.reward is None else row.reward)


def _externals(r: Round, index: int) -> list[float]:
    path = r.run.dir / "rounds" / f"{index:04d}" / "score" / "scored.parquet"
    if not path.is_file():
        return []
    # two columns: rows have texts and token ids too, more than a controller should hold
    rows = tables.read_columns(path, ("reward", "reward_parts"))
    return [json.loads(parts).get(EXTERNAL, math.nan if reward is None else reward) for reward, parts in rows]


def _scored_by(r: Round, index: int) -> list[str] | None:
    """What gave a round its rewards; None where that is not recorded."""
    path = r.run.dir / "rounds" / f"{index:04d}" / "score" / "reward.json"
    found: list[str] | None = folders.read_json(path).get("names") if path.is_file() else None
    return found


def _said(alarm: guard.Alarm) -> str:
    return f"{SHOWN[alarm.name]} {alarm.value:.3g}, limit {alarm.limit:g} (guard.{alarm.name}.{alarm.level})"


def _warn(r: Round, alarm: guard.Alarm) -> None:
    text = f"guard: {_said(alarm)}"
    r.run.store.event("guard", text, r.index)
    r.run.display.warn(f"round {r.index}: {text}")
