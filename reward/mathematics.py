"""Answers to questions of mathematics, which are checked by math-verify: fractions, LaTeX, sets, intervals, equations.

The answer of a response is what its last \\boxed{} holds, or else its last expression. The reference is an expression, LaTeX with or
without its dollars, or a worked solution that ends with its answer: behind `####` (GSM8K) or in \\boxed{} (MATH).
"""

import importlib.util
from typing import Annotated, ClassVar

from pydantic import Field

from reward.kinds import Kind
from reward.schema import Item
from reward.scorer import ModelRefused, OneByOne, Unscorable
from reward.workers import Ended, TooSlow, Worker


class Mathematics(Kind):
    """1 where the answer is equal to the reference, otherwise 0."""

    access: ClassVar[frozenset[str]] = frozenset({"processes"})
    made_of: ClassVar[tuple[str, ...]] = ("reward.mathematics_worker", "math-verify", "sympy")
    seconds: Annotated[float, Field(gt=0)] = 5.0
    """Most that one answer may take. An answer that takes longer has no score: what it is equal to was not found out."""
    processes: Annotated[int, Field(ge=1)] = 1
    """Processes that compare, each for a request of its own."""

    def require(self) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ModelRefused("math needs the package math-verify: pip install 'selfplay[verify]'")

    def unreadable(self, reference: str | None) -> str | None:
        return None if reference and gold(reference) else "no reference: the prompt needs an answer to compare with"

    def scorers(self) -> list[OneByOne]:
        self.require()
        return [MathScorer(self) for _ in range(self.processes)]


class MathScorer(OneByOne):
    def __init__(self, settings: Mathematics) -> None:
        super().__init__(settings.health())
        self._worker = Worker("reward.mathematics_worker", settings.seconds)
        self._worker.start()

    def value(self, item: Item) -> float:
        right = gold(item.reference or "")
        if not right:
            raise Unscorable("no reference: the prompt needs an answer to compare with")
        try:
            found = self._worker.ask({"gold": right, "answer": item.response})
        except TooSlow as error:
            self.counts["too slow to compare"] += 1
            raise Unscorable(f"the answer could not be compared: {error}") from error
        except Ended as error:
            self.counts["too large to compare"] += 1
            raise Unscorable(f"the answer could not be compared: {error}") from error
        if found["equal"] is None:
            raise Unscorable(f"its reference {right[:50]!r} is no mathematics")
        return float(found["equal"])


def gold(reference: str) -> str:
    """The answer in a reference: what stands behind the last `####`, or all of it."""
    return reference.rpartition("####")[2].strip()
