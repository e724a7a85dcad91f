"""Rewards by rule: a weighted sum of Python functions of the response. Their settings are in reward/settings.py."""

import hashlib
import importlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import regex

from reward.dialects import UNLIMITED
from reward.schema import Health, Item
from reward.scorer import ModelRefused, OneByOne, Unscorable
from reward.settings import Exact, Format, Function, Json, Length, Numeric, Regex, Rule

SECONDS = 1.0  # for one pattern in one response, because some patterns take exponential time
NUMBER = regex.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d{1,300})(?:\.\d{1,300})?(?:[eE][+-]?\d{1,3})?(?:/\d{1,300})?")
BOXED = regex.compile(r"\\boxed\{([^{}]*)\}")
FENCE = regex.compile(r"\A\s*```(?:json)?\s*\n(.*?)\n?```\s*\Z", regex.DOTALL)

Value = Callable[[Item], float]


class Rules(OneByOne):
    """A Scorer of rules. Raises ModelRefused for rules that cannot be applied."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules: list[tuple[str, float, Value]] = []
        files: dict[str, str] = {}
        for rule in rules:
            try:
                value, read_files = _value(rule)
            except (OSError, ValueError, regex.error, ImportError, AttributeError) as error:
                raise ModelRefused(f"the rule {rule.rule}: {error}") from error
            files |= read_files
            self._rules.append((rule.rule, rule.weight, value))
        made_of = json.dumps([[r.model_dump() for r in rules], files], sort_keys=True)
        super().__init__(
            Health(
                kind="rules",
                model=" + ".join(f"{r.weight:g} {r.rule}" for r in rules),
                parameters=0,
                dtype="none",
                device="cpu",
                max_tokens=UNLIMITED,
                weights_sha256=hashlib.sha256(made_of.encode()).hexdigest(),
                template_sha256=hashlib.sha256(b"").hexdigest(),
                files=files,
            )
        )

    def value(self, item: Item) -> float:
        """The sum of weight × value over the rules. Raises Unscorable where a rule has no value for the item."""
        total = 0.0
        for name, weight, value in self._rules:
            try:
                total += weight * value(item)
            except Unscorable as error:
                self.counts[f"{name} without a value"] += 1
                raise Unscorable(f"the rule {name}: {error}") from error
        return total


def _value(rule: Rule) -> tuple[Value, dict[str, str]]:
    """A function of the item, and the SHA-256 of the files that it depends on."""
    match rule:
        case Length():
            return lambda item: _length(rule, item.response), {}
        case Format():
            body = "".join(rf"\s*<{t}>(?:(?!</?{t}>).)*</{t}>\s*" for t in rule.tags)
            whole = regex.compile(body, regex.DOTALL)
            return lambda item: float(_timed(whole.fullmatch, item.response) is not None), {}
        case Regex():
            pattern = regex.compile(rule.pattern)
            return lambda item: float((_timed(pattern.search, item.response) is None) == rule.absent), {}
        case Json():
            return lambda item: float(_is_json(rule, item.response)), {}
        case Function():
            return _function(rule)
        case Exact() | Numeric():
            known, files = _references(rule.references)
            found = regex.compile(rule.pattern) if rule.pattern else None
            if found is not None and found.groups < 1:
                raise ValueError(f"the pattern {rule.pattern!r} has no group: (…) says what the answer is")
            return lambda item: float(_is_answer(rule, found, known, item)), files


def _length(rule: Length, response: str) -> float:
    n = len(response.split()) if rule.unit == "words" else len(response)
    if rule.max is not None and n > rule.max:
        return max(0.0, 2 - n / rule.max)
    return n / rule.min if n < rule.min else 1.0


def _is_json(rule: Json, response: str) -> bool:
    def no_json(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    block = _timed(FENCE.match, response) if rule.fenced else None
    try:
        value = json.loads(block.group(1) if block else response, parse_constant=no_json)
    except (ValueError, RecursionError):
        return False
    return not rule.keys or (isinstance(value, dict) and all(key in value for key in rule.keys))


def _is_answer(rule: Exact | Numeric, pattern: Any, known: dict[str, str], item: Item) -> bool:
    asked = next((m.content for m in reversed(item.messages) if m.role == "user"), "")
    reference = item.reference if item.reference is not None else known.get(asked)
    if reference is None:
        raise Unscorable("no reference answer is known for this prompt")
    answer: str | None = item.response
    if pattern is not None:
        answer = next(
            (m.group(1) for m in reversed(_timed(lambda t, **o: list(pattern.finditer(t, **o)), item.response))), None
        )
    if answer is None:
        return False
    if isinstance(rule, Exact):
        given, right = " ".join(answer.split()), " ".join(reference.split())
        return given.casefold() == right.casefold() if rule.ignore_case else given == right
    wanted, number = _number(reference), _number(answer)
    if wanted is None:
        raise Unscorable(f"its reference {reference[:50]!r} is no number")
    return number is not None and abs(number - wanted) <= rule.tolerance * max(1.0, abs(wanted))


def _number(text: str) -> float | None:
    """The last boxed number, or else the last number; None without one."""
    boxed = BOXED.findall(text)
    found = NUMBER.findall(boxed[-1] if boxed else text)
    if not found:
        return None
    numerator, _, denominator = found[-1].replace(",", "").partition("/")
    try:
        value = float(numerator) / float(denominator or 1)
    except ZeroDivisionError:
        return None
    return value if math.isfinite(value) else None


def _function(rule: Function) -> tuple[Value, dict[str, str]]:
    module_name, _, name = rule.function.partition(":")
    module = importlib.import_module(module_name)
    function = getattr(module, name)

    def value(item: Item) -> float:
        messages = [{"role": m.role, "content": m.content} for m in item.messages]
        try:
            number = float(function(messages, item.response, item.reference, **rule.options))
        except Exception as error:  # the user's own code
            raise Unscorable(f"{rule.function} raised {type(error).__name__}: {error}") from error
        if not math.isfinite(number):
            raise Unscorable(f"{rule.function} returned {number}")
        return number

    source = getattr(module, "__file__", None)
    return value, {rule.function: _sha256(Path(source))} if source else {}


def _references(source: str | None) -> tuple[dict[str, str], dict[str, str]]:
    if source is None:
        return {}, {}
    path = Path(source).expanduser()
    known: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        row = json.loads(line)
        if not isinstance(row, dict) or not {"prompt", "reference"} <= row.keys():
            raise ValueError(f"{source}, line {number}: `prompt` and `reference` are needed")
        known[str(row["prompt"])] = str(row["reference"])
    return known, {source: _sha256(path)}


def _timed(search: Callable[..., Any], text: str) -> Any:
    try:
        return search(text, timeout=SECONDS)
    except TimeoutError as error:
        raise Unscorable(f"its pattern took more than {SECONDS:g} s") from error


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
