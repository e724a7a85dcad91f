"""Looks at models and settings that need no world: folders made by hand."""

import errno
import json
import os
import shutil
import socket

import pytest
from check_world import model, said, settings
from mini import ROOT, TINY, overrides

from selfplay.checks.models import loads
from selfplay.checks.plan import plan
from selfplay.checks.templates import about_template
from selfplay.config import load
from selfplay.config.policy import ThinkingConfig
from selfplay.errors import InputError
from selfplay.reporting.terminal import Display
from selfplay.rounds.run import Run
from selfplay.storage import tables
from selfplay.storage.ledger import Store
from selfplay.storage.lock import RunLock
from selfplay.types import Candidate


def test_a_model_needs_a_tokenizer_and_a_chat_template(tmp_path):
    whole = model(tmp_path / "whole", max_position_embeddings=512)
    assert said(settings(tmp_path, whole), tmp_path, "policy.model")[0] == "ok"
    mute = model(tmp_path / "mute", template=False)
    level, text = said(settings(tmp_path, mute), tmp_path, "policy.model")
    assert level == "error" and "no chat template" in text and "instruct model" in text
    (mute / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert said(settings(tmp_path, mute), tmp_path, "policy.model")[0] == "ok"
    bare = model(tmp_path / "bare", tokenizer=False)
    assert said(settings(tmp_path, bare), tmp_path, "policy.model") == ("error", f"{bare} has no tokenizer")
    reward = ("reward.rules=[]", f"reward.model={model(tmp_path / 'reward', template=False, id2label={'0': 'x'})}")
    assert said(settings(tmp_path, whole, *reward), tmp_path, "reward.model")[0] == "error"
    silent = model(tmp_path / "silent")  # two labels are the default, and not written down
    found = said(settings(tmp_path, whole, "reward.rules=[]", f"reward.model={silent}"), tmp_path, "reward.model")
    assert found == ("error", f"{silent} has 2 labels; a reward model has 1")


def test_a_model_whose_config_names_no_architecture_is_looked_at_like_any_other(mini_world, tmp_path):
    folder = shutil.copytree(mini_world / "policy", tmp_path / "policy")
    told = json.loads((folder / "config.json").read_text())
    for named in ({"architectures": None}, {"architectures": []}):
        (folder / "config.json").write_text(json.dumps(told | named))
        level, text = said(load(TINY, [*overrides(mini_world), f"policy.model={folder}"]), tmp_path, "policy.model")
        assert level == "ok" and f": {told['model_type']}, " in text


@pytest.mark.parametrize("nested", [False, True])
def test_the_context_of_the_policy(tmp_path, nested):
    """configs/tiny.yaml: 96 + 48 + 1 tokens for the engine, 144 for the trainer."""
    limits = {"max_position_embeddings": 145}
    fits = model(tmp_path / "fits", **({"text_config": limits} if nested else limits))
    assert said(settings(tmp_path, fits), tmp_path, "context") == ("ok", "the policy reads up to 145 tokens")
    level, text = said(settings(tmp_path, fits, "train.max_length=200"), tmp_path, "context")
    assert level == "error" and text.endswith("but train.max_length is 200")
    short = model(tmp_path / "short", max_position_embeddings=144)
    level, text = said(settings(tmp_path, short), tmp_path, "context")
    assert level == "error" and "generate.max_tokens + 1 is 145" in text
    unknown = model(tmp_path / "unknown")
    assert said(settings(tmp_path, unknown), tmp_path, "context") is None


def test_batches_over_processes(tmp_path):
    policy = model(tmp_path / "policy")
    four = f"train.accelerate={ROOT / 'configs' / 'accelerate' / 'fsdp2-4.yaml'}"
    level, text = said(settings(tmp_path, policy, four), tmp_path, "train.batch_pairs")
    assert level == "error" and text.endswith("not a multiple of 64")
    right = settings(tmp_path, policy, four, "train.micro_batch_pairs=2")
    assert said(right, tmp_path, "training") == ("ok", "16 pairs a step on 4 processes, 2 at a time each")
    gone = settings(tmp_path, policy, f"train.accelerate={tmp_path / 'none.yaml'}")
    level, text = said(gone, tmp_path, "training")
    assert level == "error" and "none.yaml: no such file" in text
    assert said(settings(tmp_path, policy), tmp_path, "training") is None


@pytest.mark.slow
def test_prompt_files_are_read_and_split_as_the_import_does(tmp_path):
    """1,200 held-out prompts, 40 % of them in the audit set; configs/tiny.yaml asks for 384 and 400."""
    config = settings(tmp_path, model(tmp_path / "policy"))
    level, text = said(config, tmp_path, "prompts")
    assert level == "ok" and text.startswith("200 to train on, ") and "set aside" not in text
    assert said(config, tmp_path, "evaluate.prompts") is said(config, tmp_path, "prompts.per_round") is None
    few = (
        "".join(f'{{"prompt": "train {i}"}}\n' for i in (1, 2, 2))
        + '{"prompt": "heldout 3"}\n{oops\n{"messages": []}\n'
    )
    (tmp_path / "train.jsonl").write_text(few)
    level, text = said(config, tmp_path, "prompts")
    assert level == "warning" and text.startswith("2 to train on, ")
    for aside in ("1 × duplicate", "1 × invalid JSON", "1 × an empty prompt", "1 × also held out"):
        assert aside in text
    assert said(config, tmp_path, "prompts.per_round")[0] == "warning"
    (tmp_path / "heldout.jsonl").write_text("".join(f'{{"prompt": "heldout {i}"}}\n' for i in range(100)))
    level, text = said(config, tmp_path, "evaluate.prompts")
    assert level == "warning" and text.startswith("384 prompts are asked for, but there are ") and "less power" in text
    (tmp_path / "train.jsonl").write_text("")
    assert said(config, tmp_path, "prompts") == (
        "error",
        f"{tmp_path / 'train.jsonl'} has no usable prompt: it is empty",
    )


def test_a_token_is_needed_where_others_can_reach_the_page(tmp_path, monkeypatch):
    monkeypatch.delenv("SELFPLAY_TOKEN", raising=False)
    policy = model(tmp_path / "policy")
    assert said(settings(tmp_path, policy), tmp_path, "token")[0] == "ok"
    config = settings(tmp_path, policy, "service.host=0.0.0.0", "service.port=0")
    level, text = said(config, tmp_path, "token")
    assert level == "error" and "there is no token" in text and "SELFPLAY_TOKEN" in text
    monkeypatch.setenv("SELFPLAY_TOKEN", "0123456789abcdef")
    assert said(config, tmp_path, "token") == ("ok", "the API and the page ask for it")


def test_the_run_folder_is_that_of_this_run_and_free(tmp_path):
    run_dir = tmp_path / "run"
    config = settings(tmp_path, model(tmp_path / "policy"))
    assert said(config, tmp_path, "run folder") == ("ok", f"{run_dir} is new")
    (run_dir / "pool").mkdir(parents=True)
    store = Store(run_dir)
    store.open_run("tiny", config.fixed())
    store.close()
    assert said(config, tmp_path, "run folder") == ("ok", f"{run_dir} belongs to this run, and nobody works in it")
    with RunLock(run_dir):
        level, text = said(config, tmp_path, "run folder")
    assert level == "warning" and "is in use by process" in text
    other = settings(tmp_path, tmp_path / "policy", "run.seed=7")
    level, text = said(other, tmp_path, "run folder")
    assert level == "error" and "run.seed (0 there, 7 here) cannot change" in text and "another folder" in text
    (run_dir / "rounds" / "0001" / "prompts").mkdir(parents=True)
    (run_dir / "rounds" / "0001" / "prompts" / "manifest.json").touch()
    level, text = said(config, tmp_path, "run folder")
    assert level == "error" and "the ledger does not know round 1" in text and "selfplay doctor" in text
    for path in run_dir.glob("ledger.sqlite*"):
        path.unlink()
    level, text = said(config, tmp_path, "run folder")
    assert level == "error" and "no new ledger is made" in text


def test_files_that_other_accounts_can_read_are_named(tmp_path):
    token = tmp_path / "token"
    token.write_text("0123456789abcdef0123")
    token.chmod(0o640)
    (tmp_path / "run").mkdir(mode=0o700)
    config = settings(tmp_path, model(tmp_path / "policy"), f"service.token_file={token}")
    assert said(config, tmp_path, "permissions")[0] == "ok", "a group may read the token"
    token.chmod(0o644)
    level, text = said(config, tmp_path, "permissions")
    assert level == "warning" and f"{token} (mode 644): chmod 600" in text
    token.chmod(0o600)
    (tmp_path / "run").chmod(0o755)
    level, text = said(config, tmp_path, "permissions")
    assert level == "warning" and f"{tmp_path / 'run'} (mode 755): chmod 700" in text


def test_who_may_not_read_the_weights_or_write_the_run_folder_is_told_at_once(tmp_path, monkeypatch):
    """Root may all, so what a user with fewer rights is answered is put in."""
    policy = model(tmp_path / "policy")
    config = settings(tmp_path, policy)
    (tmp_path / "run").touch()
    assert said(config, tmp_path, "run folder")[0] == "error"
    (tmp_path / "run").unlink()
    closed = {tmp_path, policy / "tokenizer.json"}
    monkeypatch.setattr(os, "access", lambda path, mode: path not in closed)
    with monkeypatch.context() as patch:
        patch.setattr(
            os,
            "mkdir",
            lambda path, *_: (_ for _ in ()).throw(PermissionError(errno.EACCES, "Permission denied", path)),
        )
        level, text = said(config, tmp_path, "run folder")
    assert level == "error" and "cannot be written: Permission denied" in text and "chown -R" in text
    with pytest.raises(InputError, match=r"^policy.model: .*/tokenizer.json cannot be read by user") as error:
        Run(config, tmp_path / "run", Display()).require()
    assert "chmod" in error.value.hint
    (policy / "lost+found").mkdir()
    closed = {policy / "lost+found"}
    Run(config, tmp_path / "run", Display()).require()


@pytest.mark.slow
def test_models_are_built_without_memory_and_compared_with_their_files(mini_world, tmp_path):
    """A config of one layer more than the weights have: only building the model shows it."""
    broken = tmp_path / "policy"
    shutil.copytree(mini_world / "policy", broken)
    told = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(told | {"num_hidden_layers": told["num_hidden_layers"] + 1}))
    config = load(TINY, [*overrides(mini_world), f"policy.model={broken}"])
    assert said(config, tmp_path, "policy.model")[0] == "ok"
    found = {f.about: (f.level, f.text) for f in loads(config)}
    level, text = found["policy.model loads"]
    assert level == "error" and text.startswith("its files lack 9 tensors of the model") and ".layers." in text
    assert found["reward.model loads"] == ("ok", "its files fit its config, and its chat template works")


@pytest.mark.slow
def test_what_a_chat_template_does_by_itself_is_said(mini_world, tmp_path):
    """It prints the date, opens thoughts, and knows nothing of a variable."""
    folder = tmp_path / "policy"
    shutil.copytree(mini_world / "policy", folder)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(
        "{{ strftime_now('%d %b %Y') }}" + template + "{% if add_generation_prompt %}<think>{% endif %}"
    )
    row = {"key": "policy.model", "model": str(folder), "policy": True, "trust_remote_code": False}
    found = dict(about_template(row | {"kwargs": {"enable_thinkin": True}, "dated": False, "thinking": None}, folder))
    assert found == {
        "policy.chat_template_kwargs: the template reads no enable_thinkin": "warning",
        "it prints the date, in all rounds that of the day on which the run begins (policy.template_date)": "ok",
        "its prompts end with <think>, and rewards will read the thoughts: set policy.thinking to {} to hide them": "warning",
    }
    thinking = ThinkingConfig().model_dump()
    found = dict(about_template(row | {"kwargs": {}, "dated": True, "thinking": thinking}, folder))
    assert found == {
        "it prints the date, in all rounds the given one (policy.template_date)": "ok",
        "its prompts end with the start of thoughts, which end with policy.thinking.end": "ok",
    }


def test_what_retention_keeps_counts_for_the_disk(tmp_path):
    policy = model(tmp_path / "policy")  # tiny.yaml: 3 + 4 and 2 rejected ones
    assert "9 policies and two saves" in said(settings(tmp_path, policy), tmp_path, "disk")[1]
    more = settings(tmp_path, policy, "retention.pinned=[1, 2]", "retention.every=10", "schedule.end.rounds=100")
    level, text = said(more, tmp_path, "disk")
    assert level == "ok" and "21 policies" in text
    level, text = said(settings(tmp_path, policy, "retention.every=10"), tmp_path, "disk")
    assert level == "warning" and "more every 10 rounds, without end" in text


def test_the_plan_counts_every_answer():
    """32 prompts × 4 candidates, 2 × 10 answers at the gate, 30 of the audit, ⌊.5 · 32⌋ rewrites, of 48 tokens each."""
    sizes = ("prompts.per_round=32", "generate.candidates=4", "evaluate.prompts=10", "evaluate.audit_prompts=30")
    said = dict(
        plan(load(TINY, [*sizes, "breadth.method=clusters", "evaluate.audit_every=2", "evolve={every: 3, top: 0.5}"]))
    )
    assert said["prompts"] == "32, 4 candidates each: 128; 64 are drawn, to choose from"
    assert (
        said["tokens"]
        == f"up to {128 * 48:,} for candidates (48 a response), {(128 + 20 + 30 + 16) * 48:,} with all else"
    )
    assert said["evaluation"].endswith("every 2 rounds 30 more to the audit set (the first time twice as many)")
    assert said["rewrites"] == "16 prompts, every 3 rounds"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_a_port_that_only_closing_connections_hold_is_free(tmp_path, host):
    """The side that closes first keeps the port for a minute (TIME_WAIT)."""
    family = socket.AF_INET6 if host == "::1" else socket.AF_INET
    try:
        server = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip(f"this machine has no {host}")
    port = server.getsockname()[1]
    with socket.create_connection(server.getsockname()[:2]) as client:
        served, _ = server.accept()
        served.close()
        assert client.recv(1) == b""
    server.close()
    config = settings(tmp_path, model(tmp_path / "policy"), f"service.host={host}", f"service.port={port}")
    assert said(config, tmp_path, "port") == ("ok", f"{host}:{port} is free")


def test_an_address_of_another_machine_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("SELFPLAY_TOKEN", "0123456789abcdef")
    config = settings(tmp_path, model(tmp_path / "policy"), "service.host=192.0.2.1")
    level, text = said(config, tmp_path, "port")
    assert level == "error" and "192.0.2.1:8470 cannot be taken" in text


def test_a_port_that_is_taken_is_a_warning(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = settings(tmp_path, model(tmp_path / "policy"), f"service.port={port}")
        level, text = said(config, tmp_path, "port")
    assert level == "warning" and f"127.0.0.1:{port} cannot be taken" in text


def test_a_policy_that_neither_disk_nor_memory_can_hold(tmp_path, monkeypatch):
    policy = model(tmp_path / "policy")
    header = json.dumps({"a": {"dtype": "U8", "shape": [10**12], "data_offsets": [0, 10**12]}}).encode()
    (policy / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(policy / "model.safetensors", 8 + len(header) + 10**12)  # a file of holes
    monkeypatch.setenv("PATH", "/nowhere")  # no nvidia-smi
    config = settings(tmp_path, policy)
    for about in ("disk", "memory"):
        level, text = said(config, tmp_path, about)
        assert level == "error" and "damaged" not in text


def answered(path, count, cut, length=20):
    rows = [
        Candidate(
            prompt_id=f"p{i}", index=0, text="x", token_ids=[5] * length, logp=-1.0, n_tokens=length,
            finish_reason="length" if i < cut else "stop", policy=0,
        )
        for i in range(count)
    ]  # fmt: skip
    path.parent.mkdir(parents=True)
    tables.write_rows(path, rows, Candidate)


def test_check_and_plan_say_what_the_newest_answers_showed(tmp_path):
    """40 of 64 answers of the first shard were cut off. 192 prompts × 8 answers of 20 tokens are 30,720."""
    config = settings(tmp_path, model(tmp_path / "policy"))
    assert said(config, tmp_path, "answers") is None and "answers" not in dict(plan(config, tmp_path / "run"))
    answered(tmp_path / "run" / "rounds" / "0001" / "generate" / "candidates.parquet", 10, 1)
    assert said(config, tmp_path, "answers") == ("ok", "round 1: 20 tokens an answer, 10% cut off")
    answered(tmp_path / "run" / "rounds" / "0002" / "generate-ab.shards" / "00000000.parquet", 64, 40)
    (tmp_path / "run" / "rounds" / "0003").mkdir()
    level, text = said(config, tmp_path, "answers")
    assert level == "warning" and text.startswith(
        "the first 64 answers of round 2: 20 tokens an answer, 62% cut off, more than "
    )
    assert "guard.cut_off allows (30%): raise generate.max_tokens" in text
    rejecting = settings(tmp_path, tmp_path / "policy", "pairs.cut_off=reject")
    assert "set pairs.cut_off: drop" in said(rejecting, tmp_path, "answers")[1]
    rows = dict(plan(config, tmp_path / "run"))
    assert rows["answers"].startswith(
        "about 30,720 tokens for candidates, if they are as in the first 64 answers of round 2"
    )


def test_the_plan_counts_pairs_of_earlier_rounds_and_of_the_easier_prompts_alone():
    """⌊.5 · .5 · 192⌋ = 48 kept, and 12 of earlier rounds: 60 in 4 steps of 16, twice."""
    found = dict(plan(load(TINY, ["pairs.keep=0.5", "pairs.easiest=0.5", "train.replay=0.25"])))
    assert found["pairs"] == "up to 192 base pairs, 48 kept, 60 trained on in 8 steps of 16"
