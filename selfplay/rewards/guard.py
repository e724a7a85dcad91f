"""The stage `guard`: does the reward still tell good from better, and would the pairs teach more than a length?

What looks wrong is told before anything is trained, or stops the round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from selfplay.config import GuardConfig
from selfplay.errors import GuardError
from selfplay.methods import signs
from selfplay.progress import Line
from selfplay.rewards.alarms import Alarm, alarms
from selfplay.rewards.early_signs import NAMES as EARLY
from selfplay.rewards.early_signs import advice, early_signs
from selfplay.rewards.probes import PROBED, Say
from selfplay.stage import Metrics, Stage
from selfplay.storage import folders
from selfplay.storage.candidates import first_of_equals, read_candidates, read_external, read_rewards
from selfplay.types import DISAGREEMENT

GUARD = Stage(
    name="guard",
    reads=("generate/candidates.parquet", "score/scored.parquet", "score/reward.json"),
    writes=("guard.json",),
    log="reward",
)


def guard(
    out: Path,
    line: Line,
    *,
    candidates: Path,
    scored: Path,
    earlier: Sequence[Path],
    past: Sequence[tuple[float, float]],
    probed: Mapping[str, float],
    settings: GuardConfig,
    noise: float,
    cut_off: str,
    warn: Say,
    stopped: Callable[[Metrics], None],
) -> Metrics:
    """Compute the guard's numbers of a scored round, tell what is above a limit, and raise GuardError for a stop.

    earlier: scored.parquet of the last rounds (`guard.history`) that the same reward scored. past: mean reward and mean gold
    score of the policy that sampled, one of each for every earlier round that has both. probed: the metrics of the probes.
    noise: `reward.noise`. cut_off: `pairs.cut_off`. stopped: called with the numbers before a stop, since a stage that stops
    leaves no other trace of them.
    """
    values = measure(candidates, scored, earlier, past, noise, cut_off, settings.history)
    values |= {name: probed.get(name, math.nan) for name in PROBED}
    known = {name: value for name, value in values.items() if math.isfinite(value)}
    folders.write_json(out / "guard.json", {name: known.get(name) for name in values})
    limits = {sign: getattr(settings, sign) for sign in values}
    # The probes have told of their own change.
    ours = {name: value for name, value in values.items() if name not in PROBED}
    found = alarms(ours, limits, lambda name, value: advice(name, value, cut_off))
    for alarm in found:
        warn(f"guard: {alarm}")
    if stops := [alarm for alarm in found if alarm.level == "stop"]:
        stopped(known)
        raise GuardError(
            f"the {_wrong(stops)} wrong: {'; '.join(map(str, stops))}",
            f"nothing was trained on. Look at {scored}; then mend what the message names and give the round up (selfplay "
            "cancel), or raise the limit to go on with it",
        )
    line.update(text=f"{len(found)} warning{'s' if len(found) > 1 else ''}" if found else "nothing above a limit")
    return values


def _wrong(stops: Sequence[Alarm]) -> str:
    """What the alarms that stop a round are about."""
    if all(alarm.name in EARLY for alarm in stops):
        return "answers look"
    return "answers and the reward look" if any(alarm.name in EARLY for alarm in stops) else "reward looks"


def measure(
    candidates: Path,
    scored: Path,
    earlier: Sequence[Path],
    past: Sequence[tuple[float, float]],
    noise: float,
    cut_off: str,
    window: int,
) -> Metrics:
    """The guard's numbers by their names in the configuration; NaN where a number has no meaning yet.

    Those about the reward are the external reward's, before shaping, which would hide what goes wrong.
    """
    columns = read_candidates(candidates)
    rewards = read_rewards(scored, columns)
    external = rewards.external
    # Equal answers are no tie, and those that can be in no pair do no harm.
    different = first_of_equals(
        columns, np.isfinite(rewards.reward) & (columns.n_tokens > 0) & (columns.whole | (cut_off == "reject"))
    )
    prompts = columns.prompt[different].tolist()
    apart = rewards.parts.get(DISAGREEMENT, np.array([]))
    apart = apart[np.isfinite(apart)]
    before = [read_external(path) for path in earlier]
    return {
        "ties": signs.ties(external[different], prompts, noise),
        "saturation": signs.saturation(external[different], noise),
        "length_correlation": signs.length_correlation(external[different], columns.n_tokens[different], prompts),
        "shift": signs.shift(np.concatenate(before) if before else [], external),
        "disagreement": float(apart.mean()) if apart.size else math.nan,
        "gold_drop": signs.gold_drop([reward for reward, _ in past], [gold for _, gold in past], window),
        **early_signs(candidates, columns, rewards, cut_off),
    }
