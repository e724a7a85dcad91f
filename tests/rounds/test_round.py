"""Whole rounds on the miniature that nobody disturbed, and what the command refuses."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mini import CALM, ROOT, TINY, Command, nothing_left, overrides, rows, sets

from selfplay.models import weights
from selfplay.processes.child import Child
from selfplay.prompts import sealing
from selfplay.rounds.command import run_rounds
from selfplay.storage import checkpoints, policies
from selfplay.storage.ledger import Store
from selfplay.types import Candidate, Pair

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_two_rounds_from_prompts_to_the_swap(calm):
    run_dir, out = calm
    for stage in ("prompts", "generate", "score", "pairs", "evolve", "depth", "train", "evaluate", "promote"):
        assert f"round 2: {stage} done" in out
    assert "promoted: policy 2 serves" in out
    assert (run_dir / "current").read_text() == "2\n"
    store = Store(run_dir)
    assert [r["state"] for r in store.rounds()] == ["promoted", "promoted"]
    assert [(p["version"], p["parent"], p["reference"], p["state"]) for p in store.policies()] == [
        (0, None, None, "initial"),
        (1, 0, 0, "promoted"),
        (2, 1, 0, "promoted"),
    ]
    metrics = store.metrics(2)
    assert metrics["generate/candidates"] == 32 * 4
    assert metrics["depth/pairs"] == metrics["pairs/kept"] > 10
    assert metrics["train/update_relative_norm"] > 1e-4
    assert 0 < metrics["train/beta"] < metrics["train/beta_start"]
    assert (
        store.metrics(1)["train/agreement_mean"] < 1e-4
    )  # in the first round the reference is the policy that samples
    assert metrics["evaluate/kl_current"] != metrics["evaluate/kl_initial"]
    assert {"evaluate/gold_total", "evaluate/gold_content", "evaluate/audit_gold_win_rate"} <= metrics.keys()
    assert 0 < metrics["promote/first_token_seconds"] < metrics["promote/engine_start_seconds"]
    store.close()
    assert list((run_dir / "tensorboard").glob("events.*"))
    assert (run_dir / "report.png").stat().st_size > 10_000
    assert (run_dir / "report.html").is_file()
    assert nothing_left(run_dir)
    # nothing temporary, no trainer state
    assert not [p for p in (run_dir / "rounds").rglob("*") if p.name.endswith((".partial", ".shards", ".work"))]


def test_each_round_samples_its_own_policy_and_prompts(calm):
    run_dir, _ = calm
    first, second = (rows(run_dir, index, "generate/candidates", Candidate) for index in (1, 2))
    assert ({c.policy for c in first}, {c.policy for c in second}) == ({0}, {1})
    assert not {c.prompt_id for c in first} & {c.prompt_id for c in second}
    for sampled in (first, second):
        assert len({(c.prompt_id, c.index) for c in sampled}) == len(sampled)
    pairs = rows(run_dir, 2, "depth/pairs", Pair)
    by_key = {(c.prompt_id, c.index): c for c in second}
    for pair in pairs:
        chosen, rejected = by_key[pair.prompt_id, pair.chosen_index], by_key[pair.prompt_id, pair.rejected_index]
        assert (pair.chosen_ids, pair.rejected_ids) == (chosen.token_ids, rejected.token_ids)
        assert pair.chosen_logp == chosen.logp
        assert pair.explicit_margin > 0


def test_a_policy_is_a_plain_checkpoint_with_the_initial_tokenizer(calm, mini_world):
    run_dir, _ = calm
    manifest = policies.verify(run_dir / "policies" / "0002")
    assert (manifest.parent, manifest.round, manifest.reference) == (1, 2, 0)
    assert manifest.packages["trl"].startswith("1.16")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (run_dir / "policies" / "0002" / name).read_bytes() == (mini_world / "policy" / name).read_bytes()
    specs = [checkpoints.tensors(p) for p in (mini_world / "policy", run_dir / "policies" / "0002")]
    assert {n: s[1] for n, s in specs[0].items()} == {n: s[1] for n, s in specs[1].items()}


def test_called_again_it_shows_what_is_there(calm, mini_world):
    run_dir, _ = calm
    code, out = Command(mini_world, run_dir, "--rounds", "2", *sets(*CALM)).finish()
    assert code == 0
    assert "has its 2 rounds already" in out
    assert "promoted" in out


def test_what_cannot_run_is_refused_with_exit_code_2(calm, mini_world, tmp_path, monkeypatch, capsys):
    """Before anything heavy begins: no child is started for any of these."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(Child, "start", lambda child: pytest.fail(f"{child.name} was started"))

    def refused(*settings: str, config: Path = TINY, at: Path = tmp_path / "x", rounds: int | None = None) -> str:
        code = run_rounds(config, [*overrides(mini_world), *settings], at, rounds)
        out = " ".join(capsys.readouterr().out.split())
        assert code == 2, out
        assert "Traceback" not in out
        return out

    assert "did you mean train.beta?" in refused("train.bta=1")
    assert "no such file" in refused(config=tmp_path / "none.yaml")
    assert "policy.model: /nowhere is no checkpoint folder" in refused("policy.model=/nowhere")
    assert "reward.model: /nowhere is no checkpoint folder" in refused("reward.model=/nowhere")
    assert "cannot be imported" in refused("evaluate.gold=selfplay.worlds.tiny:nothing")
    assert "made by another config: run.seed (0 there, 9 here)" in refused("run.seed=9", at=calm[0])
    initial = calm[0] / "pool" / "initial.json"
    whole = initial.read_text()
    for text, there in ((whole.replace(str(mini_world), "/an/older/world"), True), (whole, False)):
        initial.write_text(text)
        sealing.seal(calm[0] / "pool")
        with contextlib.closing(Store(calm[0])) as store:
            store.set_state(sealing.STATE, None)
        if there:
            assert f"to begin anew in this one: rm -r {calm[0]}" in refused(at=calm[0])
    assert "at least 1" in refused(rounds=0)
    own = json.loads((mini_world / "reward" / "config.json").read_text())
    unsaid = {
        key: value for key, value in own.items() if key not in ("id2label", "label2id")
    }  # so Hugging Face writes two
    for i, config in enumerate((own | {"id2label": {"0": "a", "1": "b"}}, unsaid)):
        (tmp_path / f"two-{i}").mkdir()
        (tmp_path / f"two-{i}" / "config.json").write_text(json.dumps(config))
        shutil.copy(mini_world / "reward" / "model.safetensors", tmp_path / f"two-{i}")
        assert "has num_labels 2; a reward model has 1" in refused(f"reward.model={tmp_path / f'two-{i}'}")


def test_a_folder_in_use_names_its_holder(mini_world, tmp_path):
    (tmp_path / "run").mkdir()
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\nfrom selfplay.storage.lock import RunLock\nlock = RunLock(Path({str(tmp_path / 'run')!r})).__enter__()\nprint('held', flush=True)\nsys.stdin.read()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    code, out = Command(mini_world, tmp_path / "run").finish(60)
    holder.communicate()
    assert code == 2
    assert f"in use by process {holder.pid}" in out


def test_help_is_quick_to_read():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "round.py"), "--help"], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 0
    assert "--rounds" in done.stdout
    assert TINY.name in done.stdout


def test_with_a_reference_that_stays_implicit_rewards_are_log_ratios_to_it(calm, mini_world):
    run_dir, _ = calm
    first, second = (rows(run_dir, index, "pairs/pairs", Pair) for index in (1, 2))
    assert {p.implicit_margin for p in first} == {0.0}  # in the first round the reference is the policy that samples
    initial = weights.load(mini_world / "policy")
    for pair in second[:8]:
        whole = weights.sequence_logps(initial, [pair.prompt_ids + ids for ids in (pair.chosen_ids, pair.rejected_ids)])
        prompt = weights.sequence_logps(initial, [pair.prompt_ids])[0]
        chosen, rejected = (
            0.1 * (logp - (w - prompt)) for logp, w in zip((pair.chosen_logp, pair.rejected_logp), whole, strict=True)
        )
        assert abs(pair.implicit_signed - (chosen - rejected)) < 1e-4
    store = Store(run_dir)
    assert [p["reference"] for p in store.policies()] == [None, 0, 0]
    assert store.metrics(2)["train/beta_start"] == store.metrics(1)["train/beta"]  # the same reference: β goes on
    store.close()
