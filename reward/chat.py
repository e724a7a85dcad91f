"""From a conversation to token ids, by a reward model's own chat template, with control tokens in the texts split.

The text of a message may contain `<|eot_id|>` or any other token that structures a conversation. Rendered and tokenised
as usual, the turn would end there. So a policy could write a user's turn into its answer, in which the user praises it.
Two simple remedies do not work. `split_special_tokens=True` also splits the tokens of the template itself. Tokenising the
texts apart from the template moves token boundaries, and the texts escape the `trim` of the template. What is done here:

1. Control tokens inside the texts become placeholders. The template then renders the conversation as it always does.
2. All control tokens that are now in the rendered text come from the template. Each gets a private name. It is an added
   token in a private copy of the tokenizer.
3. The placeholders become text again. The copy tokenises the whole text at once. For the copy the public names of control
   tokens are plain text.
4. The ids of private names become the real ids.

The private names contain a random number of this process, which no text can guess. A text without control tokens gets
exactly the ids of `apply_chat_template`. This is checked at the start.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

import jinja2
from tokenizers import AddedToken, Tokenizer

from reward.schema import Item
from reward.settings import with_date

PROBE = (("user", "Say hello, please."), ("assistant", " Hello: 1 + 1 = 2.\n"), ("user", "Thanks"))
CHARS_PER_TOKEN = 64  # No text has longer tokens on average. A text of more characters is too long in any case.
NO_WORD = re.compile(r"[^\w\s]")
SLICE = 64  # conversations that are tokenised at once, which bounds the memory of the result


def template_sha256(tokenizer: Any, variables: Mapping[str, Any], today: date) -> str:
    """The SHA-256 of all that decides on a rendered text: the template, its variables, and the date if it prints one."""
    made_of: list[Any] = [dict(variables)] if variables else []
    if prints_date(tokenizer, variables):
        made_of.append(today.isoformat())
    template: str = tokenizer.get_chat_template()
    text = json.dumps([template, *made_of], sort_keys=True) if made_of else template
    return hashlib.sha256(text.encode()).hexdigest()


def prints_date(tokenizer: Any, variables: Mapping[str, Any]) -> bool:
    """Whether the chat template makes different texts on different days."""
    role, content = PROBE[0]
    try:
        texts = {
            tokenizer.apply_chat_template(
                [{"role": role, "content": content}], tokenize=False, **with_date(variables, day)
            )
            for day in (date(2001, 2, 3), date(2019, 11, 22))
        }
    except (jinja2.TemplateError, TypeError, ValueError):
        return False  # It refuses this conversation. Whoever renders with it is told why.
    return len(texts) > 1


class ChatEncoder:
    """Renders and tokenises conversations. Only one thread at a time may call its methods.

    `tokenizer` is a fast Hugging Face tokenizer with a chat template. `max_tokens` is the length of the longest
    conversation that is accepted. `variables` are given to the template. `today` is the date that the template prints, if
    it prints one. By default it is the present day.
    Raises ValueError for a tokenizer that cannot be used.
    """

    def __init__(
        self, tokenizer: Any, max_tokens: int, variables: Mapping[str, Any] | None = None, today: date | None = None
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError("the tokenizer has no fast version (tokenizer.json): save one beside the model")
        try:
            self.template: str = tokenizer.get_chat_template()
        except ValueError as error:
            raise ValueError(
                "the tokenizer has no chat template: put the one that the model was trained with into "
                "chat_template.jinja beside its tokenizer.json"
            ) from error
        self.max_tokens = max_tokens
        self._hf = tokenizer
        given, today = variables or {}, today or date.today()
        self._variables = with_date(given, today)
        self.template_sha256 = template_sha256(tokenizer, given, today)
        self._nonce = secrets.token_hex(8)
        added: dict[int, AddedToken] = tokenizer.added_tokens_decoder
        control = {token.content: i for i, token in added.items() if token.special}
        control |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        control |= self._turn_markers(added)
        control = {text: i for text, i in control.items() if text and i is not None}
        # The longest come first, because one token may begin like another.
        self._control = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or r"(?!)")
        self._names = sorted(control)
        self._number = {text: n for n, text in enumerate(self._names)}
        self._placeholder = re.compile(f"<{self._nonce}-([0-9]+)>")

        # In the copy the public names become text, and the private names become the tokens.
        self._tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._real: dict[int, int] = {}
        for text, token_id in control.items():
            like = added.get(token_id) or AddedToken(text, normalized=False)
            flags = {"lstrip": like.lstrip, "rstrip": like.rstrip, "single_word": like.single_word}
            # The option encode_special_tokens turns special tokens, and only these, into plain text.
            self._tokenizer.add_special_tokens([AddedToken(text, normalized=like.normalized, **flags)])
            name = self._private(text)
            self._tokenizer.add_tokens([AddedToken(name, special=False, normalized=like.normalized, **flags)])
            private_id = self._tokenizer.token_to_id(name)
            assert private_id is not None
            self._real[private_id] = token_id
        # Some tokenizers make the unknown token of plain text, so it may stand in a text.
        self._forbidden = frozenset(control.values()) - {tokenizer.unk_token_id}
        self._self_check()

    def encode(self, items: Sequence[Item]) -> list[list[int] | str]:
        """The token ids of each item, or why it has none. What an item gets never depends on the other items."""
        found: list[list[int] | str] = []
        for start in range(0, len(items), SLICE):
            rendered = [self._render([(m.role, m.content) for m in i.messages] + [("assistant", i.response)])
                        for i in items[start : start + SLICE]]  # fmt: skip
            found += self._encode([text for text, _ in rendered], [reason for _, reason in rendered])
        return found

    def _text(self, turns: Sequence[tuple[str, str]]) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        return str(self._hf.apply_chat_template(messages, tokenize=False, **self._variables))

    def _render(self, turns: Sequence[tuple[str, str]]) -> tuple[str, str | None]:
        """The text with private names and None, or an empty text and the reason."""
        if sum(len(content) for _, content in turns) > CHARS_PER_TOKEN * self.max_tokens:
            return "", f"longer than {self.max_tokens} tokens"
        try:
            for _, content in turns:
                content.encode()  # This fails for a lone surrogate, which is no text.
        except UnicodeEncodeError:
            return "", "text that is not valid Unicode (a lone surrogate)"
        try:
            text = self._text([(role, self._control.sub(self._hide, content)) for role, content in turns])
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            said = self._placeholder.sub(self._show, str(error))[:200]
            return "", f"the chat template refuses the conversation: {said}"
        text = self._control.sub(lambda match: self._private(match.group()), text)
        return self._placeholder.sub(self._show, text), None

    def _encode(self, texts: list[str], reasons: list[str | None]) -> list[list[int] | str]:
        found: list[list[int] | str] = []
        for encoding, reason in zip(
            self._tokenizer.encode_batch_fast(texts, add_special_tokens=False), reasons, strict=True
        ):
            ids: list[int] = encoding.ids
            if reason is None and not ids:
                reason = "an empty conversation"
            elif reason is None and len(ids) > self.max_tokens:
                reason = f"longer than {self.max_tokens} tokens"
            elif reason is None and not self._forbidden.isdisjoint(ids):
                # In some vocabularies plain text can lead to a control token.
                reason = "contains the text of a control token that this tokenizer cannot split"
            found.append([self._real.get(i, i) for i in ids] if reason is None else reason)
        return found

    def _hide(self, match: re.Match[str]) -> str:
        return f"<{self._nonce}-{self._number[match.group()]}>"

    def _show(self, match: re.Match[str]) -> str:
        return self._names[int(match.group(1))]

    def _private(self, text: str) -> str:
        return f"<{self._nonce}.{self._number[text]}>"

    def _turn_markers(self, added: dict[int, AddedToken]) -> dict[str, int]:
        """Added tokens that the template puts around every turn. Some tokenizers do not call them special.

        A word or white space is never among them, because any text may have it. The probe has a finished assistant turn
        before its last turn. Templates put `<think>` and the like only into the last turn, and a response may have it too.
        """
        try:
            text = self._text(PROBE)
        except (jinja2.TemplateError, TypeError, ValueError):
            return {}  # The template takes one turn only, so no text can add a turn.
        for _, content in PROBE:
            text = text.replace(content.strip(), "\0")
        return {
            t.content: i
            for i, t in added.items()
            if len(t.content) > 2 and NO_WORD.search(t.content) and t.content in text
        }

    def _self_check(self) -> None:
        for length in (2, 3):
            messages = [{"role": role, "content": content} for role, content in PROBE[:length]]
            try:
                expected = self._hf.apply_chat_template(messages, tokenize=True, return_dict=False, **self._variables)
            except (jinja2.TemplateError, TypeError, ValueError) as error:
                if length == 2:
                    raise ValueError(f"the chat template refuses a user's message with its answer: {error}") from error
                continue
            text, _ = self._render(PROBE[:length])
            got = [self._real.get(i, i) for i in self._tokenizer.encode(text, add_special_tokens=False).ids]
            if got != expected:
                raise ValueError(
                    "control tokens cannot be split safely with this tokenizer: its ids differ from apply_chat_template's"
                )
