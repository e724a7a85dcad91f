"""The requests of OpenRLHF as items. Its `query` and `prompts` are texts that the policy's chat template has rendered.

The reward model has a template of its own. So the marks of the policy's template are taken off, if that template is known
(`--policy`). What is left is the user's message and the response. A prompt of another form has several turns, or a system
message of its own. All of it becomes the user's message, and its control tokens are split like those of any text.
"""

from collections.abc import Mapping
from datetime import date
from typing import Any

from reward import hub
from reward.schema import GetRewardRequest, Item
from reward.settings import with_date

USER, ANSWER = "kqzvuser", "kqzvanswer"  # texts that no template contains


class Unrender:
    """Takes the marks of a chat template off conversations of one turn. `policy` is the folder of its tokenizer.

    `variables` are those with which the queries were rendered. If the template prints a date, it is that of today.
    Raises ValueError for a tokenizer without a chat template, or one whose template changes the texts.
    """

    def __init__(self, policy: str | None, variables: Mapping[str, Any] | None = None) -> None:
        self._before = self._after = self._end = ""
        if policy is None:
            return
        from transformers import PreTrainedTokenizerFast

        hub.bounded()
        try:
            tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(policy)
            asked, given = [{"role": "user", "content": USER}], with_date(variables or {}, date.today())
            prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, **given)
            answered = [*asked, {"role": "assistant", "content": ANSWER}]
            whole = tokenizer.apply_chat_template(answered, tokenize=False, add_generation_prompt=False, **given)
            self._before, self._after = prompt.split(USER)
            self._end = whole.split(ANSWER)[1].strip()
        except Exception as error:  # The readers of these files, and the template, may raise anything.
            raise ValueError(f"{policy}: no tokenizer with a chat template for one turn: {error}") from error

    def items(self, asked: GetRewardRequest) -> list[Item | str]:
        """An item for each query, or why there is none. Raises ValueError for lists of different lengths."""
        count = len(asked.query)
        if asked.prompts is None:
            raise ValueError("`prompts` is needed beside `query`: it says where the responses begin")
        labels = asked.labels or [None] * count
        if not len(asked.prompts) == len(labels) == count:
            raise ValueError(f"{count} queries, {len(asked.prompts)} prompts and {len(labels)} labels")
        return [self._item(q, p, label) for q, p, label in zip(asked.query, asked.prompts, labels, strict=True)]

    def _item(self, query: str, prompt: str, label: object) -> Item | str:
        if not query.startswith(prompt):
            return "the query does not begin with its prompt"
        response, message = query[len(prompt) :], prompt
        if self._end and response.rstrip().endswith(self._end):
            response = response.rstrip()[: -len(self._end)]
        framed = len(prompt) >= len(self._before) + len(self._after)
        if framed and prompt.startswith(self._before) and prompt.endswith(self._after):
            message = prompt[len(self._before) : len(prompt) - len(self._after)]
        reference = label if isinstance(label, str) and label else None
        return Item.model_validate(
            {"messages": [{"role": "user", "content": message}], "response": response, "reference": reference}
        )
