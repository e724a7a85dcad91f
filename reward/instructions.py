"""Instruction following that is checked by rules: the reward is whether a response follows the constraints of its prompt.

The reference of a prompt is `{"instruction_id_list": […], "kwargs": [{…}, …]}`, which are the columns of IFEval's public file
(Zhou et al., 2023, arXiv 2311.07911). reward/constraints.py says what each id means. A response without text follows nothing.
"""

import importlib.util
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar, Literal

from reward.constraints import CHECKERS, values
from reward.kinds import Kind
from reward.schema import Item
from reward.scorer import ModelRefused, OneByOne, Unscorable

Constraint = tuple[str, dict[str, Any]]
"""An instruction id and the values that its checker needs."""


class Instructions(Kind):
    """Checks the constraints of a prompt, as IFEval does."""

    made_of: ClassVar[tuple[str, ...]] = ("reward.constraints", "reward.sentences", "langdetect")
    reading: Literal["strict", "loose"] = "strict"
    """`strict`: the response as it is. `loose`: a constraint counts as followed if it is followed by one of eight variants of the
    response: without its first line, its last line, both or none, each with and without asterisks."""
    value: Literal["all", "share"] = "share"
    """`all`: 1 where every constraint is followed, otherwise 0. `share`: the share of constraints that are followed, which tells
    more answers apart."""

    def require(self) -> None:
        if importlib.util.find_spec("langdetect") is None:
            raise ModelRefused("instructions need the package langdetect: pip install 'selfplay[verify]'")

    def unreadable(self, reference: str | None) -> str | None:
        try:
            constraints(reference)
        except ValueError as error:
            return str(error)
        return None

    def scorers(self) -> list[OneByOne]:
        self.require()
        return [InstructionScorer(self)]


class InstructionScorer(OneByOne):
    def __init__(self, settings: Instructions) -> None:
        super().__init__(settings.health())
        self._loose, self._all = settings.reading == "loose", settings.value == "all"

    def value(self, item: Item) -> float:
        try:
            followed = follows(item.reference, _asked(item), item.response, loose=self._loose)
        except ValueError as error:
            raise Unscorable(str(error)) from error
        self.counts["constraints"] += len(followed)
        self.counts["constraints followed"] += sum(followed)
        return float(all(followed)) if self._all else sum(followed) / len(followed)


def follows(reference: str | None, prompt: str, response: str, *, loose: bool = False) -> list[bool]:
    """For each constraint of a reference whether a response to the prompt follows it. Raises ValueError for a reference that
    is none, and names an instruction id that is unknown."""
    texts = variants(response) if loose else [response]
    return [any(_is_followed(c, prompt, text) for text in texts) for c in constraints(reference)]


def check(instruction_id: str, kwargs: Mapping[str, Any], prompt: str, response: str) -> bool:
    """Whether a response to the prompt follows one constraint, read strictly. Raises ValueError as `follows`.

    The prompt is what is to be repeated where `combination:repeat_prompt` has no `prompt_to_repeat`.
    """
    return _is_followed((instruction_id, _values(instruction_id, kwargs)), prompt, response)


def variants(response: str) -> list[str]:
    """The eight texts of the loose reading."""
    lines = response.split("\n")
    cut = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*cut, *(text.replace("*", "") for text in cut)]


@lru_cache(maxsize=4096)
def constraints(reference: str | None) -> tuple[Constraint, ...]:
    """The constraints of a reference. Raises ValueError."""
    if reference is None:
        raise ValueError("no reference: the prompt needs instruction_id_list and kwargs")
    try:
        given = json.loads(reference)
    except (ValueError, RecursionError):
        given = None
    ids = given.get("instruction_id_list") if isinstance(given, dict) else None
    if not isinstance(ids, list) or not ids or not all(isinstance(name, str) for name in ids):
        raise ValueError(f"the reference has no instruction_id_list: {reference[:60]!r}")
    kwargs = given.get("kwargs") or [{} for _ in ids]
    if not isinstance(kwargs, list) or len(kwargs) != len(ids):
        raise ValueError("the reference needs as many kwargs as instruction ids")
    if not all(isinstance(own, dict | None) for own in kwargs):
        raise ValueError("the kwargs of an instruction are no object")
    return tuple((name, _values(name, own or {})) for name, own in zip(ids, kwargs, strict=True))


def _values(instruction_id: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    if instruction_id == "combination:repeat_prompt" and kwargs.get("prompt_to_repeat") is None:
        return {}
    return values(instruction_id, kwargs)


def _is_followed(constraint: Constraint, prompt: str, response: str) -> bool:
    if not response.strip():
        return False
    name, given = constraint
    if name == "combination:repeat_prompt" and not given:
        given = {"prompt_to_repeat": prompt}
    return CHECKERS[name][0](response, **given)


def _asked(item: Item) -> str:
    return next((m.content for m in reversed(item.messages) if m.role == "user"), "")
