"""The stage `guard`: does the reward still tell good from better? What looks wrong is told, or stops the round."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from selfplay.config import GuardConfig
from selfplay.errors import GuardError
from selfplay.methods import signs
from selfplay.progress import Line
from selfplay.rewards.alarms import alarms
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
    found = alarms({name: value for name, value in values.items() if name not in PROBED}, limits)
    for alarm in found:
        warn(f"guard: {alarm}")
    if stops := [alarm for alarm in found if alarm.level == "stop"]:
        stopped(known)
        raise GuardError(
            f"the reward looks wrong: {'; '.join(map(str, stops))}",
            f"nothing was trained on. Look at {scored}; then mend the reward and give the round up (selfplay cancel), or "
            "raise the limit to go on with it",
        )
    line.update(text=f"{len(found)} warnings" if found else "nothing above a limit")
    return values


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

    They are the external reward's, before shaping, which would hide what goes wrong.
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
    }
