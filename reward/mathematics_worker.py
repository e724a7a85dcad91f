"""The process in which answers are compared (`python -m reward.mathematics_worker`); see reward/workers.py."""

import logging
import re
from functools import lru_cache
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from reward.workers import serve

MEMORY = 4 << 30  # bytes
BOXED_FIRST = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
IS_MARKED = re.compile(r"\$|\\\(|\\\[|\\boxed|\\begin")


def compare(question: dict[str, str]) -> dict[str, bool | None]:
    """Whether the answer in a response is equal to the right one; None where the right one is no mathematics."""
    right = _right(question["gold"])
    if not right:
        return {"equal": None}
    # math-verify's own limits are signals; the process that asks ends this one instead.
    found = parse(question["answer"], BOXED_FIRST, parsing_timeout=None)
    return {"equal": bool(verify(right, found, timeout_seconds=None))}


@lru_cache(maxsize=1024)
def _right(gold: str) -> list[Any]:
    marked = bool(IS_MARKED.search(gold))
    number = gold.replace(",", "") if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", gold) else gold
    text = gold if marked else f"${number}$"
    found = parse(text, BOXED_FIRST, parsing_timeout=None, fallback_mode="no_fallback")
    return list(found)


if __name__ == "__main__":
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    serve(compare, MEMORY)
