"""What the HTTP API answers: one model for each thing, also what the page reads. Times are UTC, ISO 8601."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Number = Annotated[int, Field(ge=0, le=2**31 - 1)]  # of a round, a row, a policy


class Answer(BaseModel):
    # What is not finite has no form in JSON: it becomes null.
    model_config = ConfigDict(use_attribute_docstrings=True, ser_json_inf_nan="null")


class Problem(Answer):
    """Why a request was refused."""

    detail: str
    hint: str = ""
    """What to do about it."""


class Service(Answer):
    """What the service does now."""

    state: str
    """starting, running, waiting, paused, retrying, ended or stopped."""
    why: str = ""
    since: str | None = None
    next_round: str | None = None
    """When the next round starts, where that is known."""
    round: int | None = None
    """The round that runs, and below it the stage with its progress."""
    stage: str | None = None
    done: int = 0
    total: int | None = None
    unit: str = ""
    text: str = ""
    seconds: float = 0.0
    """How long the stage has been running."""


class RunSummary(Answer):
    """The run at a glance."""

    name: str
    created: str | None
    service: Service
    current_policy: int | None
    rounds: dict[str, int]
    """How many rounds are in each state (running, promoted, rejected, skipped, cancelled)."""
    orders_pending: int
    restarts: int
    """Times that a child was started again: the engine after it died or could not be shown to have new weights, a reward
    server, the trainer."""
    gate_independent: bool
    """Whether another reward judges than trains: by the newest verdict, before one by the configuration."""
    free_bytes: int
    """Free space on the disk of the run folder."""
    webhook: str
    """What is wrong with the webhook of the alerts; empty where nothing is known to be."""
    version: str
    """Of selfplay."""


class Round(Answer):
    """One round of the run."""

    round: int
    state: str
    """running, promoted, rejected, skipped or cancelled."""
    started: str
    ended: str | None
    sampler: int
    """Policy that samples it."""
    policy: int | None
    """Policy that serves after it."""
    reasons: list[str]
    """Why it was rejected, skipped or cancelled."""
    seconds: float
    """Of all its finished stages."""
    metrics: dict[str, float]
    """Named stage/name; in a list of rounds only those that sum a round up."""


class Stage(Answer):
    """A finished stage of a round."""

    stage: str
    ended: str
    seconds: float


class RoundDetail(Round):
    """A round with all its metrics and stages."""

    stages: list[Stage]
    fingerprint: str
    """SHA-256 of the configuration it ran with."""
    pairs: dict[str, int]
    """Base pairs by why they were kept or dropped."""
    deleted: list[str]
    """What retention has deleted of it, in sentences."""


class Histogram(Answer):
    """Base pairs of a round by one of their values."""

    edges: list[float]
    """One more than there are bins."""
    kept: list[int]
    dropped: list[int]


class PairRow(Answer):
    """A base pair in the index; its texts are under `/api/pairs/{round}/{row}`."""

    round: int
    row: int
    prompt_id: str
    explicit_margin: float
    """Reward of the chosen minus reward of the rejected response."""
    implicit_margin: float | None
    """Absolute difference of their implicit rewards; null where it is not a number."""
    potential: float | None
    """Alignment potential, in standard deviations; null for pairs that did not enter the statistics."""
    kept_because: str | None
    dropped_because: str | None


class PairPage(Answer):
    """A page of pairs."""

    pairs: list[PairRow]
    """May be fewer than asked for, even none, before the end."""
    next: str | None
    """Cursor of the next page (`after`); null at the end."""
    deleted: str
    """Which pairs retention has deleted from the lists, in a sentence; empty where none of those that were asked for."""


class PromptRow(Answer):
    """A prompt of the pool."""

    number: int
    """Its place in the pool, from 0 in the order they came."""
    prompt_id: str
    messages: list[dict[str, str]]
    tokens: int
    """Of the prompt as it is given to the policy."""
    split: str
    """train, heldout (asked at the gate) or audit (never gates)."""
    source: str
    parent: str | None
    """prompt_id of the prompt it was made from."""
    joined: int | None
    """First round that may draw it; null: it was there from the start."""


class PromptPage(Answer):
    """A page of the pool."""

    prompts: list[PromptRow]
    total: int
    """Prompts of the pool, all splits together."""
    next: int | None
    """Where the next page begins (`after`); null at the end."""


class Response(Answer):
    """One side of a pair."""

    text: str
    reward: float
    logp: float
    """Nats, summed over its tokens, under the policy that sampled it."""
    tokens: int


class PairDetail(PairRow):
    """A pair with its texts and every number that decided on it."""

    messages: list[dict[str, str]]
    """The prompt; empty where its artifact is gone."""
    chosen: Response
    rejected: Response
    implicit_signed: float
    cluster: int | None
    """Cluster of its gradient; null where the round had no gradient clusters."""
    closeness: float | None
    """Cosine to the centre of that cluster."""
    added: int
    """Further pairs that the prompt got in the stage `depth`."""
    rank: int | None
    """By alignment potential in its round, where 1 is the highest; null also where retention has deleted the ranking."""
    ranked: int
    """Pairs in that ranking."""
    lowest_kept: float | None
    """The lowest potential that was kept in the round."""
    settings: dict[str, Any]
    """What selected the pairs of the round: the section `pairs` of its configuration, and the reward's noise."""


class AnswerColumn(Answer):
    """A policy whose answers to the audit prompts are shown."""

    policy: int
    round: int | None
    """The round that trained it; null for the initial policy."""
    state: str
    """Of that round: promoted, rejected, running; initial for the initial policy."""
    reward: float | None
    """Mean over the audit set, by the judge of that round; of the initial policy by that of the newest one."""


class Said(Answer):
    """What a policy says to a prompt."""

    text: str
    """Without hidden thoughts."""
    reward: float | None
    """By the judge; null where it gave none."""
    tokens: int
    thinking: int | None
    """How many of the tokens are thoughts; null where nobody looked for any."""
    finish_reason: str
    """`stop`, or `length` where it was cut off or its thoughts never end."""
    about: str
    """Score, its change from the column before, length and end, in words."""


class AnswerRow(Answer):
    """An audit prompt with what each policy says to it."""

    prompt_id: str
    messages: list[dict[str, str]]
    """Empty where the round has not kept its prompts."""
    answers: list[Said | None]
    """One for each column; null where that policy was not asked."""


class AnswerPage(Answer):
    """Answers to the audit prompts: prompts down, policies across."""

    columns: list[AnswerColumn]
    """The initial policy and some audited rounds, oldest first."""
    prompts: list[AnswerRow]
    total: int
    """Prompts of the audit set."""
    next: int | None
    """Where the next prompts begin (`after`); null at the end."""
    earlier: int | None
    """`before` of the audited rounds before these; null where there are none."""


class PolicyRow(Answer):
    """A policy of the run."""

    version: int
    round: int
    """The round that trained it; 0 for the initial policy."""
    parent: int | None
    reference: int | None
    beta: float | None
    """β at the end of its training."""
    state: str
    """initial, candidate, promoted or rejected."""
    weights: bool
    """False once retention deleted them."""
    pinned: bool
    current: bool
    """Whether it serves."""


class Event(Answer):
    """Something that happened."""

    id: int
    time: str
    round: int | None
    kind: str
    text: str


class OrderRow(Answer):
    """An order to the service, and what came of it."""

    id: int
    time: str
    origin: str
    """Who gave it: cli, api, page, signal."""
    kind: str
    arguments: dict[str, Any]
    state: str
    """pending, done or refused."""
    ended: str | None
    result: str | None


class OrderGiven(Answer):
    """An order that waits for the service."""

    order: int
    """Its number, for `GET /api/orders`."""


class Health(Answer):
    status: str
    detail: str = ""
