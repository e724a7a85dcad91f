"""The tables of what can be added."""

import subprocess
import sys
from pathlib import Path

import pytest

from selfplay import kinds

ROOT = Path(__file__).parents[1]

TABLES = [table for name, table in vars(kinds).items() if name.isupper()]


def test_every_module_in_a_table_can_be_imported():
    assert kinds.TRACKERS in TABLES
    for table in TABLES:
        for name in table:
            assert kinds.resolve(table, name).__doc__, f"{name} says what it is"


def test_a_name_that_a_table_does_not_list_is_refused_with_those_that_it_does():
    check = kinds.one_of({"a": "json", "b": "re"}, "none")
    assert [check(name) for name in ("a", "b", "none")] == ["a", "b", "none"]
    with pytest.raises(ValueError, match="should be 'a', 'b' or 'none', not 'c'"):
        check("c")


def test_the_tables_import_nothing_but_the_standard_library():
    code = "import sys; before = {*sys.modules}; import selfplay.kinds; print(*{*sys.modules} - before - sys.stdlib_module_names)"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    new = {name for name in done.stdout.split() if name.partition(".")[0] not in sys.stdlib_module_names}
    assert new == {"selfplay", "selfplay.kinds"}
