"""A program for the sandbox: runs the tests of a prompt. The functions that they call are in another sandbox.

Arguments: descriptors of the tests, of the replies and of the calls. It writes a line for each test on stdout, whether it
passed, and nothing else gets there. A function of the answer is a stub here: its arguments are sent, and a plain value comes
back, so the answer can only return values and never decides what is equal to what.
"""

import ast
import builtins
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from reward.sandbox.values import dumps, loads

MOST = 4 << 20  # characters of a reply


class Unsupported(BaseException):
    """A test calls a function with what is no plain value."""


class Gone(Exception):
    """The process of the answer has ended."""


def main() -> None:
    given, replies, calls = map(int, sys.argv[1:4])
    with os.fdopen(given, encoding="utf-8") as file:
        tests = json.load(file)
    verdicts = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
    print(json.dumps("begun"), file=verdicts, flush=True)
    answer = Answer(os.fdopen(replies, encoding="utf-8"), os.fdopen(calls, "w", encoding="utf-8"))
    space = _namespace(tests["setup"], tests["tests"], answer)
    begins = [_passes(source, space) for source in tests["setup"]]
    for source in tests["tests"]:
        found = next((other for other in begins if other is not True), None)
        print(json.dumps(_passes(source, space) if found is None else found), file=verdicts, flush=True)


def _passes(source: str, space: dict[str, Any]) -> bool | str:
    """Whether a part of the tests runs without an error, or why it never can in a sandbox."""
    try:
        exec(compile(source, "tests.py", "exec"), space)
    except Unsupported as error:
        return str(error)
    except ModuleNotFoundError as error:
        return f"the tests need a package: {error}"
    except BaseException:
        return False
    return True


class Answer:
    """The functions of the answer."""

    def __init__(self, replies: TextIO, calls: TextIO) -> None:
        self._replies, self._calls = replies, calls
        try:
            names = self._read()
        except (Gone, ValueError):  # its code has failed
            names = []
        self.names = (
            frozenset(name for name in names if isinstance(name, str)) if isinstance(names, list) else frozenset()
        )

    def stub(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            try:
                line = dumps([name, list(arguments), keywords])
            except TypeError as error:
                raise Unsupported(f"{name} is called with a value that cannot be sent: {error}") from None
            try:
                print(line, file=self._calls, flush=True)
            except BrokenPipeError:
                raise Gone from None
            reply = self._read()
            if "raised" in reply:
                kind = getattr(builtins, str(reply["raised"]), RuntimeError)
                is_one = isinstance(kind, type) and issubclass(kind, Exception)
                raise (kind if is_one else RuntimeError)(str(reply["message"]))
            _take_over(arguments, loads(reply["arguments"]))
            return loads(reply["value"])

        return call

    def _read(self) -> Any:
        line = self._replies.readline(MOST)
        if not line.endswith("\n"):
            raise Gone
        return json.loads(line)


def _take_over(arguments: Sequence[Any], after: Sequence[Any]) -> None:
    """What the function has done to the lists, dicts and sets that it was given."""
    for mine, theirs in zip(arguments, after, strict=True):
        if isinstance(mine, list) and isinstance(theirs, list):
            mine[:] = theirs
        elif (isinstance(mine, dict) and isinstance(theirs, dict)) or (
            isinstance(mine, set) and isinstance(theirs, set)
        ):
            mine.clear()
            mine.update(theirs)


def _namespace(setup: Sequence[str], tests: Sequence[str], answer: Answer) -> dict[str, Any]:
    """What the tests use without defining it: functions of the answer, and modules of the standard library."""
    used, known = set[str](), set(dir(builtins))
    for node in ast.walk(ast.parse("\n".join([*setup, *tests]))):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else known).add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            known.add(node.name)
        elif isinstance(node, ast.arg):
            known.add(node.arg)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            known.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
    missing = used - known
    stubs = {name: answer.stub(name) for name in missing & answer.names}
    modules = {n: importlib.import_module(n) for n in missing - answer.names if n in sys.stdlib_module_names}
    return {"__name__": "tests", **modules, **stubs}


main()
