"""The model that lm-evaluation-harness asks: its answers come from the engines of the run, by files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from selfplay.generation.generator import Sampling
from selfplay.models.rendering import Template
from selfplay.storage import answers, tables
from selfplay.types import Candidate, Prompt

Files = list[list[str]]  # for each policy the files of its answers


class Asking(TemplateLM):
    """A model without weights. `ask` gives what it asks to the engines, and returns when all policies have answered."""

    def __init__(
        self, tokenizer: Any, template: Template, ask: Callable[..., Files], folder: Path, context: int, max_tokens: int
    ) -> None:
        """context: the most tokens of a prompt and its answer. max_tokens: the longest answer, and what a task may ask for."""
        super().__init__()
        self.tokenizer, self._template = tokenizer, template
        self._ask, self._folder, self._context, self._max_tokens = ask, folder, context, max_tokens
        self._answered: dict[str, Files] = {}
        self._side = 0

    def begin(self, side: int) -> None:
        """From here on the answers of this policy count."""
        self._side = side

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as a text, the beginning of the answer included, or as it goes on where it ends with one."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self._template.variables,
        )  # fmt: skip
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids as the chat template has them: it writes special tokens as texts where it wants any."""
        ids: list[int] = self.tokenizer(string, add_special_tokens=bool(add_special_tokens))["input_ids"]
        return ids

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """An answer to each request. Those that are sampled in the same way are asked together.

        A context that has no room beside its answer loses its beginning.
        """
        found: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(json.dumps(self._how(request.args[1]), sort_keys=True), []).append(place)
        for how, places in groups.items():
            fields = json.loads(how)
            room = self._context - fields["max_tokens"]
            prompts = [self.tok_encode(requests[place].args[0])[-room:] or [self.prefix_token_id] for place in places]
            files = self._asked("sample", prompts, [], fields)
            texts = [text for file in files for text in tables.read_column(Path(file), "text")]
            found |= dict(zip(places, texts, strict=True))
        return [found[place] for place in range(len(requests))]

    def _how(self, given: dict[str, Any]) -> dict[str, Any]:
        """How a request is sampled, as an order to the engines says it: greedily unless the task says `do_sample`."""
        until = given.get("until") or []
        sampled = bool(given.get("do_sample")) and given.get("temperature", 1.0) > 0
        sampling = Sampling(
            temperature=float(given.get("temperature", 1.0)) if sampled else 0.0,
            top_p=float(given.get("top_p", 1.0)) if sampled else 1.0,
            top_k=int(given.get("top_k", 0)) if sampled else 0,
            stop=tuple([until] if isinstance(until, str) else until),
        )
        asked = int(given.get("max_gen_toks", self._max_tokens))
        return {"sampling": dataclasses.asdict(sampling), "max_tokens": min(asked, self._max_tokens)}

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Of each (texts, context ids, continuation ids) the log-probability (nats) and whether it is what greedy decoding gives.

        A context that has no room before its continuation loses its beginning.
        """
        most = self._context - 1
        contexts, ends = [], []
        for _, context, end in requests:
            end = end[: most - 1]
            contexts.append(context[len(context) + len(end) - most :] if len(context) + len(end) > most else context)
            ends.append(end)
        files = self._asked("logps", contexts, ends, {})
        found = [tables.read_array(Path(file), name).tolist() for file in files for name in ("logp", "greedy")]
        return [
            pair
            for logps, greedy in zip(found[::2], found[1::2], strict=True)
            for pair in zip(logps, greedy, strict=True)
        ]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability (nats) of each whole text, in windows where it is longer than the context."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        sizes = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            own = get_rolling_token_windows(ids, self.prefix_token_id, max_seq_len=self._context - 2, context_len=1)
            pairs = [make_disjoint_window(pair) for pair in own]
            windows += [(None, context, end) for context, end in pairs]
            sizes.append(len(pairs))
        logps = iter(self._loglikelihood_tokens(windows))
        return [sum(next(logps)[0] for _ in range(size)) for size in sizes]

    def _asked(
        self, kind: str, prompts: Sequence[list[int]], ends: Sequence[list[int]], fields: dict[str, Any]
    ) -> list[str]:
        """The files of this policy's answers. What was asked before is not asked again."""
        key = hashlib.sha256(json.dumps([kind, prompts, ends, fields]).encode()).hexdigest()[:16]
        if key not in self._answered:
            asked, said = self._folder / f"{key}.asked.parquet", self._folder / f"{key}.said.parquet"
            rows = [
                Prompt(prompt_id=str(place), messages=[], prompt_ids=ids, split="heldout")
                for place, ids in enumerate(prompts)
            ]
            tables.write_rows(asked, rows, Prompt)
            if kind == "logps":
                tables.write_rows(
                    said, [answers.continuation(str(place), ids) for place, ids in enumerate(ends)], Candidate
                )
            self._answered[key] = self._ask(kind=kind, asked=str(asked), said=str(said), **fields)
        return self._answered[key][self._side]
