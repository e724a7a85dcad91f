"""Code that runs in a real sandbox: what passes, what may not count, and what the sandbox keeps off."""

import contextlib
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from reward_world import process_of

from reward import programs
from reward.client import RewardClient, RewardUnavailable
from reward.programs import Programs, code_of
from reward.sandbox import run
from reward.schema import Item
from reward.scorer import ModelRefused, Score

LIMITS = {"seconds": 5.0, "cpu_seconds": 1, "memory_mib": 256, "processes": 4, "files_mib": 2, "output_kib": 64}
ADD = json.dumps({"test_list": ["assert add(1, 2) == 3", "assert add([1], [2]) == [1, 2]"]})


@pytest.fixture(scope="module")
def sandbox():
    try:
        run.require()
    except ModelRefused as error:  # such as a container whose profile forbids namespaces
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def scorer(sandbox):
    [found] = Programs(value="share", **LIMITS).scorers()
    return found


def scored(scorer, code, reference=ADD) -> Score:
    messages = [{"role": "user", "content": "Write it."}]
    [score] = scorer.score([Item.model_validate({"messages": messages, "response": code, "reference": reference})])
    return score


@pytest.mark.slow
def test_a_sandbox_works_in_a_process_of_many_descriptors(scorer, many_descriptors):
    assert scored(scorer, "def add(a, b):\n    return a + b").value == 1.0


def printed(scorer, code, expected="42\n", given=""):
    """The value of a program that has to print something."""
    return scored(scorer, code, json.dumps({"inputs": [given], "outputs": [expected]})).value


RIGHT = "def add(a, b):\n    return a + b"


@pytest.mark.parametrize(
    ("code", "share"),
    [
        (RIGHT, 1.0),
        (f"Here it is:\n```python\n{RIGHT}\n```\nIt adds.", 1.0),
        ("def add(a, b):\n    return 3", 0.5),
        ("def add(a, b):\n    return a - b", 0.0),
        ("def plus(a, b):\n    return a + b", 0.0),
        ("def add(a, b:", 0.0),
        (f"{RIGHT}\nprint('x' * 200_000)", 1.0),
        ("", 0.0),
    ],
)
def test_the_share_of_tests_that_pass(scorer, code, share):
    assert scored(scorer, code) == Score(value=share)


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "def add(a, b):\n    import os\n    os._exit(0)",
        "def add(a, b):\n    raise SystemExit(0)",
        # objects that are equal to everything
        "class Any:\n    __eq__ = lambda self, other: True\ndef add(a, b):\n    return Any()",
        "class Any(int):\n    __eq__ = lambda self, other: True\ndef add(a, b):\n    return Any(7)",
        # other meanings of what the tests use
        "import builtins\nbuiltins.AssertionError = ValueError\ndef add(a, b):\n    return None",
        "AssertionError = __debug__ if False else None\ndef add(a, b):\n    return None",
        # verdicts of its own, on every descriptor that there is
        "import os\nfor fd in range(64):\n    try:\n        os.write(fd, b'\"begun\"\\ntrue\\ntrue\\n')\n    except OSError: pass\nos._exit(0)",
        # no function, but a way to keep what calls it waiting
        "while True: pass",
    ],
)
def test_what_only_looks_like_success_does_not_count(scorer, code):
    assert scored(scorer, code).value == 0.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reference", "code"),
    [
        ('["assert f(2) == 4", "assert f(-1) == 1"]', "def f(x):\n    return x * x"),
        ("import math\nassert math.isclose(f(2), 2 ** 0.5)\nassert f(4) == 2", "def f(x):\n    return x ** 0.5"),
        (
            json.dumps({"test": "def check(candidate):\n    assert candidate('a') == 'aa'\n", "entry_point": "f"}),
            "def f(s):\n    return s * 2",
        ),
        (
            json.dumps(
                {
                    "test_list": ["assert set(f((3, 4), (5, 4))) == {4}", "x = [3, 1]\nassert g(x) is None and x == [1, 3]"],
                    "test_imports": ["import math"],
                }
            ),
            "def f(a, b):\n    return filter(set(b).__contains__, a)\ndef g(x):\n    x.sort()",
        ),
        (
            "try:\n    f(0)\nexcept ZeroDivisionError:\n    caught = True\nassert caught\nassert f(4) == .25",
            "def f(x):\n    return 1 / x",
        ),
        (json.dumps({"inputs": ["1 2\n", "3 4"], "outputs": ["3 \n", "7"]}), "print(sum(map(int, input().split())))"),
    ],
)  # fmt: skip
def test_the_forms_of_tests(scorer, reference, code):
    assert scored(scorer, code, reference) == Score(value=1.0)
    assert scored(scorer, "def f(*a):\n    return 0\ng = f", reference).value == 0.0


@pytest.mark.parametrize(
    ("reference", "why"),
    [
        (None, "the prompt needs tests"),
        ("[]", "no tests"),
        ("18", "no tests"),
        ("assert f(", "no Python"),
        ('{"inputs": ["1"], "outputs": []}', "as many outputs"),
        ('{"inputs": [[1]], "outputs": [1], "fn_name": "f"}', "fn_name"),
        ('["assert f(lambda x: x) == 1"]', "cannot be sent"),
        ('{"test_list": ["assert f(1)"], "test_imports": ["import numpy_of_nowhere"]}', "need a package"),
    ],
)
def test_tests_that_cannot_run_give_no_score(scorer, reference, why):
    score = scored(scorer, "def f(x):\n    return 1", reference)
    assert score.value is None and why in score.reason


@pytest.mark.slow
def test_the_sandbox_keeps_off_what_it_says(scorer, monkeypatch, tmp_path):
    monkeypatch.setenv("A_SECRET", "hunter2")
    (tmp_path / "file").write_text("secret")
    attempts = {
        "import os\nprint(sorted(os.environ))": "['LC_CTYPE', 'PYTHONHASHSEED']",
        f"import os\nprint(os.path.exists({str(tmp_path)!r}), os.path.exists('/proc/self'), os.listdir('.'))": "False False []",
        "import os\nprint(os.getuid() == 0, os.getpid() < 5)": "False True",
        "import socket\ntry:\n    socket.create_connection(('127.0.0.1', 22), 1)\nexcept OSError as e:\n    print(e.errno)": "101",
        "try:\n    open('/usr/x', 'w')\nexcept OSError as e:\n    print(e.errno)": "30",
        "import ctypes\nprint(ctypes.CDLL(None).unshare(0x10000000))": "-1",
        "try:\n    x = 'a' * (1 << 30)\nexcept MemoryError:\n    print('too much')": "too much",
        (
            "try:\n    for i in range(8):\n        open(f'{i}', 'w').write('x' * (1 << 20))\n"
            "except OSError as e:\n    print(e.errno)"
        ): "28",
        "import os\nn = 0\ntry:\n    while n < 99:\n        os.fork() or os.execv('/bin/sleep', ['sleep', '99'])\n        n += 1\n"
        "except OSError:\n    print(n)": "3",
        "import threading\nprint(threading.active_count())": "1",
    }  # fmt: skip
    assert {code: printed(scorer, code, said) for code, said in attempts.items()} == dict.fromkeys(attempts, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",  # by the processor time
        "while True: print('x' * 1000)",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "x = [0]\nwhile True: x += x",
        "open('a', 'w').write('x' * (8 << 20))\nprint(42)",
        "print(42)\nraise SystemExit(1)",
    ],
)
def test_what_does_not_end_is_ended(scorer, code):
    began = time.monotonic()
    assert printed(scorer, code) == 0.0
    assert time.monotonic() - began < 2 * LIMITS["seconds"]  # the sandbox itself has to be made and to be ended
    within(1, lambda: left() == [])  # the kernel takes a moment


def test_what_goes_on_behind_its_program_is_ended_with_it(scorer):
    assert printed(scorer, "import os\nif os.fork() == 0:\n    os.setsid()\n    while True: pass\nprint(42)") == 1.0
    within(1, lambda: left() == [])  # the kernel takes a moment


def left():
    """Processes of sandboxes that still run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found += [folder.name] * (b"answer.py" in (folder / "cmdline").read_bytes())
    return found


def test_a_sandbox_that_cannot_be_had_is_refused(monkeypatch):
    """As in a container whose profile forbids new namespaces."""
    forbidden = run.LAUNCH.replace("libc.unshare(NEW)", "-1")
    monkeypatch.setattr(run, "LAUNCH", forbidden)
    with pytest.raises(
        ModelRefused, match=r"code needs a sandbox, and none can be had here: new namespaces: .*user namespaces"
    ):
        Programs().scorers()


@pytest.mark.service
def test_nothing_outlives_a_server_that_is_killed(sandbox):
    settings = json.dumps({**LIMITS, "seconds": 60, "cpu_seconds": 60, "value": "share"})
    with (
        process_of("--kind", "code", "--settings", settings) as (server, line),
        RewardClient(line["url"], deadline=20) as client,
    ):
        messages = [{"role": "user", "content": "Write it."}]
        assert client.score([(messages, RIGHT), (messages, "")], references=[ADD, ADD]) == [1.0, 0.0]
        asked = [(messages, "while True: pass")]
        with ThreadPoolExecutor(1) as threads:
            answer = threads.submit(client.score, asked, references=[ADD])
            within(10, lambda: left() != [])
            server.kill()
            within(5, lambda: left() == [])
            client.interrupt(RewardUnavailable("the server was killed"))
            with pytest.raises(RewardUnavailable, match="was killed"):
                answer.result()


def within(seconds, holds):
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_the_code_of_a_response():
    assert code_of("a\n```python\nx\n```\nb\n```py\ny\n```\nc\n```text\nz\n```") == "y\n"
    assert code_of("print(1)") == "print(1)"
    assert programs.tests_of("assert f(1)").statements == ("assert f(1)",)
    assert programs.HERE.is_dir() and sys.platform == "linux"
