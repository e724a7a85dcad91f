"""How long prompts are for a policy: in tokens of its tokenizer, as its chat template renders them."""

from __future__ import annotations

from collections.abc import Callable

from selfplay.models.rendering import Renderer, load_tokenizer
from selfplay.prompts.importer import initial_folder
from selfplay.types import Message


def in_tokens(policy: str, revision: str | None, trust_remote_code: bool) -> Callable[[list[Message]], int | str]:
    """What measures a prompt for a policy, a folder or a Hub id. Raises InputError."""
    render = Renderer(load_tokenizer(initial_folder(policy, revision), trust_remote_code))

    def length(messages: list[Message]) -> int | str:
        (ids,) = render([messages])
        return ids if isinstance(ids, str) else len(ids)

    return length
