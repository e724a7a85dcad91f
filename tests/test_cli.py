"""The command line as a new user types it: in empty folders, on an empty ledger, and on a run of two rounds."""

import io
import json
import resource
import sqlite3
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from inspect import signature
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from daemon_world import waiting
from mini import ROOT, TINY, overrides
from typer.testing import CliRunner

from selfplay import cli
from selfplay import config as configuration
from selfplay.checks.check import check
from selfplay.checks.plan import plan
from selfplay.errors import ConfigError, InputError
from selfplay.reporting import report
from selfplay.service.orders import MAX_PROMPTS
from selfplay.storage import checkpoints
from selfplay.storage import ledger as store
from selfplay.storage.ledger import Store

on_a_run = pytest.mark.slow  # or on the mini world: both may have to be made first
FOLDERS = [
    "status", "rounds", "show 1", "pause", "resume", "run-now", "cancel", "rollback 0", "pin 0", "reload", "report",
    "export pairs out", "export policy out", "add-prompts more.jsonl", "answers", "take-over",
]  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(calm):
    return calm[0]


def selfplay(*args: object) -> tuple[int, str, str]:
    """`selfplay …` in this process: exit code, what it printed, and its errors; each on one line."""
    out, errors, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(errors):
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", ["selfplay", *map(str, args)])
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    return code, " ".join(out.getvalue().split()), " ".join(errors.getvalue().split())


def typed(*args: object) -> tuple[int, str, str]:
    """The same in a process of its own, as where a user types it."""
    done = subprocess.run(
        [sys.executable, "-m", "selfplay.cli", *map(str, args)], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, " ".join(done.stdout.split()), " ".join(done.stderr.split())


@pytest.mark.slow
def test_help_is_quick_and_names_every_command():
    seconds = []
    for _ in range(3):  # the first may have to write bytecode
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        code, out, _ = typed("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert code == 0
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5, seconds
    for command in ("init", "check", "round", "serve", "status", "rounds", "show", "pause", "resume", "rollback", "report", "export"):  # fmt: skip
        assert f" {command} " in out
    loaded = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "selfplay.cli", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    for heavy in ("torch", "pyarrow", "sqlalchemy", "nicegui", "pydantic"):
        assert f" {heavy}\n" not in loaded.stderr


@on_a_run
def test_what_a_run_says_of_itself(run_dir):
    at = ("--run-dir", run_dir)
    code, out, _ = typed("status", *at)
    assert code == 0 and "never served" in out and "round 2 promoted" in out and "policy 2 serves" in out
    code, out, _ = selfplay("rounds", *at)
    assert code == 0 and "promoted" in out and "held-out" in out
    code, out, _ = selfplay("show", 1, *at)
    assert code == 0 and "pairs" in out and "policy 1 is current" in out
    code, _, errors = typed("show", 7, *at)
    assert code == 2 and "there is no round 7" in errors and "finished: 1 to 2" in errors
    code, _, errors = selfplay("status", "--run-dir", run_dir / "nothing")
    assert code == 2 and "is no run folder: it does not exist" in errors and "what to do:" in errors


@pytest.mark.parametrize("command", FOLDERS)
def test_a_folder_that_is_none_of_a_run_is_named_with_what_to_do(command, tmp_path, monkeypatch):
    (tmp_path / "more.jsonl").write_text('{"prompt": "one"}\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^\. is no run folder: it has no ledger.sqlite$") as error:
        CliRunner().invoke(cli.app, [*command.split(), "--run-dir", "."], catch_exceptions=False)
    assert "--run-dir" in error.value.hint and "selfplay round" in error.value.hint
    with pytest.raises(ConfigError, match="^configs/tiny.yaml: no such file$") as missing:
        CliRunner().invoke(cli.app, command.split(), catch_exceptions=False)
    assert "--config" in missing.value.hint and "selfplay init" in missing.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["more.jsonl"]


def test_every_command_that_takes_a_run_folder_is_tried_on_one_that_is_none():
    takes = {
        c.name or c.callback.__name__
        for c in cli.app.registered_commands
        if "run_dir" in signature(c.callback).parameters
    }
    assert takes - {"check", "round", "serve"} == {command.split()[0] for command in FOLDERS}


def test_a_run_before_its_first_round_has_nothing_to_show(bare):
    at = ["--run-dir", str(bare.path.parent)]
    done = CliRunner().invoke(cli.app, ["status", *at])
    assert done.exit_code == 0 and "never served" in done.output and "policy   0 serves" in done.output
    assert CliRunner().invoke(cli.app, ["rounds", *at]).exit_code == 0
    with pytest.raises(InputError, match="there is no round 1") as error:
        CliRunner().invoke(cli.app, ["show", "1", *at], catch_exceptions=False)
    assert error.value.hint == "none is finished yet"


def test_a_file_that_cannot_be_written_is_an_error_of_two_lines(monkeypatch, capsys):
    words = ["init", "/proc/nothing/my.yaml", "--model", "org/m", "--reward", "org/r", "--prompts", "org/p"]
    monkeypatch.setattr(sys, "argv", ["selfplay", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 3 and len(said) == 2 and "/proc/nothing" in said[0]


@on_a_run
def test_orders_wait_in_the_ledger_for_a_service(run_dir):
    code, out, _ = selfplay("pause", "--after", "stage", "--run-dir", run_dir)
    assert code == 0 and "waits" in out
    code, _, errors = selfplay("pause", "--after", "lunch", "--run-dir", run_dir)
    assert code == 2 and "order pause: after" in errors
    code, _, errors = selfplay("rollback", 9, "--run-dir", run_dir)
    assert code == 2 and "there is no policy 9" in errors
    store = Store(run_dir)
    (order,) = waiting(store)
    assert (order["kind"], order["arguments"], order["origin"]) == ("pause", {"after": "stage"}, "cli")
    store.close()


@pytest.fixture
def bare(tmp_path):
    """A ledger with an initial policy, and nothing that serves it."""
    store = Store(tmp_path)
    store.open_run("bare", {})
    store.record_policy(0, "initial", round=0)
    yield store
    store.close()


@pytest.mark.parametrize(
    ("words", "kind", "arguments"),
    [
        (["pause"], "pause", {"after": "round"}), (["resume"], "resume", {}), (["run-now"], "run", {}), (["cancel"], "cancel", {}),
        (["rollback", "0"], "rollback", {"version": 0}), (["pin", "0"], "pin", {"version": 0, "pinned": True}),
        (["pin", "0", "--off"], "pin", {"version": 0, "pinned": False}), (["reload"], "reload", {}),
    ],
)  # fmt: skip
def test_each_order_has_a_command(bare, words, kind, arguments):
    done = CliRunner().invoke(cli.app, [*words, "--run-dir", str(bare.path.parent)])
    assert done.exit_code == 0 and "waits" in done.output
    (order,) = waiting(bare)
    assert (order["kind"], order["arguments"], order["origin"]) == (kind, arguments, "cli")


@pytest.mark.slow
def test_prompts_of_a_file_are_ordered_and_what_cannot_be_read_is_counted(bare, tmp_path):
    file = tmp_path / "more.jsonl"
    file.write_bytes(
        b'{"prompt": "one", "score": NaN}\n{not json\n\xff\n[1]\n{"messages": []}\n{oops\n{"prompt": "\\ud800"}\n'
        b'{"conversations": [{"from": "human", "value": "two"}, {"from": "gpt", "value": "2"}], "answer": 2}\n'
    )
    done = CliRunner().invoke(cli.app, ["add-prompts", str(file), "--run-dir", str(tmp_path)])
    assert done.exit_code == 0 and "1 × ShareGPT" in done.output and "1 answers dropped" in done.output
    for said in ("2 × invalid JSON, 1 × invalid UTF-8, 1 × not an object, 1 × an empty prompt", "UnicodeEncodeError"):
        assert said in done.output
    (order,) = waiting(bare)
    assert order["arguments"] == {"rows": [{"prompt": "one"}, {"prompt": "two", "reference": "2"}]}
    file.write_text("".join(f'{{"ask": "number {i}"}}\n' for i in range(MAX_PROMPTS + 1)))
    done = CliRunner().invoke(cli.app, ["add-prompts", str(file), "--column", "ask", "--run-dir", str(tmp_path)])
    assert done.exit_code == 0
    assert [len(order["arguments"]["rows"]) for order in waiting(bare)] == [2, MAX_PROMPTS, 1]
    for content, words in ((b"", "it is empty"), (b"{x\n", r"1 × invalid JSON")):
        file.write_bytes(content)
        with pytest.raises(InputError, match=words):
            CliRunner().invoke(cli.app, ["add-prompts", str(file), "--run-dir", str(tmp_path)], catch_exceptions=False)
    assert len(waiting(bare)) == 3


def test_a_file_of_prompts_is_shown_without_a_run(tmp_path):
    """Untrusted text: what a terminal would obey, or read as markup, is shown and not done."""
    file = tmp_path / "talks.json"
    rows = [
        {"conversations": [{"from": "human", "value": f"[red]ask\x1b[31m {i}[/]"}, {"from": "gpt", "value": "so"}]}
        for i in (1, 2, 3, 3)
    ]
    file.write_text(json.dumps([*rows, {"conversations": []}], indent=1))
    done = CliRunner().invoke(cli.app, ["prompts", str(file)], catch_exceptions=False)
    said = " ".join(done.output.split())
    assert "ShareGPT, 2 of 2 roles mapped (gpt → assistant, human → user), 4 prompts, 4 answers dropped" in said
    assert "5: 4 prompts, 1 set aside: 1 × an empty prompt" in said and "duplicates 1" in said
    assert "in words: shortest 2, median 2" in said
    assert "[red]ask�[31m 3[/]" in said and "\x1b" not in done.output
    file.write_text('[{"body_text": "why?", "id": "1"}]')
    with pytest.raises(InputError, match="its rows have the keys body_text, id") as error:
        CliRunner().invoke(cli.app, ["prompts", str(file)], catch_exceptions=False)
    assert error.value.exit_code == 2 and "prompts.columns, such as {prompt: body_text}" in error.value.hint
    done = CliRunner().invoke(cli.app, ["prompts", str(file), "--column", "body_text"], catch_exceptions=False)
    assert "user: why?" in done.output


def test_a_ledger_that_is_locked_is_an_error_of_two_lines(bare, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(store, "BUSY", 0.01)
    monkeypatch.setattr(sys, "argv", ["selfplay", "pause", "--run-dir", str(tmp_path)])
    lock = sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    lock.close()
    said = capsys.readouterr().err.splitlines()
    assert (
        ended.value.code == 3 and len(said) == 2 and said[0].endswith("the ledger does not answer: database is locked")
    )


def test_the_report_is_written_and_its_exit_code_told(bare, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(report, "main", lambda arguments: asked.append(arguments) or 3)
    assert CliRunner().invoke(cli.app, ["report", "--run-dir", str(tmp_path)]).exit_code == 3
    assert asked == [[str(tmp_path)]]


@on_a_run
def test_pairs_are_exported_as_a_preference_dataset_of_trl(run_dir, tmp_path):
    code, out, _ = selfplay("export", "pairs", tmp_path / "pairs", "--run-dir", run_dir)
    assert code == 0, out
    by_round = [pq.read_table(file).to_pylist() for file in sorted((tmp_path / "pairs" / "data").glob("*.parquet"))]
    store = Store(run_dir)
    assert [len(rows) for rows in by_round] == [store.metrics(index)["depth/pairs"] for index in (1, 2)]
    assert min(map(len, by_round)) > 10
    store.close()
    for index, of_round in enumerate(by_round, 1):
        assert {(row["round"], row["policy"], row["kept_because"]) for row in of_round} == {(index, index - 1, "base")}
    rows = [row for of_round in by_round for row in of_round]
    assert f"{len(rows)} pairs in" in out
    for row in rows:
        assert [m["role"] for m in (row["prompt"][-1], *row["chosen"], *row["rejected"])] == [
            "user",
            "assistant",
            "assistant",
        ]
        assert row["chosen"] != row["rejected"] and row["explicit_margin"] > 0
    card = (tmp_path / "pairs" / "README.md").read_text()
    assert card.startswith("---\n") and f"{len(rows)} pairs from 2 rounds" in card
    loaded = subprocess.run(
        [sys.executable, "-c", f"import datasets; from trl.data_utils import is_conversational\nd = datasets.load_dataset({str(tmp_path / 'pairs')!r}, split='train')\nprint(len(d), is_conversational(d[0]))"],
        capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert loaded.stdout.split()[-2:] == [str(len(rows)), "True"], loaded.stderr
    assert selfplay("export", "pairs", tmp_path / "pairs", "--run-dir", run_dir)[0] == 2  # never over what is there


@on_a_run
def test_a_policy_is_exported_as_a_model_folder(run_dir, tmp_path):
    code, out, _ = selfplay("export", "policy", tmp_path / "model", "--run-dir", run_dir)
    assert code == 0 and "policy 2 in" in out
    original = run_dir / "policies" / "0002"
    assert checkpoints.tensors(tmp_path / "model") == checkpoints.tensors(original)
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == (original / "tokenizer.json").read_bytes()
    card = (tmp_path / "model" / "README.md").read_text()
    assert "# Policy 2 of the run «tiny»" in card and "relative_norm" in card
    assert selfplay("export", "policy", tmp_path / "x", "--version", 5, "--run-dir", run_dir)[0] == 2
    assert selfplay("export", "nonsense", tmp_path / "x")[0] == 2


def test_a_run_that_was_never_opened_has_no_policy_to_export(tmp_path):
    Store(tmp_path).close()
    with pytest.raises(InputError, match="has no policy yet"):
        CliRunner().invoke(
            cli.app, ["export", "policy", str(tmp_path / "x"), "--run-dir", str(tmp_path)], catch_exceptions=False
        )


@on_a_run
def test_check_finds_what_would_fail_and_prints_the_plan(mini_world, tmp_path):
    sets = [word for each in overrides(mini_world) for word in ("--set", each)]
    code, out, _ = selfplay("check", "--config", TINY, "--run-dir", tmp_path / "run", *sets)
    assert code == 0, out
    assert "ok policy.model" in out and "LlamaForCausalLM" in out and "gate not independent" in out
    assert "32, 4 candidates each: 128" in out and "chance to pass by true win rate" in out
    code, out, _ = selfplay(
        "check", "--config", TINY, *sets, "--set", "reward.model=null", "--set", "reward.url=[http://127.0.0.1:9]"
    )
    assert code == 2 and "127.0.0.1:9 does not answer" in out
    assert not (tmp_path / "run").exists()


def finding(settings: configuration.Config, about: str, run_dir: Path) -> tuple[str, str]:
    return next((f.level, f.text) for f in check(settings, run_dir) if f.about == about)


@on_a_run
def test_check_of_models_that_do_not_fit(mini_world, tmp_path):
    settings = configuration.load(TINY, [*overrides(mini_world), "policy.model=/nowhere"])
    assert finding(settings, "policy.model", tmp_path) == ("error", "/nowhere: no such folder")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (broken / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}")
    settings = configuration.load(TINY, [*overrides(mini_world), f"policy.model={broken}"])
    level, text = finding(settings, "policy.model", tmp_path)
    assert level == "error" and "model.safetensors is damaged: its header is longer than the file" in text
    sets = [word for each in [*overrides(mini_world), f"policy.model={broken}"] for word in ("--set", each)]
    code, out, _ = selfplay("check", "--config", TINY, "--run-dir", tmp_path / "run", *sets)
    assert code == 2 and "is damaged" in out and "chance to pass by true win rate" in out
    settings = configuration.load(TINY, [*overrides(mini_world), "placement.colocated=true"])
    if not Path("/usr/bin/nvidia-smi").exists():
        assert finding(settings, "gpu", tmp_path) == ("error", "placement names GPUs, but nvidia-smi is not there")


@on_a_run
def test_check_of_schedule_tracker_and_functions(mini_world, tmp_path):
    settings = configuration.load(
        TINY,
        [*overrides(mini_world), "schedule.mode=cron", "schedule.cron=30 3 * * 1", "schedule.time_zone=Asia/Tokyo"],
    )
    level, text = finding(settings, "schedule", tmp_path)
    assert (
        level == "ok"
        and text.endswith("03:30 JST")
        and text.startswith("cron: a service that started now would begin its first round at 2")
    )
    level, text = finding(settings, "evaluate.gold", tmp_path)
    assert level == "ok" and text.startswith("selfplay.worlds.tiny:grade gives concise, content, format, tone, total; ")
    settings = configuration.load(
        TINY,
        [
            *overrides(mini_world),
            "schedule.mode=cron",
            "schedule.cron=30 3 31 2 *",
            "evaluate.gold=selfplay.worlds.tiny:grad",
        ],
    )
    assert (
        finding(settings, "schedule", tmp_path)[0] == "error"
        and "never comes" in finding(settings, "schedule", tmp_path)[1]
    )
    level, text = finding(settings, "evaluate.gold", tmp_path)
    assert level == "error" and text.startswith("evaluate.gold: selfplay.worlds.tiny:grad cannot be imported")


def test_the_plan_counts_what_a_round_does():
    """192 prompts × 8; ⌊.8 · 192⌋ = 153 kept, 2 epochs of ⌈153 / 16⌉ = 10 steps."""
    said = dict(plan(configuration.load(TINY)))
    assert said["prompts"] == "192, 8 candidates each: 1,536"
    assert said["pairs"] == "up to 192 base pairs, 153 kept, 153 trained on in 20 steps of 16"


@pytest.mark.slow
def test_a_file_of_prompts_becomes_as_many_orders_as_it_takes(bare, tmp_path):
    file = tmp_path / "many.jsonl"
    file.write_text("".join(f'{{"prompt": "number {i}"}}\n' for i in range(MAX_PROMPTS + 1)))
    code, out, _ = selfplay("add-prompts", file, "--run-dir", tmp_path)
    assert code == 0 and "order 1 waits" in out and "order 2 waits" in out
    assert [len(row["arguments"]["rows"]) for row in waiting(bare)] == [MAX_PROMPTS, 1]
