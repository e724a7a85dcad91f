"""The lines of the protocol: what is an event and what is only printed."""

import pytest

from selfplay.processes.protocol import encode_line, parse_line


def test_an_event_is_one_line_and_comes_back_as_it_was():
    event = {"id": 7, "event": "progress", "text": "two\nlines, «ε», \ud83d alone", "share": 0.1}
    line = encode_line(event)
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    assert parse_line(line[:-1]) == event


@pytest.mark.parametrize(
    "line", [b"", b"a print", b"[1, 2]", b"17", b"{a set}", b'{"half": ', b'{"id": 1} and more', b"{\xff"]
)
def test_what_is_no_event_is_only_printed(line):
    assert parse_line(line) is None


def test_numbers_that_are_no_json_are_refused():
    with pytest.raises(ValueError):
        encode_line({"result": float("nan")})
