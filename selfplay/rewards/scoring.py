"""The stage `score`: an external reward for each candidate.

Candidates are scored in shards, whose scores stay on disk as they came (`shards`). Some may be there before the stage begins,
from while other candidates were sampled (`early`). When all are there, an ensemble's scores become one reward on the run's
scale, and the reward is shaped. A reward that is missing stays missing: it is never a number.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from selfplay.config import RewardConfig, ShapingConfig
from selfplay.errors import GuardError, RewardError
from selfplay.methods import shaping
from selfplay.progress import Line
from selfplay.rewards.prefetch import prefetched
from selfplay.rewards.scorer import Answer, Scorer
from selfplay.rewards.shards import Floats, Shards, contents
from selfplay.rewards.texts import Item, Texts
from selfplay.stage import Metrics, Stage
from selfplay.storage import answers, folders, tables
from selfplay.storage.candidates import CandidateColumns, read_candidates
from selfplay.types import DISAGREEMENT, EXTERNAL, MEMBER, Candidate, Reward

SCORE = Stage(
    name="score",
    reads=("prompts/prompts.parquet", "generate/candidates.parquet"),
    writes=("scored.parquet", "reward.json"),
    unit="candidates",
    log="reward",
    space=lambda config, weights: (4 << 20) + config.prompts.per_round * config.generate.candidates * 256,
)

Columns = dict[str, Floats]  # parts of rewards by name, (N,) each, NaN where a candidate has no such part


def score(
    out: Path,
    line: Line,
    *,
    prompts: Path,
    candidates: Path,
    scorer: Scorer,
    settings: RewardConfig,
    shards: Callable[[object], Path],
    shard_items: int,
    probe: Callable[[], Metrics],
    breathe: Callable[[str], None],
    record_event: Callable[[str, str], None],
) -> Metrics:
    """Score all candidates and write scored.parquet (keys and rewards) and reward.json (who scored).

    shards: the folder for scored shards, by who scores. shard_items: candidates in a shard. probe: asks whether the reward is still the one that this run began with, before and after all are scored;
    raises GuardError where it is not, and then everything that the other one may have scored meanwhile is forgotten.
    Raises RewardError when more than a share `reward.max_missing` has no score: they are asked for again by the next call.
    """
    identities = scorer.identities
    known = Shards(folder=shards(scorer.who(identities)), scorer=scorer, identities=identities)
    columns = read_candidates(candidates)

    def probed() -> Metrics:
        try:
            return probe()
        except GuardError:
            # A reward that was exchanged in mid-stage may be seen only by the next start.
            shutil.rmtree(known.folder, ignore_errors=True)
            with Texts(prompts, candidates) as texts:
                for rows in _ranges(len(columns.index), shard_items):
                    scorer.forget(identities, texts.read(rows))
            raise

    changes = [probed()]
    inside = contents(candidates, shard_items)
    given, reasons = _given(known, inside, prompts, candidates, shard_items, line, breathe)
    changes.append(probed())
    missing = np.asarray(np.isnan(given).any(axis=0))
    try:
        require(missing, settings.max_missing, reasons, scorer.logs)
    except RewardError:
        for content, rows in zip(inside, _ranges(len(missing), shard_items), strict=True):
            if missing[rows.start : rows.stop].any():
                known.drop(content)
        raise
    reward, parts = _combined(scorer, identities, given)
    reward, parts = shape(reward, parts, columns, candidates, settings.shaping)
    _write(out / "scored.parquet", candidates, reward, parts)
    folders.write_json(
        out / "reward.json",
        {"members": scorer.members, "identities": identities, "names": scorer.described(identities)},
    )
    if reasons:
        record_event("score", f"answers without a score: {said(reasons)}")
    found = metrics(reward, parts, reasons) | {name: max(c[name] for c in changes) for name in changes[0]}
    line.update(text=f"mean reward {found.get('reward_mean', math.nan):.3f}")
    return found


def _given(
    known: Shards,
    inside: Sequence[str],
    prompts: Path,
    candidates: Path,
    shard_items: int,
    line: Line,
    breathe: Callable[[str], None],
) -> tuple[Floats, Counter[str]]:
    """Every member's scores (M, N) as they came, NaN where there is none, and why. Shards that are scored are not asked for
    again; `inside`: the content of each shard."""
    there: list[Future[tuple[Floats, Counter[str]]]] = []

    def kept(content: str, answer: Answer | None) -> tuple[Floats, Counter[str]]:
        if answer is not None:
            known.keep(content, answer)
        return known.read(content)

    with Texts(prompts, candidates) as texts, ThreadPoolExecutor(1, "scores") as beside:

        def shards() -> Iterator[tuple[str, range, list[Item] | None]]:
            for content, rows in zip(inside, _ranges(tables.count_rows(candidates), shard_items), strict=True):
                yield content, rows, None if known.has(content) else texts.read(rows)

        # While the reward is at a shard, the next one is read, and the scores of the last one are written.
        with contextlib.closing(prefetched(shards())) as wanted:
            for content, rows, items in wanted:
                answer = None
                if items is not None:
                    breathe("shard")

                    def progress(done: int, start: int = rows.start) -> None:
                        line.update(done=start + done, text="")

                    answer = known.ask(items, progress)
                for last in there[-1:]:
                    last.result()
                there.append(beside.submit(kept, content, answer))
                line.update(done=rows.stop, text="")
    found = [shard.result() for shard in there]
    scores = [of_shard for of_shard, _ in found] or [np.zeros((len(known.identities), 0))]
    return np.concatenate(scores, axis=1), sum((why for _, why in found), Counter[str]())


def _ranges(count: int, shard_items: int) -> list[range]:
    """The rows of each shard of so many candidates."""
    return [range(start, min(start + shard_items, count)) for start in range(0, count, shard_items)]


def _combined(scorer: Scorer, identities: tuple[str, ...], given: Floats) -> tuple[Floats, Columns]:
    """One reward (N,) from the members' scores (M, N), and the parts that are to be recorded: scores and disagreement."""
    if not scorer.members:
        return given[0], {}
    found = scorer.combine(identities, given)
    assert found.disagreement is not None, "an ensemble tells its disagreement"
    parts = {MEMBER + name: own for name, own in zip(scorer.members, given, strict=True)}
    apart = np.where(np.isfinite(found.rewards), found.disagreement, np.nan)
    return np.where(np.isfinite(found.rewards), found.rewards, np.nan), parts | {DISAGREEMENT: apart}


def shape(
    reward: Floats, parts: Columns, columns: CandidateColumns, candidates: Path, settings: ShapingConfig
) -> tuple[Floats, Columns]:
    """The shaped reward (N,), which is the sum of its parts `external` and those that `settings` names, and all parts."""
    if not settings.active:
        return reward, parts
    terms: Columns = {EXTERNAL: reward}
    if settings.length_control:
        by_prompt = columns.prompt.tolist()
        terms["length_control"] = shaping.length_control(reward, columns.n_tokens, by_prompt, settings.length_control)
    if settings.length_penalty:
        terms["length_penalty"] = shaping.length_penalty(
            columns.n_tokens, settings.length_penalty, settings.length_free
        )
    if settings.repetition_penalty:
        repeated = [
            shaping.repetition(*answers.flat_ids(table["token_ids"]), settings.repetition_ngram)
            for table in tables.each_group(candidates, ("token_ids",), row_type=Candidate)
        ]
        shares = np.concatenate(repeated)
        if settings.repetition_beyond_length:
            shares = shaping.beyond_length(shares, columns.n_tokens, columns.prompt.tolist(), columns.whole)
        terms["repetition_penalty"] = -settings.repetition_penalty * shares
    if settings.cut_off_penalty:
        ends = ["stop" if whole else "length" for whole in columns.whole.tolist()]
        terms["cut_off_penalty"] = shaping.cut_off_penalty(ends, settings.cut_off_penalty)
    there = np.isfinite(reward)
    terms = {name: np.where(there, term, np.nan) for name, term in terms.items()}
    total = np.zeros(len(reward))
    for term in terms.values():
        total = total + term
    return np.where(there, total, np.nan), parts | terms


def _write(path: Path, candidates: Path, reward: Floats, parts: Columns) -> None:
    """Write keys, rewards and parts, a row group of the candidates at a time."""
    start = 0
    with tables.writing(path, Reward) as file:
        for keys in tables.each_group(candidates, ("prompt_id", "index"), row_type=Candidate):
            end = start + keys.num_rows
            values = reward[start:end]
            table = keys.append_column("reward", pa.array(values, mask=np.isnan(values)))
            file.table(table.append_column("reward_parts", pa.array(_texts(parts, start, end), pa.string())))
            start = end


def _texts(parts: Columns, start: int, end: int) -> list[str]:
    """The parts of each row start … end − 1 as JSON text."""
    if not parts:
        return ["{}"] * (end - start)
    values = {name: parts[name][start:end].tolist() for name in sorted(parts)}
    return [
        json.dumps({name: column[i] for name, column in values.items() if not math.isnan(column[i])})
        for i in range(end - start)
    ]


def require(missing: NDArray[np.bool_], max_missing: float, reasons: Counter[str], logs: Sequence[Path]) -> None:
    """Raise RewardError when more than a share `max_missing` is missing. `logs`: of the servers that are ours."""
    count = int(missing.sum())
    if count > max_missing * len(missing):
        why = f": {said(reasons)}" if reasons else ""
        raise RewardError(
            f"{count} of {len(missing)} answers have no reward (limit: a share of {max_missing:g}, reward.max_missing){why}",
            "nothing was trained on" + (f"; see {', '.join(map(str, logs))}" if logs else ""),
        )


def said(reasons: Counter[str]) -> str:
    """The commonest reasons, in a line; those that differ only behind a colon, such as replies of a judge, as one."""
    kinds: dict[str, Counter[str]] = {}
    for reason, count in reasons.items():
        kinds.setdefault(reason.partition(": ")[0], Counter())[reason] += count
    most = sorted(kinds.items(), key=lambda kind: -kind[1].total())[:3]
    return ", ".join(f"{of.total()} × {next(iter(of)) if len(of) == 1 else kind}" for kind, of in most)


def metrics(reward: Floats, parts: Columns, reasons: Counter[str]) -> Metrics:
    """`missing`: candidates without a reward. `unparsable`: scores of members that are missing for want of a verdict."""
    there = np.isfinite(reward)
    unparsable = sum(count for reason, count in reasons.items() if "no verdict" in reason)
    found: Metrics = {"missing": float((~there).sum()), "unparsable": float(unparsable)}
    if there.any():
        found |= {"reward_mean": float(reward[there].mean()), "reward_std": float(reward[there].std())}
        found |= {f"part_{name}": float(np.mean(values[there])) for name, values in parts.items()}
    return found
