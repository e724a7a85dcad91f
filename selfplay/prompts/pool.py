"""The prompts of a run: those it began with, those that joined later, and what a prompt must be to join.

<run>/pool/pool.parquet         written once, by the importer
<run>/pool/added/0001.parquet   prompts that joined later, a file each time
"""

from __future__ import annotations

import dataclasses
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from selfplay import seeds
from selfplay.storage import folders, tables
from selfplay.types import Message, Prompt

POOL, ADDED = "pool.parquet", "added"
LEAST_WORDS = 4  # shorter texts share their words by chance: they are compared whole

Render = Callable[[Sequence[list[Message]]], Sequence[list[int] | str]]  # token ids, or why there are none

# A language written without spaces has a word a character.
_WORD = re.compile(r"[\u2e80-\u9fff\uac00-\ud7ff]|[^\W\u2e80-\u9fff\uac00-\ud7ff]+")


class Pool:
    """The prompts of a run, in the order they came. Texts and token ids stay on disk until somebody asks for them.

    Iterating reads all of them, a part at a time.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._joined: dict[str, dict[str, int | None]] = {}
        self._draws: Counter[str] = Counter()
        self._counted = 0  # rounds whose draws are in it
        for file in _files(folder):
            for name, split, joined in tables.read_columns(file, ("prompt_id", "split", "joined")):
                self._joined.setdefault(split, {})[name] = joined

    def __contains__(self, prompt_id: object) -> bool:
        return any(prompt_id in split for split in self._joined.values())

    def __iter__(self) -> Iterator[Prompt]:
        for file in _files(self._folder):
            yield from tables.each_row(file, Prompt)

    def joined(self, split: str) -> Mapping[str, int | None]:
        """First round that may draw each prompt of a split, by prompt_id; None: it was there from the start."""
        return self._joined.get(split, {})

    def ids(self, split: str) -> list[str]:
        return list(self.joined(split))

    def read(self, prompt_ids: Sequence[str]) -> list[Prompt]:
        """These prompts, in this order."""
        wanted = frozenset(prompt_ids)
        files = _files(self._folder) if wanted else []
        found = {p.prompt_id: p for file in files for p in tables.rows_with(file, Prompt, "prompt_id", wanted)}
        return [found[i] for i in prompt_ids]

    def join(self, prompts: Iterable[Prompt]) -> int:
        """Let prompts join for good, those that are new; returns how many. Only the runner of the run folder may."""
        new = {p.prompt_id: p for p in prompts if p.prompt_id not in self}
        if new:
            write_added(self._folder, list(new.values()))
        for p in new.values():
            self._joined.setdefault(p.split, {})[p.prompt_id] = p.joined
        return len(new)

    def draws(self, rounds: Path, before: int) -> Mapping[str, int]:
        """How often each prompt was drawn in the rounds before that number, whether it was passed over then or not.

        What they drew does not change any more, so each is read once.
        """
        for index in range(self._counted + 1, before):
            folder = rounds / f"{index:04d}" / "prompts"
            path = next((p for name in ("drawn", "prompts") if (p := folder / f"{name}.parquet").is_file()), None)
            if path is not None:
                self._draws.update(tables.read_column(path, "prompt_id"))
            self._counted = index
        return self._draws


def page(folder: Path, start: int, count: int) -> tuple[list[Prompt], int]:
    """Up to `count` prompts from number `start` on in the order they came, and how many there are; none before the import."""
    found: list[Prompt] = []
    total = 0
    for file in _files(folder) if (folder / POOL).is_file() else []:
        rows = tables.count_rows(file)
        low = max(start - total, 0)
        if low < rows and len(found) < count:
            found += tables.read_slice(file, Prompt, low, count - len(found))
        total += rows
    return found, total


def _files(folder: Path) -> list[Path]:
    return [folder / POOL, *sorted((folder / ADDED).glob("*.parquet"))]


def write_added(folder: Path, prompts: Sequence[Prompt]) -> None:
    """Let prompts join, whole or not at all. Only the runner of the run folder may."""
    added = folder / ADDED
    added.mkdir(exist_ok=True)
    number = max((int(file.stem) for file in added.glob("*.parquet")), default=0) + 1
    tables.write_rows(added / f"{number:04d}.parquet", prompts, Prompt)
    folders.sync(folder)


def messages_of(row: Mapping[str, Any]) -> list[Message] | str:
    """The conversation of a row, {"prompt": str} or {"messages": […]}, or why it has none."""
    if isinstance(row.get("prompt"), str) and row["prompt"].strip():
        return [{"role": "user", "content": row["prompt"]}]
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        return "neither prompt nor messages"
    if not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    ):
        return "a message without role and content"
    if not all(re.fullmatch(r"[A-Za-z_-]{1,32}", m["role"]) for m in messages):
        return "a role that is no word"
    clean = [{"role": m["role"], "content": m["content"]} for m in messages]
    return clean if clean[-1]["role"] == "user" else "the last message is not the user's"


def prompt_id(messages: list[Message]) -> str:
    return f"{seeds.derive(json.dumps(messages, sort_keys=True)):016x}"


def words(text: str) -> list[str]:
    """The words of a text without case, punctuation and typographic variants; a text without any is its own word."""
    return _WORD.findall(_folded(text)) or [text.strip()]


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def same(messages: Sequence[Message]) -> int:
    """A number that is the same for conversations that differ in case, white space and typographic variants alone."""
    return seeds.derive(*(f"{m['role']}\x1f{' '.join(_folded(m['content']).split())}" for m in messages))


def asked(messages: Sequence[Message]) -> list[str]:
    """The words of all that the user says."""
    return [word for m in messages if m["role"] == "user" for word in words(m["content"])]


class HeldOut:
    """Says whether a prompt meets a held-out one: the same ancestor, the same words, or too many n-grams in common.

    The overlap of two texts is the share of the n-grams of the one that has fewer which the other has too; so a held-out
    prompt inside a longer text, and a part of a held-out prompt, are found as well. A text of fewer than n words is one
    n-gram of its own length.
    """

    def __init__(self, prompts: Iterable[Prompt], ngram: int, overlap: float) -> None:
        self._ancestors, self._texts = set[str](), list[list[str]]()
        for prompt in prompts:
            self._ancestors.add(prompt.ancestor)
            self._texts.append(asked(prompt.messages))
        self._whole = {tuple(text) for text in self._texts}
        self._ngram, self._overlap = ngram, overlap
        self._by_size: dict[int, tuple[dict[tuple[str, ...], list[int]], list[int]]] = {}

    def meets(self, prompt: Prompt) -> bool:
        text = asked(prompt.messages)
        if prompt.ancestor in self._ancestors or tuple(text) in self._whole:
            return True
        longest = min(self._ngram, len(text))
        for n in range(min(LEAST_WORDS, self._ngram), longest + 1):
            where, counts = self._index(n)
            ours = _grams(text, n)
            shared = Counter(i for gram in ours for i in where.get(gram, ()))
            for i, count in shared.items():
                # Below the full size only held-out texts that are no longer than this.
                if n < longest and len(self._texts[i]) > n:
                    continue
                if count >= self._overlap * min(len(ours), counts[i]):
                    return True
        return False

    def _index(self, n: int) -> tuple[dict[tuple[str, ...], list[int]], list[int]]:
        """n-gram → held-out texts that have it, and how many different ones each text has."""
        if n not in self._by_size:
            where: dict[tuple[str, ...], list[int]] = {}
            counts = []
            for i, text in enumerate(self._texts):
                grams = _grams(text, n)
                counts.append(len(grams))
                for gram in grams:
                    where.setdefault(gram, []).append(i)
            self._by_size[n] = (where, counts)
        return self._by_size[n]


def _grams(text: Sequence[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(text[i : i + n]) for i in range(len(text) - n + 1)}


def admit(
    rows: Sequence[Mapping[str, Any]],
    pool: Iterable[Prompt],
    render: Render,
    *,
    max_tokens: int,
    ngram: int,
    overlap: float,
    source: str,
    joined: int,
) -> list[Prompt | str]:
    """For each row the prompt that may join the pool, or why it may not.

    rows: {"prompt"} or {"messages"}, with "parent" (a prompt_id) and "source" where they have them; `source` is for the
    others. max_tokens: longest rendered prompt. ngram, overlap: see HeldOut. joined: first round that may draw them.
    Refused are rows without a conversation, what the pool has already (the same words), what meets a held-out prompt or
    has its ancestor, what the chat template refuses, and what is too long. Nothing is written.
    """
    parents = {str(row["parent"]) for row in rows if row.get("parent") is not None}
    known, roots = set[int](), dict[str, str]()

    def kept_apart() -> Iterator[Prompt]:
        """The held-out prompts; on the way to them, what else has to be known of a pool that is read once."""
        for prompt in pool if rows else ():
            known.add(same(prompt.messages))
            if prompt.prompt_id in parents:
                roots[prompt.prompt_id] = prompt.ancestor
            if prompt.split != "train":
                yield prompt

    held_out = HeldOut(kept_apart(), ngram, overlap)
    found: list[Prompt | str] = []
    drafts: dict[int, Prompt] = {}
    for row in rows:
        messages = messages_of(row)
        if isinstance(messages, str):
            found.append(messages)
            continue
        parent = None if row.get("parent") is None else str(row["parent"])
        origin = str(row.get("source") or source)
        try:
            json.dumps([messages, parent, origin], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            found.append("half a surrogate pair")
            continue
        root = roots.get(parent, parent) if parent is not None else None
        draft = Prompt(
            prompt_id=prompt_id(messages), messages=messages, prompt_ids=[], split="train", parent=parent,
            source=origin, root=None if root == parent else root, joined=joined,
        )  # fmt: skip
        if held_out.meets(draft):
            found.append("held out")
        elif (sameness := same(messages)) in known:
            found.append("duplicate")
        else:
            known.add(sameness)
            drafts[len(found)] = draft
            found.append("")
    rendered = render([draft.messages for draft in drafts.values()]) if drafts else []
    for (place, draft), ids in zip(drafts.items(), rendered, strict=True):
        if isinstance(ids, str):
            found[place] = ids
        elif len(ids) > max_tokens:
            found[place] = "too long"
        else:
            found[place] = dataclasses.replace(draft, prompt_ids=ids)
    return found
