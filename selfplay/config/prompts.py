"""The sections `prompts`, `breadth` and `evolve`: where prompts come from, which are used, and how new ones are made."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from selfplay.config.base import Positive, Section, Share
from selfplay.kinds import FORMATS, one_of


class ColumnsConfig(Section):
    """Where a row has what is read of it, for a file whose format is not recognised. A name with points leads into objects."""

    prompt: str | None = None
    """Column of the prompt. It may hold a text, a list of messages, or a whole conversation, whose last answer is
    dropped."""
    system: str | None = None
    """Column of a system message; by default `system`, `system_prompt` or `system_message`."""
    meta: str | list[str] = []
    """Column, or columns, that become the `meta` of a held-out prompt; by default `meta`."""
    reference: str | None = None
    """Column by which a reward may check an answer; by default `reference`, `answer`, `solution` or `ground_truth`."""


class PromptsConfig(Section):
    source: str
    """A file, a folder of files, a glob, or a Hub dataset id. The format of the rows is recognised (docs/prompts.md)."""
    config: str | None = None
    """Configuration of a dataset that has several."""
    split: str = "train"
    """Split of a dataset on the Hub, or of a folder that is a copy of one."""
    columns: ColumnsConfig = ColumnsConfig()
    """Names of the columns, for a format that is not recognised. `prompts.column: x` is `prompts.columns: {prompt: x}`."""
    format: Annotated[str, AfterValidator(one_of(FORMATS))] | None = None
    """Read every row as this format. By default the format of each row is recognised. docs/prompts.md lists the
    formats."""
    filter: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] | None = None
    """Function `module:function` that is given a row and returns whether it is taken."""
    heldout: str | None = None
    """Where held-out prompts come from, read in the same way as `source`. Without this setting a share of `source` is
    held out."""
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of `source` that is held out, by hash, when `heldout` is not set."""
    audit_fraction: Share = 0.4
    """Share of the held-out prompts kept apart as the audit set, which never gates, when `audit` is not set."""
    audit: str | None = None
    """File with the prompts of the audit set. Without one the audit set is a share of the held-out prompts."""
    benchmarks: list[str] = []
    """Files of public benchmarks, in any format that is recognised. A prompt that shares too many n-grams with one of
    theirs is left out of the training pool and counted. `leak_ngram` and `leak_overlap` say how many are too many."""
    per_round: Positive = 192
    """Prompts drawn in a round."""
    max_tokens: Positive = 256
    """Tokens that a rendered prompt may have. Longer prompts are set aside and counted."""
    at_end: Literal["reshuffle", "stop"] = "reshuffle"
    """What happens when every prompt was drawn once."""
    leak_ngram: Positive = 8
    """Words of the n-grams by which a prompt that joins later is compared with held-out prompts, and every prompt with those
    of `benchmarks`."""
    leak_overlap: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of n-grams in common from which on a prompt is refused: one that joins later beside a held-out prompt, and
    any prompt beside one of a benchmark."""

    @model_validator(mode="before")
    @classmethod
    def _one_column(cls, given: Any) -> Any:
        if isinstance(given, dict) and "column" in given:
            given = dict(given)
            columns = given.pop("column")
            if columns is not None:
                given["columns"] = {"prompt": columns, **(given.get("columns") or {})}
        return given


class BreadthConfig(Section):
    method: Literal["none", "clusters"] = "none"
    """Which of the drawn prompts are used. `none` uses all. `clusters` puts their embeddings into clusters and uses a
    representative of each."""
    oversample: Annotated[float, Field(ge=1)] = 2.0
    """Prompts that are drawn for each one that is kept. Those that are passed over count as drawn."""
    clusters: Positive | None = None
    """Clusters of a draw. The default is one for each prompt that is kept, and 1024 at most. If there are fewer
    clusters than prompts to keep, each cluster keeps several."""
    embedding: Annotated[str, Field(min_length=1)] = "policy"
    """What embeds a prompt: `policy` (its last hidden states), or the folder or Hub id of a sentence-transformers
    model."""
    pooling: Literal["mean", "last"] = "mean"
    """What is taken of the policy's states: their `mean` over a prompt, or the `last` one, from which the policy
    answers. `last` is for a policy that has learned nothing about prompts, such as one that was trained from scratch on
    answers alone."""


class EvolveConfig(Section):
    every: Annotated[int, Field(ge=0)] = 0
    """Rounds between two rewrites of prompts. The rewritten prompts join the pool. 0: never."""
    top: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of a round's prompts that are rewritten. They are those with the highest alignment potential."""
    max_ratio: Annotated[float, Field(ge=1)] = 5.0
    """How many times as long the longer one of a prompt and its rewrite may be (characters)."""
    rewriter: Annotated[str, Field(pattern=r"^(policy|[\w.]+:\w+)$")] = "policy"
    """Who rewrites prompts: `policy`, or a function `module:function` of (messages, strategy, seed) that returns a
    text."""
