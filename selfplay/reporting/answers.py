"""What policies say to the audit prompts, which are the same in every round: prompts down, policies across.

Rounds with an audit keep their answers in `evaluate`: those of the round's candidate, those of the initial policy as the
same judge scored them, and the prompts. A part of them is read, so a long run costs no more than a short one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from selfplay.errors import InputError
from selfplay.storage import figures, tables
from selfplay.storage.ledger import Store
from selfplay.types import Message, Prompt, Scored

REWARD, INITIAL_REWARD = "evaluate/audit_reward", "evaluate/audit_reward_initial"
COLUMNS = 3  # audited rounds beside the initial policy, where nobody asks for more or fewer


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A policy whose answers are shown."""

    policy: int
    round: int | None  # that trained it; None for the initial policy
    state: str  # of that round; «initial» for the initial policy
    reward: float | None  # mean over the whole audit set

    @property
    def title(self) -> str:
        """«policy 4 (round 4, promoted)»."""
        where = "initial" if self.round is None else f"round {self.round}, {self.state}"
        return f"policy {self.policy} ({where})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """An audit prompt, and what each policy says to it."""

    prompt_id: str
    messages: list[Message]  # empty where the round has not kept its prompts
    said: list[Scored | None]  # one for each column; None where that policy was not asked


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """A part of all answers."""

    columns: list[Column]  # oldest first; none before the first audit
    lines: list[Line]
    prompts: int  # of the audit set
    earlier: int | None  # `before` of the rounds before these; None where there are none


def read(
    store: Store,
    run_dir: Path,
    *,
    before: int | None = None,
    columns: int = COLUMNS,
    rounds: Sequence[int] | None = None,
    start: int = 0,
    prompts: int = 10,
) -> Answers:
    """The answers of the newest `columns` audited rounds before round `before`, or of these `rounds`, and of the initial policy.

    start, prompts: number of the first audit prompt, and how many. Raises InputError for a round that has no audit.
    """
    means = _chosen(store, rounds) if rounds is not None else _audited(store, before, columns)
    if not means:
        return Answers(columns=[], lines=[], prompts=0, earlier=None)
    oldest, newest = min(means), max(means)
    states = {row["round"]: row["state"] for row in store.rounds_between(oldest, newest) if row["round"] in means}
    initial = figures.metrics(store, [INITIAL_REWARD], newest, newest).get(newest, {})
    shown = [Column(policy=0, round=None, state="initial", reward=initial.get(INITIAL_REWARD))]
    shown += [Column(policy=i, round=i, state=states.get(i, "running"), reward=means[i]) for i in sorted(means)]
    # The newest audit decides which prompts there are: another number of them may have been asked before.
    asked = _file(run_dir, newest, "audit")
    if not asked.is_file():
        return Answers(columns=shown, lines=[], prompts=0, earlier=None)
    ids = [row.prompt_id for row in tables.read_slice(asked, Scored, start, prompts)]
    files = [_file(run_dir, newest, "audit_initial"), *(_file(run_dir, i, "audit") for i in sorted(means))]
    said = [_by_prompt(file, ids) for file in files]
    texts = _file(run_dir, newest, "audit_prompts")
    messages = (
        {p.prompt_id: p.messages for p in tables.rows_with(texts, Prompt, "prompt_id", ids)} if texts.is_file() else {}
    )
    return Answers(
        columns=shown,
        lines=[Line(prompt_id=i, messages=messages.get(i, []), said=[column.get(i) for column in said]) for i in ids],
        prompts=tables.count_rows(asked),
        earlier=oldest if rounds is None and _audited(store, oldest, 1) else None,
    )


def about(said: Scored, before: Scored | None) -> str:
    """Score, change of the score, length and end of an answer, in a line."""
    score = "no score" if said.reward is None else f"{said.reward:.3f}"
    if said.reward is not None and before is not None and before.reward is not None and said.reward != before.reward:
        score += f" ({said.reward - before.reward:+.3f})"
    parts = [score, f"{said.n_tokens} tokens"]
    if said.thinking:
        parts.append(f"{said.thinking} of them thoughts")
    if said.finish_reason != "stop":
        parts.append("cut off")
    return " · ".join(parts)


def _audited(store: Store, before: int | None, count: int) -> dict[int, float]:
    """The newest rounds that have an audit, with the mean reward of their policies in it."""
    rows = store.query(
        "SELECT round, value FROM metrics WHERE name = :name AND round < :before ORDER BY round DESC LIMIT :count",
        name=REWARD,
        before=2**62 if before is None else before,
        count=count,
    )
    return {row["round"]: row["value"] for row in rows}


def _chosen(store: Store, rounds: Sequence[int]) -> dict[int, float]:
    found = {}
    for index in rounds:
        reward = store.metric(index, REWARD) if 0 < index < 2**62 else None
        if reward is None:
            last = ", ".join(map(str, sorted(_audited(store, None, 8))))
            raise InputError(
                f"round {index} has no audit",
                f"the last rounds with one: {last}" if last else "evaluate.audit_every says which rounds have one",
            )
        found[index] = reward
    return found


def _file(run_dir: Path, index: int, what: str) -> Path:
    return run_dir / "rounds" / f"{index:04d}" / "evaluate" / f"{what}.parquet"


def _by_prompt(file: Path, prompt_ids: Sequence[str]) -> dict[str, Scored]:
    if not file.is_file():
        return {}
    return {row.prompt_id: row for row in tables.rows_with(file, Scored, "prompt_id", set(prompt_ids))}
