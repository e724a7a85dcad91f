"""Prompts that join the pool of a run later: rewrites of the policy, and those that a person adds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from reward.kinds import Kind
from selfplay.config import PromptsConfig
from selfplay.prompts import admission, benchmarks
from selfplay.prompts.parts import Render
from selfplay.prompts.pool import Pool
from selfplay.types import Prompt


def admit(
    rows: Sequence[Mapping[str, Any]],
    source: str,
    *,
    prompts: Pool,
    render: Render,
    settings: PromptsConfig,
    joined: int,
    kinds: Sequence[Kind],
) -> list[Prompt | str]:
    """For each row ({"prompt"} or {"messages"}, perhaps "parent" and "source") the prompt that may join, or why not.

    joined: the first round that may draw them. kinds: the rewards that read references. Nothing is written: `Pool.join` does that.
    """
    return admission.admit(
        rows,
        prompts,
        render,
        max_tokens=settings.max_tokens,
        ngram=settings.leak_ngram,
        overlap=settings.leak_overlap,
        source=source,
        joined=joined,
        kinds=kinds,
        benchmarks=benchmarks.read(settings.benchmarks),
    )


def add(
    fates: Sequence[Prompt | str], source: str, prompts: Pool, on_event: Callable[[str, str], None]
) -> Counter[str]:
    """Have the prompts that `admit` has let in join the pool. Returns how many were «added», and how many were refused for
    what reason.

    When it returns they are on disk and in the ledger.
    """
    prompts.join(fate for fate in fates if isinstance(fate, Prompt))
    counts = Counter("added" if isinstance(fate, Prompt) else fate for fate in fates)
    refused = ", ".join(f"{n} × {why}" for why, n in sorted(counts.items()) if why != "added")
    text = f"{counts['added']} of {len(fates)} prompts from {source} join the pool"
    on_event("prompts", text + (f"; refused: {refused}" if refused else ""))
    return counts
