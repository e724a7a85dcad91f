"""Answers that are code, which is run with the tests of their prompt in a sandbox (reward/sandbox).

The code is the last fenced block of the response, or all of it where it has none. Tests that call functions run in a sandbox
of their own: the code gets arguments and returns plain values, and never sees what they are compared with. docs/rewards.md
says what the sandbox keeps off, and what it does not.
"""

import ast
import contextlib
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from reward.kinds import Kind
from reward.sandbox.run import HERE, Limits, Running, SandboxFailed, require, running
from reward.schema import Item
from reward.scorer import OneByOne, Unscorable

BLOCK = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL)
PYTHON = ("python", "python3", "py", "")
_SHARED = """
import sys, types
for name in ("reward", "reward.sandbox", "reward.sandbox.values"):
    sys.modules[name] = types.ModuleType(name)
exec(compile({values!r}, "values.py", "exec"), sys.modules["reward.sandbox.values"].__dict__)
"""


class Programs(Kind):
    """Runs the code of an answer with the tests of its prompt."""

    access: ClassVar[frozenset[str]] = frozenset({"sandboxes"})
    made_of: ClassVar[tuple[str, ...]] = tuple(
        f"reward.sandbox.{name}" for name in ("run", "launch", "functions", "asserts", "program", "values")
    )
    value: Literal["all", "share"] = "all"
    """`all`: 1 where every test passes, otherwise 0. `share`: the share of tests that pass."""
    seconds: Annotated[float, Field(gt=0)] = 20.0
    """Of the wall clock, for all tests that call functions together, and for each case of input and output."""
    cpu_seconds: Annotated[int, Field(ge=1)] = 5
    """Processor time of each process."""
    memory_mib: Annotated[int, Field(ge=64)] = 512
    """Address space of each process."""
    processes: Annotated[int, Field(ge=1)] = 8
    """Processes and threads at a time in one sandbox."""
    files_mib: Annotated[int, Field(ge=1)] = 16
    """All files together that it may write. They are gone with the sandbox."""
    output_kib: Annotated[int, Field(ge=1)] = 1024
    """What a program may print for one case."""
    sandboxes: Annotated[int, Field(ge=1)] = 1
    """Answers that run at a time, each for a request of its own."""

    def require(self) -> None:
        require()

    def unreadable(self, reference: str | None) -> str | None:
        try:
            tests_of(reference)
        except ValueError as error:
            return str(error)
        return None

    def scorers(self) -> list[OneByOne]:
        self.require()
        return [ProgramScorer(self) for _ in range(self.sandboxes)]


@dataclass(frozen=True, slots=True)
class Tests:
    """What an answer is tried with: either statements that call its functions, or inputs and outputs of a program."""

    setup: tuple[str, ...] = ()
    statements: tuple[str, ...] = ()
    cases: tuple[tuple[str, str], ...] = ()


class ProgramScorer(OneByOne):
    def __init__(self, settings: Programs) -> None:
        super().__init__(settings.health())
        self._all = settings.value == "all"
        self._limits = Limits(
            seconds=settings.seconds,
            cpu_seconds=settings.cpu_seconds,
            memory=settings.memory_mib << 20,
            processes=settings.processes,
            files=settings.files_mib << 20,
            output=settings.output_kib << 10,
        )
        shared = _SHARED.format(values=_source("values"))
        self._functions, self._asserts = (shared + _source(name) for name in ("functions", "asserts"))
        self._program = _source("program")

    def value(self, item: Item) -> float:
        try:
            tests = tests_of(item.reference)
        except ValueError as error:
            raise Unscorable(str(error)) from error
        code = code_of(item.response)
        try:
            code.encode()
        except UnicodeEncodeError:
            return 0.0  # a lone surrogate is in no program
        try:
            passed = self._called(code, tests) if tests.statements else self._printed(code, tests)
        except SandboxFailed as error:
            raise Unscorable(f"the sandbox failed: {error}") from error
        self.counts["tests"] += len(passed)
        self.counts["tests passed"] += sum(passed)
        return float(all(passed)) if self._all else sum(passed) / len(passed)

    def _called(self, code: str, tests: Tests) -> list[bool]:
        """Whether each statement passes, which calls functions of the code. Raises Unscorable where the tests cannot run."""
        content = json.dumps({"setup": tests.setup, "tests": tests.statements})
        with contextlib.ExitStack() as stack:
            code_file, tests_file = stack.enter_context(_file(code)), stack.enter_context(_file(content))
            pipes = [*os.pipe(), *os.pipe()]
            ends = [stack.enter_context(io.FileIO(fd, "rw"[n % 2])) for n, fd in enumerate(pipes)]
            calls, to_calls, replies, to_replies = pipes
            answer = stack.enter_context(self._running(self._functions, [code_file, calls, to_replies]))
            judge = stack.enter_context(self._running(self._asserts, [tests_file, replies, to_calls]))
            for end in ends:
                end.close()  # the sandboxes have them, and each sees when the other ends
            said, _ = judge.output(100 * (len(tests.statements) + 2) + 4096)
            answer.end()
        lines = said.decode(errors="replace").split("\n")[:-1]  # what has no end was not said whole
        if not lines:
            raise SandboxFailed("the tests did not begin")
        found = [json.loads(line) for line in lines[1:]]
        if never := next((why for why in found if isinstance(why, str)), None):
            raise Unscorable(never)
        return [passed is True for passed in found] + [False] * (len(tests.statements) - len(found))

    def _printed(self, code: str, tests: Tests) -> list[bool]:
        """Whether the code, as a program, prints the output of each case. White space at the ends of lines does not count."""
        passed: list[bool] = []
        for given, expected in tests.cases:
            if self._all and False in passed:
                passed.append(False)
                continue
            with (
                _file(code) as file,
                _file(given) as stdin,
                self._running(self._program, [file], stdin=stdin) as program,
            ):
                said, is_whole = program.output(self._limits.output)
            passed.append(is_whole and _lines(said.decode(errors="replace")) == _lines(expected))
        return passed

    def _running(
        self, program: str, fds: list[int], stdin: int | None = None
    ) -> contextlib.AbstractContextManager[Running]:
        return running(program, [str(fd) for fd in fds], self._limits, stdin=stdin, fds=fds)


def code_of(response: str) -> str:
    """The code of a response: its last fenced block of Python, or all of it where it has no such block."""
    blocks = [body for language, body in BLOCK.findall(response) if language.lower() in PYTHON]
    return blocks[-1] if blocks else response


@lru_cache(maxsize=1024)
def tests_of(reference: str | None) -> Tests:
    """The tests of a reference. Raises ValueError for one that has none."""
    if not reference:
        raise ValueError("no reference: the prompt needs tests")
    try:
        given = json.loads(reference)
    except (ValueError, RecursionError):
        given = None
    if isinstance(given, dict) and {"inputs", "outputs"} <= given.keys():
        return _cases(given)
    if isinstance(given, dict) and {"test", "entry_point"} <= given.keys():
        return _statements([given["test"]], [f"check({given['entry_point']})"])
    if isinstance(given, dict) and "test_list" in given:
        setup = [*(given.get("test_imports") or []), *filter(None, [given.get("test_setup_code")])]
        return _statements(setup, given["test_list"])
    if isinstance(given, list):
        return _statements([], given)
    if given is None:
        body = _parsed(reference).body
        tests = [ast.unparse(node) for node in body if isinstance(node, ast.Assert)]
        return _statements([ast.unparse(node) for node in body if not isinstance(node, ast.Assert)], tests)
    raise ValueError(f"the reference has no tests: {reference[:60]!r}")


def _statements(setup: list[Any], tests: list[Any]) -> Tests:
    if not tests or not all(isinstance(part, str) for part in [*setup, *tests]):
        raise ValueError("the reference has no tests: statements are needed, as texts")
    for part in [*setup, *tests]:
        _parsed(part)
    return Tests(setup=tuple(setup), statements=tuple(tests))


def _cases(given: dict[str, Any]) -> Tests:
    if given.get("fn_name"):
        raise ValueError("inputs and outputs with fn_name call a function: write them as assert statements")
    inputs, outputs = given["inputs"], given["outputs"]
    are_lists = isinstance(inputs, list) and isinstance(outputs, list)
    if not are_lists or not inputs or len(inputs) != len(outputs):
        raise ValueError("the reference needs as many outputs as inputs, and one at least")
    if not all(isinstance(text, str) for text in [*inputs, *outputs]):
        raise ValueError("inputs and outputs have to be texts")
    return Tests(cases=tuple(zip(inputs, outputs, strict=True)))


def _parsed(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the tests of the reference are no Python: {error}") from None


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _source(name: str) -> str:
    return (HERE / f"{name}.py").read_text(encoding="utf-8")


@contextlib.contextmanager
def _file(content: str) -> Iterator[int]:
    """The descriptor of a file in memory that holds a text, from its beginning."""
    fd = os.memfd_create("given")
    try:
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(content.encode(errors="surrogatepass"))
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)
