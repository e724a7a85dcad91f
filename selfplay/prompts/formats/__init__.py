"""What a row of a prompt file may look like, and what it asks.

known.py          the formats, first match first: a new one is a function and a line in FORMATS
conversations.py  conversations of every shape, their roles, and the prompt that one is
transcripts.py    conversations that are one text
texts.py          the text of a value
reading.py        rows of a source by its settings
report.py         what was recognised, in words
identity.py       the name of a conversation
"""

from selfplay.prompts.formats.identity import canonical, hash_of, hashes_of, names, prompt_id
from selfplay.prompts.formats.reading import DEFAULT, Found, Reading, Row, messages_of

__all__ = [
    "DEFAULT",
    "Found",
    "Reading",
    "Row",
    "canonical",
    "hash_of",
    "hashes_of",
    "messages_of",
    "names",
    "prompt_id",
]
