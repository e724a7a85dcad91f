"""The stage `evolve`: prompts worth most are rewritten into new ones, which join the pool of the next rounds.

Evolve-then-select (AP, Huang et al., 2025, arXiv 2503.01864): of a round's prompts the share with the highest alignment
potential, five rewrites of each, one for breadth and four for depth, by the policy that sampled the round.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from selfplay.config import EvolveConfig
from selfplay.errors import InputError
from selfplay.methods.potential import keep_top
from selfplay.progress import Line
from selfplay.prompts.formats import prompt_id
from selfplay.prompts.held_out import words
from selfplay.prompts.parts import Render
from selfplay.prompts.pool import Pool
from selfplay.stage import Metrics, Stage
from selfplay.storage import tables
from selfplay.types import Candidate, Message, Prompt, Rewrite

EVOLVE = Stage(
    name="evolve",
    reads=("pairs/pairs.parquet",),
    writes=("prompts.parquet", "rewrites.parquet"),
    unit="rewrites",
    log="generator",
)

Task = tuple[Prompt, str]
"""A prompt and the strategy by which it is to be rewritten."""
Rewriting = Callable[[Sequence[Task], Line], list[Rewrite]]
"""One rewrite for each task: `by_policy` and `by_function` make such a function."""
Admit = Callable[[Sequence[Mapping[str, Any]]], Sequence[Prompt | str]]
"""For each row the prompt that may join the pool, or why it may not (`admission.admit`)."""
Sample = Callable[[Sequence[Prompt], int, Callable[[int], None]], Sequence[Candidate]]
"""(prompts, max_tokens, on_progress) → one answer for each, by the policy that sampled the round."""


class Events(Protocol):
    """What is asked of the ledger (`storage.ledger.Store`)."""

    def events(self, index: int | None = None) -> list[dict[str, Any]]: ...

    def event(self, kind: str, text: str, index: int | None = None) -> None: ...


STRATEGIES = {
    "broaden": "Invent another request from the same field. It asks about something else, in its own words, and is about "
    "as long and as hard as this one.",
    "deepen": "Change it so that a good answer has to go further into the matter: it calls for more knowledge, or for a "
    "closer look, and keeps its subject.",
    "constrain": "Change it by one more condition that a good answer has to meet, on its form, its length, its readers or "
    "its means. All else stays.",
    "concretize": "Change it by putting something definite in the place of what is general: a case, a person, a place, "
    "figures. The subject stays.",
    "reason": "Change it so that the answer takes several steps of thought, each of which builds on the one before, and "
    "ask to be shown them. The subject stays.",
}

_INSTRUCTION = """\
Here is a request that somebody made of an assistant.{before}

<request>
{text}
</request>

Your task is to make a new request out of it. {strategy}

The new request is in the same language, can be understood without the old one, and can be answered in words alone. Do not \
answer it. Write it between <rewrite> and </rewrite>."""

_BEFORE = """ This was said before it:

<conversation>
{lines}
</conversation>"""


def best(prompt_ids: Sequence[str], potentials: Sequence[float | None], share: float) -> list[str]:
    """prompt_ids of the `share` of the pairs with the highest alignment potential, in the order of the pairs."""
    found = keep_top([float("nan") if potential is None else potential for potential in potentials], share)
    return [prompt_ids[i] for i in found]


def instruction(messages: Sequence[Message], strategy: str) -> list[Message]:
    """What the policy is asked, to rewrite the last message of a conversation."""
    lines = "\n".join(f"{m['role']}: {m['content']}" for m in messages[:-1])
    text = _INSTRUCTION.format(
        before=_BEFORE.format(lines=lines) if lines else "", text=messages[-1]["content"], strategy=STRATEGIES[strategy]
    )
    return [{"role": "user", "content": text}]


def marked(said: str) -> str | None:
    """The rewrite in an answer of the policy: what stands between the last pair of marks; None without one."""
    found = re.findall(r"<rewrite>(.*?)</rewrite>", said, re.DOTALL)
    return found[-1].strip() if found else None


def fault(old: str, new: str, max_ratio: float) -> str | None:
    """Why a text is no rewrite of another one; None when it is. Whether it may join the pool is another question."""
    if not new.strip():
        return "empty"
    if words(new) == words(old):
        return "unchanged"
    if max(len(old), len(new)) > max_ratio * min(len(old), len(new)):
        return "length ratio"
    return None


def evolve(
    out: Path, line: Line, *, pairs: Path, pool: Pool, settings: EvolveConfig, rewriting: Rewriting, admit: Admit
) -> Metrics:
    """Rewrite and filter; writes the prompts that are to join (prompts.parquet) and what became of every rewrite.

    pairs: the round's pairs.parquet, of which prompt_id and potential are read.
    """
    columns = tables.read_table(pairs, ["prompt_id", "potential"])
    parents = best(columns["prompt_id"].to_pylist(), columns["potential"].to_pylist(), settings.top)
    prompts = {p.prompt_id: p for p in pool.read(parents)}
    tasks = [(prompts[i], strategy) for i in parents for strategy in STRATEGIES]
    line.update(total=len(tasks))
    rewrites = rewriting(tasks, line)
    for i, (rewrite, (parent, _)) in enumerate(zip(rewrites, tasks, strict=True)):
        if rewrite.rejected_because is None:
            why = fault(parent.messages[-1]["content"], rewrite.text, settings.max_ratio)
            rewrites[i] = dataclasses.replace(rewrite, rejected_because=why)
    sound = [i for i, rewrite in enumerate(rewrites) if rewrite.rejected_because is None]
    line.update(done=len(tasks), text="looking for what is new")
    fates = admit([_row(prompts[rewrites[i].parent], rewrites[i]) for i in sound])
    joining = []
    for i, fate in zip(sound, fates, strict=True):
        if isinstance(fate, Prompt):
            joining.append(fate)
            rewrites[i] = dataclasses.replace(rewrites[i], prompt_id=fate.prompt_id)
        else:
            rewrites[i] = dataclasses.replace(rewrites[i], rejected_because=fate)
    tables.write_rows(out / "prompts.parquet", joining, Prompt)
    tables.write_rows(out / "rewrites.parquet", rewrites, Rewrite)
    line.update(text=f"{len(joining)} of {len(rewrites)} rewrites join the pool")
    return metrics(rewrites)


def join(stage: Path, *, pool: Pool, ledger: Events, index: int) -> None:
    """Let what a finished stage found join the pool, and say in the ledger who made it. Done twice, it is done once."""
    pool.join(tables.read_rows(stage / "prompts.parquet", Prompt))
    if not any(event["kind"] == "evolve" for event in ledger.events(index)):
        ledger.event("evolve", story(tables.read_rows(stage / "rewrites.parquet", Rewrite)), index)


def story(rewrites: Sequence[Rewrite]) -> str:
    """How many rewrites join the pool, and who made them, in a sentence."""
    if not rewrites:
        return "no prompt was there to rewrite"
    joined = Counter(w.strategy for w in rewrites if w.prompt_id)
    counts = ", ".join(f"{name} {joined[name]}" for name in STRATEGIES)
    by = rewrites[0].rewriter
    who = f"{by}, a function with rules: no model was asked" if ":" in by else by
    return f"{joined.total()} of {len(rewrites)} rewrites join the pool ({counts}); rewritten by {who}"


def metrics(rewrites: Sequence[Rewrite]) -> dict[str, float]:
    """Counts by strategy and by reason. `by_rules` is 1 where no model rewrote."""
    joined = Counter(w.strategy for w in rewrites if w.prompt_id)
    rejected = Counter(re.sub(r"\W+", "_", w.rejected_because).strip("_") for w in rewrites if w.rejected_because)
    return {
        "parents": len({w.parent for w in rewrites}),
        "rewrites": len(rewrites),
        "tokens": sum(w.n_tokens for w in rewrites),
        "by_rules": float(any(":" in w.rewriter for w in rewrites)),
        "joined": joined.total(),
        **{f"joined_{name}": joined[name] for name in STRATEGIES},
        **{f"rejected_{why}": count for why, count in sorted(rejected.items())},
    }


def _row(parent: Prompt, rewrite: Rewrite) -> dict[str, Any]:
    """The parent's conversation with another last message."""
    return {
        "messages": [*parent.messages[:-1], {"role": "user", "content": rewrite.text}],
        "parent": parent.prompt_id,
        "source": f"{rewrite.strategy} by {rewrite.rewriter}",
    }


# who rewrites


def by_policy(version: int, context: int, max_tokens: int, render: Render, sample: Sample) -> Rewriting:
    """Rewriting by the policy that samples the round, which is asked with an instruction.

    context: tokens that the engine has room for. max_tokens: longest rewrite.
    """

    def rewriting(tasks: Sequence[Task], line: Line) -> list[Rewrite]:
        conversations = [instruction(parent.messages, strategy) for parent, strategy in tasks]
        refused: dict[int, str] = {}
        asks: dict[int, Prompt] = {}
        for i, (messages, ids) in enumerate(zip(conversations, render(conversations), strict=True)):
            if isinstance(ids, str):
                refused[i] = ids
            elif len(ids) + max_tokens > context:
                refused[i] = "no room for the instruction"
            else:
                key = prompt_id(messages)
                asks[i] = Prompt(prompt_id=key, messages=messages, prompt_ids=list(map(int, ids)), split="train")
        answers = sample(list(asks.values()), max_tokens, lambda n: line.update(done=len(refused) + n))
        said = dict(zip(asks, answers, strict=True))
        return [
            _answered(parent, strategy, version, said.get(i), refused.get(i))
            for i, (parent, strategy) in enumerate(tasks)
        ]

    return rewriting


def _answered(parent: Prompt, strategy: str, version: int, answer: Candidate | None, why: str | None) -> Rewrite:
    """The rewrite in an answer of the policy. `why` it was not asked, where there is no answer."""
    text = None
    if answer is not None:
        text = marked(answer.text)
        why = "cut off" if answer.finish_reason != "stop" else "not marked" if text is None else None
    return Rewrite(
        parent=parent.prompt_id,
        strategy=strategy,
        rewriter=f"policy {version}",
        text=text if text is not None else answer.text if answer is not None else "",
        n_tokens=answer.n_tokens if answer is not None else 0,
        prompt_id=None,
        rejected_because=why,
    )


def by_function(
    name: str,
    function: Callable[[list[Message], str, int], str],
    seed: Callable[[str, str], int],
    breathe: Callable[[], None] = lambda: None,
) -> Rewriting:
    """Rewriting by the user's function (messages, strategy, seed) → text, which is called `name`.

    seed: of (prompt_id, strategy). breathe: is called before each prompt, and may end the stage.
    """

    def rewriting(tasks: Sequence[Task], line: Line) -> list[Rewrite]:
        rewrites = []
        for parent, strategy in tasks:
            breathe()
            try:
                text = function(parent.messages, strategy, seed(parent.prompt_id, strategy))
            except Exception as error:  # the function is the user's own code
                raise InputError(
                    f"evolve.rewriter ({name}) failed on prompt {parent.prompt_id}: {error!r}",
                    "mend the function, then run the same command again",
                ) from error
            rewrites.append(
                Rewrite(
                    parent=parent.prompt_id, strategy=strategy, rewriter=name, text=text.strip(), n_tokens=0,
                    prompt_id=None, rejected_because=None,
                )
            )  # fmt: skip
        return rewrites

    return rewriting
