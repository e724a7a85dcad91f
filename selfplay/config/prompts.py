"""The sections `prompts`, `breadth` and `evolve`: where prompts come from, which are used, and how new ones are made."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from selfplay.config.base import Positive, Section, Share


class PromptsConfig(Section):
    source: str
    """JSONL or Parquet file with `prompt` or `messages` (and optional `meta` and reference), or a Hub dataset id."""
    split: str = "train"
    """Split of a Hub dataset."""
    column: str | None = None
    """Column of a Hub dataset that holds the prompt (a string or a list of messages)."""
    heldout: str | None = None
    """File of held-out prompts; without one a share of `source` is held out."""
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of `source` that is held out, by hash, when `heldout` is not set."""
    audit_fraction: Share = 0.4
    """Share of the held-out prompts kept apart as the audit set, which never gates, when `audit` is not set."""
    audit: str | None = None
    """File of the prompts of the audit set; without one it is a share of the held-out prompts."""
    benchmarks: list[str] = []
    """Files of public benchmarks (`prompt`, `messages` or `question`): what shares n-grams with one of their prompts, as
    `leak_ngram` and `leak_overlap` say, is left out of the training pool and counted."""
    per_round: Positive = 192
    """Prompts drawn in a round."""
    max_tokens: Positive = 256
    """Longest rendered prompt (tokens); longer ones are set aside and counted."""
    at_end: Literal["reshuffle", "stop"] = "reshuffle"
    """What happens when every prompt was drawn once."""
    leak_ngram: Positive = 8
    """Words of the n-grams by which a prompt that joins later is compared with held-out prompts, and every prompt with those
    of `benchmarks`."""
    leak_overlap: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of n-grams in common from which on a prompt that joins later meets a held-out one, or any prompt one of a
    benchmark, and is refused."""


class BreadthConfig(Section):
    method: Literal["none", "clusters"] = "none"
    """How a draw is compressed: not at all, or to representatives of clusters of its prompts' embeddings."""
    oversample: Annotated[float, Field(ge=1)] = 2.0
    """Prompts drawn for each one that is kept; those passed over count as drawn."""
    clusters: Positive | None = None
    """Clusters of a draw; by default one for each prompt that is kept, 1024 at most. Of fewer each keeps several."""
    embedding: Annotated[str, Field(min_length=1)] = "policy"
    """`policy`: its last hidden states; else the folder or Hub id of a sentence-transformers model."""
    pooling: Literal["mean", "last"] = "mean"
    """Of the policy's states: the mean over a prompt, or the last one, from which it answers: for a policy that has learned
    nothing about prompts, as one that was trained from scratch on answers alone."""


class EvolveConfig(Section):
    every: Annotated[int, Field(ge=0)] = 0
    """Rounds between rewrites of prompts, whose results join the pool; 0: never."""
    top: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of a round's prompts that are rewritten: those of the highest alignment potential."""
    max_ratio: Annotated[float, Field(ge=1)] = 5.0
    """Longest of a prompt and its rewrite over the shorter one (characters)."""
    rewriter: Annotated[str, Field(pattern=r"^(policy|[\w.]+:\w+)$")] = "policy"
    """Who rewrites: the policy, or a function `module:function` of (messages, strategy, seed) that returns a text."""
