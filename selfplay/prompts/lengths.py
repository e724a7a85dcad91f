"""How long prompts are for a policy: in tokens of its tokenizer, as its chat template renders them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

from selfplay.config import PolicyConfig
from selfplay.models import initial
from selfplay.models.rendering import Renderer, Template, load_tokenizer
from selfplay.types import Message


def in_tokens(policy: PolicyConfig) -> Callable[[list[Message]], int | str]:
    """What measures a prompt for a policy: its tokens, or why it cannot be rendered. Raises InputError."""
    with TemporaryDirectory(prefix="selfplay-policy-") as scratch:
        folder = initial.prepare(policy, Path(scratch) / "policy").folder
        tokenizer = load_tokenizer(folder, policy.trust_remote_code)
    render = Renderer(tokenizer, Template.read(policy.template(date.today().isoformat())))

    def length(messages: list[Message]) -> int | str:
        (ids,) = render([messages])
        return ids if isinstance(ids, str) else len(ids)

    return length
