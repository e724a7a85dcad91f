"""Sentences and words of a text, as far as constraints count them.

Sentences are found by rules. A sentence ends with a full stop, a question mark or an exclamation mark before white space.
A full stop does not end one behind an abbreviation, behind a single letter (an initial), and as part of an ellipsis before a
word without a capital. A new line alone ends no sentence, so a list without full stops is one sentence.

IFEval counts with nltk's trained model for English (Punkt), whose data has to be downloaded. The rules here are its
untrained rules with a list of abbreviations. The two differ where the trained model has learnt that a word with a capital
begins a sentence behind an abbreviation («at 5 p.m. He left»), and on abbreviations that are not in the list.
"""

import re

# Those behind which the same sentence mostly goes on, without their last full stop.
ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof rev hon gov sen rep gen col maj capt lt sgt cpl cmdr adm supt sr jr st ste mt ft messrs mme mlle "
    "e.g i.e cf al viz vs v ca approx nos vol vols fig figs eq eqs eds p pp ch sec op cit ibid "
    "inc ltd co corp bros llc plc dept univ assn est govt "
    "jan feb apr jun jul aug sep sept oct nov dec mon tue tues thu thur thurs fri "
    "ave blvd rd hwy sq bldg apt u.s u.k u.n e.u d.c u.s.a a.m p.m ph.d m.d b.a m.a b.s m.s b.sc m.sc a.d b.c".split()
)
CLOSING = "\"')]}»”’*_"
OPENING = "\"'([{«“‘*_"

_END = re.compile(rf"[.?!]+[{re.escape(CLOSING)}]*(?=\s)")
_WORD = re.compile(r"\w+")
_TOKEN = re.compile(
    r"""\.{2,} | -- | [\u2012-\u2015] | (?:n't|'(?:ll|re|ve|[smd]))(?=[\s.,;:!?)\]}"]|$)
    | (?: (?!\.{2,}|--|(?:n't|'(?:ll|re|ve|[smd]))(?:[\s.,;:!?)\]}"]|$)) [^\s;@\#$%&?!*\[\](){}<>"«»“”‘’`,:\u2012-\u2015]
        | (?<=\d)[,:](?=\d) )+""",
    re.VERBOSE | re.IGNORECASE,
)


def count_sentences(text: str) -> int:
    """How many sentences a text has."""
    text = text.strip()
    return 1 + sum(_ends_there(text, end) for end in _END.finditer(text)) if text else 0


def _ends_there(text: str, end: re.Match[str]) -> bool:
    mark = end.group().rstrip(CLOSING)
    if not mark.endswith("."):
        return True
    before = re.split(r"\s", text[max(0, end.start() - 40) : end.start()])[-1].lstrip(OPENING)
    after = text[end.end() :].lstrip().lstrip(OPENING)
    if len(mark) > 1:  # an ellipsis
        return after[:1].isupper()
    return before.casefold() not in ABBREVIATIONS and not (len(before) == 1 and before.isalpha())


def count_words(text: str) -> int:
    """How many runs of letters, digits and underscores a text has."""
    return len(_WORD.findall(text))


def count_capital_words(text: str) -> int:
    """How many words have capitals alone. A hyphenated word is one; of a contraction (IT'S) both parts are words."""
    return sum(token.isupper() for token in _TOKEN.findall(text))
