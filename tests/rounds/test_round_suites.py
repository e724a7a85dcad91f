"""Suites in a real round: real engine, real reward, the real harness with tasks of its own folder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_world import logps
from mini import Opened, config, nothing_left
from prometheus_client import generate_latest
from steps_world import LINE
from storage_world import sign
from transformers import AutoModelForCausalLM

from selfplay.errors import Interrupted
from selfplay.evaluation import suites as evaluation
from selfplay.reporting import history, report
from selfplay.rounds import suites
from selfplay.rounds.round import begin
from selfplay.rounds.suite_engine import SuiteEngine
from selfplay.storage import answers, folders, tables
from selfplay.types import Candidate, Prompt, SuiteAnswer
from selfplay.web.metrics import registry
from selfplay.web.view import View

pytestmark = [pytest.mark.slow, pytest.mark.service, pytest.mark.timeout(900)]

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{more}
metric_list: [{metrics}]
"""
SHORT = {"rules": [{"rule": "length", "max": 3}]}


@pytest.fixture(scope="module")
def opened(calm, mini_world):
    """The calm run, open in its third round, which was interrupted before its suites."""
    run_dir, _ = calm
    opened = Opened(mini_world, run_dir)
    with opened.run:

        def stop(where):
            if (run_dir / "rounds/0003/evaluate").is_dir():
                raise Interrupted("before the suites")

        opened.run.breathe = stop
        with pytest.raises(Interrupted):
            opened.round()
        opened.run.breathe = lambda where: None
        yield opened
    assert nothing_left(run_dir)


@pytest.fixture(scope="module")
def rows(mini_world):
    """Questions of the world, each with its answer among four choices."""
    found = []
    for line in (mini_world / "heldout.jsonl").read_text().splitlines():
        row = json.loads(line)
        meta = row["meta"]
        if len(rivals := meta.get("rivals") or []) >= 3:
            right = len(found) % 4
            choices = [*rivals[:right], str(meta["answer"]), *rivals[right:3]]
            found.append({"question": row["messages"][-1]["content"], "choices": choices, "answer": right})
    return found[:48]


@pytest.fixture(scope="module")
def files(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("suites")
    write(folder / "choices.jsonl", rows)
    write(folder / "asked.jsonl", [{"prompt": row["question"]} for row in rows])
    write(folder / "few.jsonl", rows[:8])
    (folder / "tasks").mkdir()
    of_kind = {
        "multiple_choice": ('doc_to_choice: "{{choices}}"\ndoc_to_target: answer', ["acc", "acc_norm"]),
        "generate_until": (
            "doc_to_target: '{{choices[answer]}}'\ngeneration_kwargs: {until: [\".\"], max_gen_toks: 8}", ["exact_match"]
        ),
    }  # fmt: skip
    for kind, (more, metrics) in of_kind.items():
        listed = ", ".join(f"{{metric: {metric}, aggregation: mean, higher_is_better: true}}" for metric in metrics)
        text = TASK.format(name=f"mini_{kind}", data=folder / "few.jsonl", kind=kind, more=more, metrics=listed)
        (folder / "tasks" / f"{kind}.yaml").write_text(text)
    return folder


def write(path: Path, found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found))


def settings(*given):
    return f"evaluate.suites={json.dumps(given)}"


def play(opened, mini_world, out, *given):
    """What the stage makes of some suites, in a folder beside the round."""
    opened.run.config = opened.run.trainer.config = config(mini_world, settings(*given))
    opened.run.require()
    out.mkdir()
    metrics = begin(opened.run).suites(out, LINE)
    assert all((out / name).is_file() for name in evaluation.SUITE.writes)
    return metrics


def said(out, name, side="candidate"):
    return tables.read_rows(out / name / f"{side}.parquet", SuiteAnswer)


def of_files(files):
    choices = {"name": "choices", "file": str(files / "choices.jsonl"), "metric": "acc_norm"}
    asked = {"name": "asked", "file": str(files / "asked.jsonl"), "reward": SHORT, "max_tokens": 8, "prompts": 40}
    return choices, asked


@pytest.fixture(scope="module")
def played(opened, mini_world, files, tmp_path_factory):
    out = tmp_path_factory.mktemp("played") / "suite"
    return play(opened, mini_world, out, *of_files(files)), out


@pytest.fixture(scope="module")
def model(opened):
    return AutoModelForCausalLM.from_pretrained(opened.run.policy(3).path).eval()


@pytest.fixture(scope="module")
def asked(opened, played):
    """The questions of the suite «choices», with the token ids of their choices."""
    kept = [tables.read_rows(path, Prompt) for path in (opened.run.dir / "suites").glob("*.parquet")]
    (found,) = [prompts for prompts in kept if prompts[0].meta]
    return found


def test_scores_of_the_engine_are_those_of_transformers(opened, asked, model, tmp_path):
    """The log-probability of each choice behind its question, and whether greedy decoding gives it."""
    steps = begin(opened.run)
    engine = SuiteEngine(frame=steps.frame, serving=opened.run.serving)
    pairs = [(prompt.prompt_ids, end) for prompt in asked[:6] for end in prompt.meta["choice_ids"]]
    ids = [*asked[0].prompt_ids]
    for _ in range(4):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    pairs.append((asked[0].prompt_ids, ids[-4:]))
    prompts = [
        Prompt(prompt_id=str(i), messages=[], prompt_ids=ids, split="heldout") for i, (ids, _) in enumerate(pairs)
    ]
    tables.write_rows(tmp_path / "asked.parquet", prompts, Prompt)
    given = [answers.continuation(str(i), end) for i, (_, end) in enumerate(pairs)]
    tables.write_rows(tmp_path / "said.parquet", given, Candidate)
    ((file,),) = engine.logps(tmp_path / "asked.parquet", tmp_path / "said.parquet", [opened.run.policy(3)], LINE)
    expected = [logps(model, [*ids, *end], len(ids)) for ids, end in pairs]
    assert tables.read_array(file, "logp").tolist() == pytest.approx(expected, abs=1e-4)
    greedy = tables.read_array(file, "greedy").tolist()
    assert greedy[-1] is True and False in greedy


def test_choices_and_answers_are_those_of_the_policies(asked, model, played):
    metrics, out = played
    found = said(out, "choices")
    parts = []
    for prompt in asked:
        scores = [logps(model, [*prompt.prompt_ids, *end], len(prompt.prompt_ids)) for end in prompt.meta["choice_ids"]]
        normed = [score / len(text) for score, text in zip(scores, prompt.meta["choices"], strict=True)]
        right = prompt.meta["gold"]
        parts.append({"acc": float(np.argmax(scores) == right), "acc_norm": float(np.argmax(normed) == right)})
    assert [row.reward_parts for row in found] == parts and len(parts) == 48
    assert metrics["choices/score"] == pytest.approx(np.mean([row["acc_norm"] for row in parts]))
    assert metrics["choices/score"] == metrics["choices/acc_norm"] != 0
    assert {row.policy for row in said(out, "choices", "champion")} == {2}
    greedy = said(out, "asked")
    assert len(greedy) == 40 and metrics["asked/too_long"] == 0
    for row in greedy:
        assert row.reward == pytest.approx(min(1.0, max(0.0, 2 - len(row.text.split()) / 3)))
    assert metrics["asked/score_low"] <= metrics["asked/score"] <= metrics["asked/score_high"]


def test_a_stage_that_was_interrupted_ends_with_the_same_bytes(opened, mini_world, files, played, tmp_path):
    """The round's finished shards are thrown away first. Those that are there at the second try stay as they are."""
    _, out = played
    shards = opened.run.dir / "rounds/0003"
    for folder in shards.glob("suite-*.shards"):
        shutil.rmtree(folder)
    calls = []

    def stop(where):
        calls.append(where)
        if len(calls) == 6:
            raise Interrupted("in mid-suite")

    opened.run.breathe = stop
    with pytest.raises(Interrupted):
        play(opened, mini_world, tmp_path / "first", *of_files(files))
    there = {p: p.stat().st_mtime_ns for p in shards.glob("suite-*.shards/0*.parquet")}
    assert there
    opened.run.breathe = lambda where: None
    play(opened, mini_world, tmp_path / "second", *of_files(files))
    assert {p: p.stat().st_mtime_ns for p in there} == there
    for name in ("choices", "asked"):
        for side in ("candidate", "champion"):
            ours, theirs = (folder / name / f"{side}.parquet" for folder in (tmp_path / "second", out))
            assert ours.read_bytes() == theirs.read_bytes()


def test_tasks_of_the_harness_are_answered_by_the_engine_in_place(opened, mini_world, files, tmp_path):
    """Its multiple choice is ours, on the same questions; its greedy answers are ours up to the text that ends them."""
    own = {"include_path": str(files / "tasks")}
    tasks = [
        {"name": "harness", "task": "mini_multiple_choice", **own},
        {"name": "texts", "task": "mini_generate_until", **own, "prompts": 4},
    ]
    same = {"name": "same", "file": str(files / "few.jsonl")}
    plain = {"name": "plain", "file": str(files / "asked.jsonl"), "reward": SHORT, "max_tokens": 8}
    metrics = play(opened, mini_world, tmp_path / "suite", *tasks, same, plain)
    harness, ours = said(tmp_path / "suite", "harness"), said(tmp_path / "suite", "same")
    assert [row.reward_parts for row in harness] == [row.reward_parts for row in ours] and len(ours) == 8
    assert metrics["harness/score"] == metrics["harness/acc"] == metrics["same/score"]
    texts, answered = said(tmp_path / "suite", "texts"), said(tmp_path / "suite", "plain")
    assert [row.text for row in texts] == [row.text.partition(".")[0] for row in answered[:4]]
    assert metrics["texts/prompts"] == 4 and {"texts/exact_match", "texts/exact_match_champion"} <= metrics.keys()


def test_a_suite_vetoes_and_the_round_is_rejected(opened, files, played):
    """The rows are those that the two policies answer otherwise, and right is what the champion says."""
    _, out = played
    both = zip(said(out, "asked"), said(out, "asked", "champion"), strict=True)
    files_of_run = [tables.read_rows(path, Prompt) for path in (opened.run.dir / "suites").glob("*.parquet")]
    kept = {prompt.prompt_id: prompt.messages for prompts in files_of_run for prompt in prompts}
    fell = [
        {"messages": kept[ours.prompt_id], "reference": theirs.text}
        for ours, theirs in both
        if ours.text.strip() != theirs.text.strip()
    ]
    assert len(fell) > 2
    write(files / "fell.jsonl", fell)
    suite = {
        "name": "fell",
        "file": str(files / "fell.jsonl"),
        "reward": {"rules": [{"rule": "exact"}]},
        "max_tokens": 8,
    }
    text = opened.round(settings({**suite, "gate": {"max_drop": 0.5}}))
    why = "suite fell: score 1.000 → 0.000, and the upper bound of the difference [-1.000, -1.000] is below −0.5"
    assert f"rejected by the gate: {why}" in text
    assert "suite fell 1.000 → 0.000 · difference -1.000 [-1.000, -1.000]" in text
    store, run_dir = opened.run.store, opened.run.dir
    assert (store.round(3)["state"], store.round(3)["reasons"]) == ("rejected", [why])
    assert (run_dir / "current").read_text() == "2\n"
    assert store.metrics(3)["suite/fell/difference_high"] == -1.0
    assert (run_dir / "rounds/0003/suite/fell/candidate.parquet").is_file()
    shown = history.read(run_dir)
    assert {"suite fell", "fell: difference"} <= {name for name, *_ in report.columns(shown)}
    assert "Suites" in [chart.title for chart in report.charts(shown)]
    view = View(run_dir, opened.run.config, dict)
    told = generate_latest(registry(view)).decode()
    view.store.close()
    assert 'selfplay_suite_score{bound="high",of="difference",suite="fell"} -1.0' in told


def test_the_champions_answers_are_those_of_the_round_that_trained_it(tmp_path):
    def artifact(index, name):
        return tmp_path / str(index) / name

    for index, identity, version in ((2, "a", 2), (3, "b", 3)):
        folder = tmp_path / str(index) / "suite"
        (folder / "s").mkdir(parents=True)
        folders.write_json(folder / "suites.json", {"s": identity})
        for side, policy in (("candidate", version), ("champion", 2)):
            row = SuiteAnswer(
                prompt_id="x", text=side, n_tokens=1, finish_reason="stop", policy=policy, reward=float(index)
            )
            tables.write_rows(folder / "s" / f"{side}.parquet", [row], SuiteAnswer)
        sign(folder, index)
    known = suites.known(artifact, 4, 2)
    assert known("s", "a")[0].text == "candidate" and known("s", "b")[0].text == "champion"
    assert known("s", "c") is None and known("other", "a") is None
    assert suites.known(artifact, 4, 3)("s", "b")[0].reward == 3.0 and suites.known(artifact, 4, 3)("s", "a") is None
    artifact(3, "suite/s/champion.parquet").rename(tmp_path / "aside")  # as the doctor advises for a damaged one
    assert suites.known(artifact, 4, 2)("s", "b") is None
