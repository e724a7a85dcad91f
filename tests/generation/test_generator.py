"""The client with a real engine. Later tests go on with the engine that earlier ones left, or left dead."""

import dataclasses
import os
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
from engine_world import EOS, config, logps, prompts, sample, tokenizer, write_manifest, write_policy
from transformers import AutoModelForCausalLM

from selfplay.config.policy import ThinkingConfig
from selfplay.errors import CheckpointError, ConfigError, InputError, SwapError
from selfplay.generation.generator import Ask, Generator, Shard
from selfplay.generation.installing import WarmEngine
from selfplay.generation.sampling import measure
from selfplay.generation.supervised import SupervisedEngine
from selfplay.generation.swap import Canaries
from selfplay.processes import reaping
from selfplay.storage import folders, tables
from selfplay.storage.policies import Policies
from selfplay.types import Candidate, Prompt

pytestmark = pytest.mark.service


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("runs") / "test"


@pytest.fixture(scope="module")
def policies(run_dir):
    """1 and 2 have nothing in common; 3 is 1 but for one weight by too little to hear; 4 has another shape."""
    root = run_dir / "policies"
    return {
        1: write_policy(root, 1, seed=1),
        2: write_policy(root, 2, seed=2),
        3: write_policy(root, 3, seed=1, nudge=1e-6),
        4: write_policy(root, 4, seed=4, intermediate_size=96),
    }


@pytest.fixture(scope="module")
def events():
    return []


@pytest.fixture(scope="module")
def service(run_dir, policies, events):
    found = Generator(
        config(run_dir), run_dir, run_dir / "engine.log", on_event=lambda kind, text: events.append((kind, text))
    )
    found.start()
    info = found.load(policies[1])
    assert info.start_seconds > 0 and info.eos_ids == [EOS]
    yield found
    found.stop()
    assert reaping.marked(run_dir) == []


@pytest.fixture(scope="module")
def ask(service, tmp_path_factory):
    """Have the generator answer some prompts."""
    folder = tmp_path_factory.mktemp("answers")
    return lambda count, **settings: sample(service, prompts(count), folder, **settings)


@pytest.fixture(scope="module")
def golden(ask):
    """What policy 1 answers."""
    return ask(32)


def kill(service, number=0):
    """SIGKILL to the process with the engine in it, under its guard."""
    (pid,) = reaping.descendants(service.engines[number].warm.child.pid)
    os.kill(pid, signal.SIGKILL)


def copy(policy, version):
    """The policy once more, in the same run and under another number."""
    path = Path(policy.path).with_name(f"{version:04d}")
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(policy.path, path)
    return dataclasses.replace(policy, version=version, path=str(path))


def damaged(policy, change):
    """A copy of a policy with its weights file changed."""
    found = copy(policy, 9)
    change(Path(found.path) / "model.safetensors")
    return found


def test_candidates_come_in_order(service, ask, golden):
    assert service.policy == service.verified and service.policy.version == 1
    assert [(c.prompt_id, c.index) for c in golden] == [(f"p{i}", k) for i in range(32) for k in range(4)]
    assert all(c.policy == 1 and c.n_tokens == len(c.token_ids) for c in golden)
    done = []
    again = ask(4, candidates=2, on_progress=done.append)
    assert done[-1] == 4
    assert again == [c for c in golden if c.prompt_id in ("p0", "p1", "p2", "p3") and c.index < 2]


def test_answers_are_scored_by_the_policy_that_serves(service, golden, tmp_path):
    asked, answers = tmp_path / "asked.parquet", tmp_path / "answers.parquet"
    tables.write_rows(asked, prompts(32), Prompt)
    tables.write_rows(answers, golden, Candidate)
    done = []
    (logps,) = service.answer_logps(asked, answers, 8, 100, 4, done.append)
    assert logps == pytest.approx([c.logp for c in golden[8:108]], abs=1e-4) and done[-1] == 100
    assert service.answer_logps(asked, answers, 0, 0, 4).shape == (1, 0)
    shuffled = tmp_path / "shuffled.parquet"
    tables.write_rows(shuffled, golden[::-1], Candidate)
    with pytest.raises(InputError, match="row 0 of .* is no answer to prompt 0"):
        service.answer_logps(asked, shuffled, 0, 1, 1)


def test_what_the_policy_thinks_is_trained_on_and_hidden(service, ask, golden, tmp_path):
    """Marks out of what is said by chance: a letter that ends a prompt, and one that comes in some answers to it."""
    found, rows = tokenizer(), prompts(32)
    opened = next(row for row in rows if found.decode(row.prompt_ids[-1:]).isalnum())
    start = found.decode(opened.prompt_ids[-1:])
    ends = Counter(c for row in golden if row.prompt_id == opened.prompt_id for c in set(row.text) if c.isalnum())
    end = next(letter for letter, count in ends.items() if count < 4 and letter != start)
    thinking = ThinkingConfig(start=start, end=end)
    before = service._config
    policy = before.policy.model_copy(update={"thinking": thinking})
    service.reconfigure(before.model_copy(update={"policy": policy}))
    try:
        answers = ask(32)
    finally:
        service.reconfigure(before)
    kept = [
        dataclasses.replace(a, text=g.text, finish_reason=g.finish_reason, thinking=None)
        for a, g in zip(answers, golden, strict=True)
    ]
    assert kept == golden  # ids and log-probabilities are whole
    fates = set()
    for answer, whole in zip(answers, golden, strict=True):
        if answer.prompt_id != opened.prompt_id:
            continue
        _, mark, rest = whole.text.partition(end)
        assert (answer.text, answer.finish_reason) == ((rest.lstrip(), whole.finish_reason) if mark else ("", "length"))
        assert end in found.decode(whole.token_ids[: answer.thinking]) if mark else answer.thinking == whole.n_tokens
        fates.add(bool(mark))
    assert fates == {True, False}
    metrics = measured(answers, tmp_path / "answers.parquet")
    assert metrics["thinking_share"] == sum(a.thinking > 0 for a in answers) / len(answers) > 0
    assert metrics["cut_off_share"] == sum(a.finish_reason == "length" for a in answers) / len(answers)
    assert not {"thinking_share", "thinking_tokens"} & measured(golden, tmp_path / "golden.parquet").keys()


def measured(answers, path):
    tables.write_rows(path, answers, Candidate)
    return measure(path, 1.0)


def test_logps_of_canaries(service, policies):
    model = AutoModelForCausalLM.from_pretrained(policies[1].path)
    ids = [1, *range(20, 50)]
    expected = [logps(model, ids), logps(model, ids, 10)]
    assert service.engines[0].warm.logps([(ids, 1), (ids, 10)]) == pytest.approx(expected, abs=1e-3)


def test_a_prompt_that_does_not_fit_is_bad_input_and_leaves_no_file(service, tmp_path):
    asked, out = tmp_path / "asked.parquet", tmp_path / "out.parquet"
    tables.write_rows(asked, [dataclasses.replace(prompts(1)[0], prompt_ids=[5] * 500)], Prompt)
    (tmp_path / ".out.parquet.partial").write_text("what an engine that died left")
    with pytest.raises(InputError, match="prompt p0 .number 0. has 500 tokens"):
        service.sample([Ask(prompts=asked, shards=[Shard(start=0, seeds=[0], file=out)])])
    assert list(tmp_path.iterdir()) == [asked]


def test_swap_there_and_back(service, ask, policies, golden, events):
    report = service.swap(policies[2], keep_verified=True)
    assert service.policy == policies[2] and service.verified == policies[1]
    service.promote()
    assert report.method == "canaries" and not report.restarted
    assert report.to_new < 1e-4 < 0.1 < report.to_parent
    assert report.seconds_to_first_token <= report.seconds
    assert service.verified == service.policy == policies[2]
    other = ask(32)
    assert {c.policy for c in other} == {2} and [c.token_ids for c in other] != [c.token_ids for c in golden]
    service.swap(policies[1])
    assert ask(32) == golden
    assert events == []


def test_weights_are_compared_where_canaries_cannot_tell(service, policies):
    report = service.swap(policies[3])
    assert report.method == "weights" and report.gap < 1e-6 and report.compared > 10_000
    assert service.swap(policies[1]).method == "weights"


def test_weights_that_cannot_be_compared_are_reloaded_over_others(service, ask, policies, golden, events, monkeypatch):
    """As where several GPUs share them. Other weights stand for the zeros, which are too few on a CPU."""
    order, asked = WarmEngine.order, []

    def of_several_gpus(self, name, /, *args, **fields):
        asked.append(name)
        if name == "compare_weights":
            return {"supported": False, "why": "the weights are split over several GPUs"}
        if name == "forget":
            order(self, "reload", path=policies[2].path)
            return {"supported": True}
        return {} if name == "reload" and "forget" in asked and faulty else order(self, name, *args, **fields)

    monkeypatch.setattr(WarmEngine, "order", of_several_gpus)
    faulty = False
    report = service.swap(policies[3])
    assert (report.method, report.compared, report.restarted) == ("canaries", None, False)
    assert asked[-4:] == ["forget", "reload", "reset", "logps"] and events == []
    same = [c.token_ids for c in ask(32)]
    assert same == [c.token_ids for c in golden]  # one weight differs, by too little to hear

    def give_up(self, policy, manifest, began, why):
        raise SwapError(why)

    monkeypatch.setattr(SupervisedEngine, "_restart_with", give_up)
    monkeypatch.setattr(WarmEngine, "stop", lambda self: None)
    faulty = True
    asked.clear()
    with pytest.raises(SwapError, match="reloaded over zeros the engine is .* from policy 1"):
        service.swap(policies[1])
    monkeypatch.undo()
    service.engines[0].warm.loaded = True
    service.swap(policies[1])
    assert ask(32) == golden


def tamper(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: os.truncate(file, file.stat().st_size - 100), "model.safetensors"),
        (tamper, "model.safetensors"),
        (Path.unlink, "model.safetensors"),
        (lambda file: (file.parent / "manifest.json").unlink(), "no manifest"),
    ],
    ids=["truncated", "tampered", "missing", "no manifest"],
)
def test_a_damaged_checkpoint_is_refused_and_the_old_weights_answer(service, ask, policies, golden, change, message):
    with pytest.raises(CheckpointError, match=message):
        service.swap(damaged(policies[2], change))
    assert ask(32) == golden


def test_another_shape_is_refused(service, ask, policies, golden):
    with pytest.raises(CheckpointError, match=r"mlp\.down_proj\.weight has shape \[64, 96\], not \[64, 128\]"):
        service.swap(policies[4])
    assert ask(32) == golden


def test_a_missing_tensor_is_refused(service, ask, policies, golden):
    from safetensors.torch import load_file, save_file

    def drop(file):
        tensors = load_file(file)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, file, metadata={"format": "pt"})

    policy = damaged(policies[2], drop)
    write_manifest(Path(policy.path), 9, [-1.0] * 6)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        service.swap(policy)
    assert ask(32) == golden


def test_an_initial_policy_that_is_a_policy_of_another_run(service, ask, policies, run_dir, tmp_path):
    """Its source folder has a manifest of its own, about another number."""
    source = write_policy(tmp_path / "policies", 3, seed=2)
    canaries = folders.read_json(Path(policies[2].path) / "manifest.json")["canaries"]
    own = Policies(run_dir)
    own.import_initial(Path(source.path), canaries, "f", {})
    assert service.swap(own.get(0)).method == "canaries"
    assert service.policy.version == 0 and ask(4)[0].policy == 0
    service.swap(policies[1])


def test_sleep_is_not_there_on_a_cpu(service, ask, golden):
    if service.info.device == "cpu":
        assert service.sleep() is False
    service.wake()
    assert ask(32) == golden


def without(monkeypatch, name):
    """Let one order to the engine do nothing."""
    order = WarmEngine.order

    def faulty(self, asked, /, *args, **fields):
        return {} if asked == name else order(self, asked, *args, **fields)

    monkeypatch.setattr(WarmEngine, "order", faulty)


def test_a_reload_that_did_nothing_is_caught(service, ask, policies, golden, monkeypatch):
    def give_up(self, policy, manifest, began, why):
        raise SwapError(why)

    without(monkeypatch, "reload")
    monkeypatch.setattr(SupervisedEngine, "_restart_with", give_up)
    monkeypatch.setattr(WarmEngine, "stop", lambda self: None)  # policy 1 is still in it: no need for another one here
    with pytest.raises(SwapError, match="after the reload the engine is .* from policy 2, .* from the one before"):
        service.swap(policies[2])
    service.engines[0].warm.loaded = True
    assert ask(32) == golden


def test_an_engine_killed_in_mid_evaluation_answers_with_the_candidate(service, ask, policies, golden, events):
    # Killed before the swap: the new weights come in a new engine.
    kill(service)
    report = service.swap(policies[2], keep_verified=True)
    assert report.method == "restart" and report.restarted
    kind, text = events.pop()
    assert kind == "swap_restart" and "was killed by SIGKILL" in text
    assert service.policy == policies[2] and service.verified == policies[1]
    # Killed with the candidate in it: from the policy verified before to the candidate, and the same answers again.
    whole = ask(200)
    killed = []

    def on_progress(done):
        if not killed:  # a second after the start, or with the answer on its way
            killed.append(done)
            kill(service)

    assert ask(200, on_progress=on_progress) == whole
    kind, text = events.pop()
    assert kind == "engine_restart" and "was killed by SIGKILL" in text and events == []
    assert service.policy == policies[2] and service.verified == policies[1]
    assert service.swap(policies[1]).method == "canaries"
    assert ask(32) == golden


def test_weights_that_cannot_be_shown_are_never_served(service, ask, policies, golden, events, monkeypatch):
    """A stale prefix cache, and canaries of other weights in the new engine: the old policy goes on."""
    restart = SupervisedEngine._restart_with

    def with_wrong_canaries(self, policy, manifest, began, why):
        assert "the prefix cache is stale" in why
        wrong = {**manifest.canaries, "logps": [x - 1 for x in manifest.canaries["logps"]]}
        return restart(self, policy, dataclasses.replace(manifest, canaries=wrong), began, why)

    without(monkeypatch, "reset")
    monkeypatch.setattr(SupervisedEngine, "_restart_with", with_wrong_canaries)
    with pytest.raises(SwapError, match="then in a new engine: a fresh engine is"):
        service.swap(policies[2])
    monkeypatch.undo()
    assert service.policy == service.verified == policies[1]
    assert ask(32) == golden


def test_a_context_too_small_is_bad_configuration(run_dir):
    tight = WarmEngine(config(run_dir, max_model_len=113), run_dir, run_dir / "tight.log")
    canaries = Canaries(token_ids=[[1] * 200], logps=[-1.0])
    with pytest.raises(ConfigError, match="the canaries 201"):
        tight._context({}, canaries)
    roomy = WarmEngine(config(run_dir), run_dir, run_dir / "tight.log")
    with pytest.raises(ConfigError, match="context is 100 tokens"):
        roomy._context({"max_position_embeddings": 100}, Canaries(token_ids=[[1, 2]], logps=[-1.0]))
    assert roomy._context({}, Canaries(token_ids=[[1, 2]], logps=[-1.0])) == 136
