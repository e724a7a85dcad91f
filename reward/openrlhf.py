"""OpenRLHF's requests as items: `query` and `prompts` are texts rendered by the policy's chat template.

The reward model has a template of its own, so the policy's is taken off again, where it is known (`--policy`): what is
left between its marks is the user's message and the response. A prompt that is not of that form (several turns, a system
message of its own) becomes the user's message as it is, with its control tokens split like those of any text.
"""

from collections.abc import Mapping
from datetime import date
from typing import Any

from reward.schema import GetRewardRequest, Item
from reward.settings import with_date

USER, ANSWER = "kqzvuser", "kqzvanswer"  # no template contains them


class Unrender:
    """Takes the template of the tokenizer in the folder `policy` off, for conversations of one turn.

    `variables` are what the queries were rendered with beside the conversation; a date that the template prints is today's.
    Raises ValueError for a tokenizer without a chat template, or one whose template changes the texts.
    """

    def __init__(self, policy: str | None, variables: Mapping[str, Any] | None = None) -> None:
        self._before = self._after = self._end = ""
        if policy is None:
            return
        from transformers import PreTrainedTokenizerFast

        try:
            tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(policy)
            asked, given = [{"role": "user", "content": USER}], with_date(variables or {}, date.today())
            prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, **given)
            answered = [*asked, {"role": "assistant", "content": ANSWER}]
            whole = tokenizer.apply_chat_template(answered, tokenize=False, add_generation_prompt=False, **given)
            self._before, self._after = prompt.split(USER)
            self._end = whole.split(ANSWER)[1].strip()
        except Exception as error:  # whatever the readers of these files and the template raise
            raise ValueError(f"{policy}: no tokenizer with a chat template for one turn: {error}") from error

    def items(self, asked: GetRewardRequest) -> list[Item | str]:
        """An item for each query, or why it is none. Raises ValueError for lists of different lengths."""
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
