"""The wire format of `/score` and `/healthz`, shared by server and client."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class _Request(BaseModel):
    # strict: no number is taken for a text; forbid: a misspelt key is an error, not a default
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class _Response(BaseModel):
    # unknown keys are ignored: a newer server may say more than this client knows
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class Message(_Request):
    role: str = Field(pattern=r"^[A-Za-z_-]{1,32}$")
    """`system`, `user`, `assistant`, … : whatever the template of the reward model knows."""
    content: str


Messages = Annotated[list[Message], Field(min_length=1)]


class Item(_Request):
    messages: Messages
    """The conversation up to the response."""
    response: str
    """The assistant's answer that is scored."""
    id: str | None = None
    """Returned as it came, so that the asker sees which score belongs to which item."""
    reference: str | None = None
    """An answer that is known to be right or good: rules and judges may compare with it, models do not read it."""


class ScoreRequest(_Request):
    items: list[Item]


class ScoreResponse(_Response):
    scores: list[float | None]
    """One for each item, in order. None: this item has no score, `errors` says why."""
    errors: list[str | None] | None = None
    ids: list[str | None] | None = None
    """The ids of the items, in the order of `scores`."""
    weights_sha256: str | None = None
    """What scored them: the same value as in `/healthz`."""


class GetRewardRequest(BaseModel):
    """OpenRLHF's request, `POST /get_reward`. Versions of it send more keys; they are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)
    query: list[str]
    """Prompt and response in one text, by the policy's chat template."""
    prompts: list[str] | None = None
    """The prompts alone: where they end, the responses begin."""
    labels: list[object] | None = None
    """Reference answers; what is no text is ignored."""


class GetRewardResponse(_Response):
    rewards: list[float | None]
    """One for each query, in order."""
    errors: list[str | None] | None = None
    """As in `/score`; OpenRLHF does not read them."""
    weights_sha256: str | None = None


class Health(_Response):
    kind: str = "model"
    """`model`, `rules`, `judge`; of foreign services `vllm`, `openrlhf`."""
    model: str
    """Path or Hub name, as it was given to the server; of rules and judges what they are called."""
    parameters: int
    dtype: str
    device: str
    max_tokens: int
    """A longer conversation gets no score."""
    weights_sha256: str
    """Over all that decides on a score beside template and precision: weight files, configuration, tokenizer, own code,
    and the heads that are combined; of rules and judges over all that they are made of. Equal means: scores may be
    compared and kept. Empty: not known, or scores depend on what else is in the request."""
    template_sha256: str
    """Of the chat template of the reward model."""
    files: dict[str, str]
    """SHA-256 of each weight file."""
