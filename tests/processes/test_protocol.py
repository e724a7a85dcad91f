"""The lines of the protocol: what is an event and what is only printed; and how a child imports."""

import gc
import importlib.metadata
import sys

import pytest

from selfplay.processes import installed
from selfplay.processes.protocol import encode_line, parse_line, quick_imports


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


def test_imports_of_a_child_are_made_without_collections_and_stay_out_of_later_ones(monkeypatch):
    monkeypatch.delitem(sys.modules, "sklearn", raising=False)
    known = importlib.metadata.packages_distributions
    frozen, made = gc.get_freeze_count(), [[] for _ in range(1000)]
    with quick_imports():
        assert not gc.isenabled() and sys.modules["sklearn"] is None
        assert importlib.metadata.packages_distributions is installed.packages_distributions
    assert gc.isenabled() and gc.get_freeze_count() >= frozen + len(made)
    assert importlib.metadata.packages_distributions is known and "sklearn" not in sys.modules


@pytest.mark.slow
def test_packages_that_are_installed_are_those_that_the_standard_library_finds():
    assert installed.packages_distributions() == importlib.metadata.packages_distributions()
