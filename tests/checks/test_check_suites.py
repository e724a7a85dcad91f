"""Looks at the benchmarks between rounds."""

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time

import pytest
from mini import TINY

from selfplay.checks import suites
from selfplay.checks.suites import benchmarks
from selfplay.config import Config, load
from selfplay.errors import ConfigError, InputError

RULES = {"rules": [{"rule": "length", "max": 3}]}
CHOICE = {"question": "Which?", "choices": ["x", "y"], "answer": 0}


@pytest.fixture
def look(tmp_path):
    def found(*rows, **settings):
        path = tmp_path / "suite.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        suite = {"name": "s", **({"file": str(path)} if "task" not in settings else {}), **settings}
        config = load(TINY, [f"evaluate.suites={json.dumps([suite])}"])
        assert Config.model_validate(config.model_dump(mode="json")) == config  # as processes hand it on
        return [(finding.level, finding.about, finding.text) for finding in benchmarks(config, tmp_path)]

    return found


def test_a_suite_that_can_be_asked(look):
    assert look(CHOICE, CHOICE) == [
        ("ok", "evaluate.suites s", "2 of 2 rows of multiple choice, every round; it is reported only")
    ]
    ((_, _, text),) = look({"prompt": "?"}, reward=RULES, prompts=8, every=3, gate={"max_drop": 0.02})
    assert text == (
        "1 of 1 rows whose answers a reward scores, every 3 rounds; it vetoes a fall of more than 0.02 at 95% confidence"
    )


def test_settings_of_the_other_kind_are_named(look):
    with pytest.raises(ConfigError, match=r"evaluate.suites s: .* is multiple choice, which needs no reward"):
        look(CHOICE, reward=RULES)
    with pytest.raises(ConfigError, match="need a `reward`"):
        look({"prompt": "?"})
    with pytest.raises(ConfigError, match="multiple choice has no metric 'f1'"):
        look(CHOICE, metric="f1")
    unknown = {"prompt": "?", "instruction_id_list": ["length:of_a_mile"], "kwargs": [{}]}
    with pytest.raises(InputError, match=r"suite s: .*suite.jsonl, row 1: .*length:of_a_mile"):
        look(unknown, reward={"source": {"kind": "instructions"}})
    with pytest.raises(InputError, match="has no rows"):
        look(reward=RULES)
    with pytest.raises(ConfigError, match="`chat` has no meaning for a suite with a `file`"):
        look(CHOICE, chat=False)
    with pytest.raises(ConfigError, match="is no folder"):
        look(task="t", include_path="/nowhere")


def test_a_hub_that_drips_does_not_hold_up_the_check(monkeypatch):
    def drip(listener):
        taken, _ = listener.accept()
        with taken, contextlib.suppress(OSError):
            taken.sendall(b"HTTP/1.1 200 OK\r\n")
            for _ in range(40):
                time.sleep(0.05)
                taken.sendall(b"x: y\r\n")
            taken.sendall(b"\r\n")

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(suites, "HUB_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        threading.Thread(target=drip, args=(listener,), daemon=True).start()
        assert suites._no_network() == "LateAnswer"


@pytest.mark.slow
def test_a_task_that_fetches_code_is_refused(tmp_path):
    """By a metric that the harness does not know, and by a function of its own."""
    (tmp_path / "own.py").write_text(
        "import evaluate\ntry:\n    evaluate.load('theirs')\nexcept Exception:\n    pass\n"
    )
    (tmp_path / "own.jsonl").write_text(json.dumps(CHOICE) + "\n")
    for task, metric, target in (("by_metric", "theirs", "answer"), ("by_function", "acc", "!function own.target")):
        (tmp_path / f"{task}.yaml").write_text(
            f"task: {task}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'own.jsonl'}}}}}\n"
            "test_split: test\noutput_type: multiple_choice\n"
            f'doc_to_text: "{{{{question}}}}"\ndoc_to_choice: "{{{{choices}}}}"\ndoc_to_target: {target}\n'
            f"metric_list:\n  - metric: {metric}\n    aggregation: mean\n    higher_is_better: true\n"
        )
    loads = (
        "import sys\nfrom selfplay.config import SuiteConfig\nfrom selfplay.errors import InputError\n"
        "from selfplay.evaluation.harness_job import load\n"
        "for task in ('by_metric', 'by_function'):\n"
        "    try: load(SuiteConfig(name='s', task=task, include_path=sys.argv[1]))\n"
        "    except InputError as error: print(error, error.hint, sep='; ')\n"
    )
    ran = subprocess.run([sys.executable, "-c", loads, str(tmp_path)], check=True, capture_output=True, text=True)
    for task, said in zip(("by_metric", "by_function"), ran.stdout.splitlines(), strict=True):
        assert f"the task {task} takes theirs from the library evaluate" in said and "trust_remote_code: true" in said


@pytest.mark.slow
def test_a_task_that_needs_a_download_is_named(look, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    (tmp_path / "remote.yaml").write_text(
        "task: mini_remote\ndataset_path: someone/questions\ntest_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
    )
    ((level, about, text),) = look(task="mini_remote", include_path=str(tmp_path))
    assert (level, about) == ("error", "evaluate.suites s")
    assert "the task mini_remote cannot be loaded: ConnectionError" in text
    assert "HF_HUB_OFFLINE is set" in text
