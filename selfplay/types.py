"""Records that pass between stages. Field names are the column names on disk (Parquet)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Message = dict[str, str]  # {"role": …, "content": …}
Split = Literal["train", "heldout", "audit"]
MEMBER = "member_"  # before a member's name among reward_parts: its own score
DISAGREEMENT = "disagreement"  # among reward_parts: standard deviation of an ensemble's normalised scores
EXTERNAL = "external"  # among reward_parts: the reward before shaping
KeptBecause = Literal["base", "depth"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    prompt_id: str  # content hash of the messages
    messages: list[Message]
    prompt_ids: list[int]  # rendered once by the policy's chat template; vLLM and the trainer get these ids
    split: Split
    meta: dict[str, Any] = field(default_factory=dict)  # gold answers and such: held-out rows only
    parent: str | None = None  # prompt_id of the prompt it was made from
    source: str = ""  # file, Hub id or what else it came from
    root: str | None = None  # prompt_id of its oldest ancestor, where that is not its parent
    joined: int | None = None  # first round that may draw it; None: it was there from the start
    reference: str | None = None  # what a reward may check an answer by (prompts/references.py)

    @property
    def ancestor(self) -> str:
        """prompt_id of the oldest ancestor, by which train and held-out prompts are split; its own where it has none."""
        return self.root or self.parent or self.prompt_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """One prompt of a draw that was compressed to its representatives."""

    prompt_id: str
    cluster: int
    distance: float  # to the centre of its cluster, in the space of the embeddings
    kept: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrite:
    """A prompt rewritten from another one, and what became of it."""

    parent: str  # prompt_id
    strategy: str
    rewriter: str  # «policy 3», or the function's name
    text: str  # the new last message; where none was found, all that was said
    n_tokens: int  # sampled for it; 0 where no model was asked
    prompt_id: str | None  # of the prompt that joins the pool
    rejected_because: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    prompt_id: str
    index: int  # 0 … K−1 within its prompt
    text: str  # decoded without special tokens, hidden thoughts left out: what the reward model reads
    token_ids: list[int]  # as sampled, thoughts and the stop token included
    logp: float  # nats, summed over token_ids, at temperature 1
    n_tokens: int
    finish_reason: str  # stop | length; also «length» where its thoughts never end
    policy: int  # version that sampled it
    digest: int | None = None  # the same for the same token ids, see storage/candidates.py; None in older files
    thinking: int | None = None  # of its tokens, those up to the end of its thoughts; None where nobody looked for any


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """The reward of a candidate. The candidate itself lies in the artifacts of `generate`, in the same order."""

    prompt_id: str
    index: int
    reward: float | None  # None: this item could not be scored
    reward_parts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """An answer to a held-out prompt, with the judge's score and the parts of the gold rubric."""

    prompt_id: str
    index: int
    text: str
    token_ids: list[int]
    logp: float
    n_tokens: int
    finish_reason: str
    policy: int
    reward: float | None  # None: this item could not be scored
    reward_parts: dict[str, float] = field(default_factory=dict)
    thinking: int | None = None  # as in Candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceLogp:
    prompt_id: str
    index: int
    logp: float  # nats, summed over the candidate's token_ids, under the reference


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedPair:
    """A pair without its texts and token ids: all that selection and depth decide by."""

    prompt_id: str
    chosen_index: int
    rejected_index: int
    chosen_reward: float
    rejected_reward: float
    chosen_logp: float  # nats, summed, under the policy that sampled
    rejected_logp: float
    explicit_margin: float  # reward units, > 0
    implicit_margin: float  # |r̂_w − r̂_l|
    implicit_signed: float  # r̂_w − r̂_l
    potential: float | None = None  # alignment potential, in standard deviations
    cluster: int | None = None
    closeness: float | None = None  # cosine to the centre of its gradient cluster
    kept_because: str | None = None  # base | depth
    dropped_because: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair(RankedPair):
    """A whole pair, as it is on disk: it stays readable when the candidates are gone."""

    prompt_ids: list[int]
    chosen: str
    rejected: str
    chosen_ids: list[int]
    rejected_ids: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairGradient:
    prompt_id: str
    cluster: int | None  # None: the gradient is 0 or not finite
    closeness: float | None  # cosine to the centre of the cluster, or of the others in it (depth.closeness)
    norm: float  # of the feature, which estimates that of the gradient


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    version: int
    path: str  # folder of a plain Hugging Face checkpoint
    parent: int | None
    round: int  # the round that trained it; 0 for the initial policy
    beta: float | None  # β at the end of training
    reference: int | None  # version of the reference it was trained against


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    promoted: bool
    reasons: list[str]  # why not; empty when promoted
    independent: bool  # the judge is another reward than the one that trains


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundReport:
    round: int
    outcome: Literal["promoted", "rejected", "skipped", "cancelled"]
    policy: int  # version that serves after the round
    metrics: dict[str, float]  # flat stage/name
    seconds: dict[str, float]  # by stage
    reasons: list[str]
