"""Whole rounds on the miniature: undisturbed, and with everything killed in turn."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mini import ROOT, TINY, Command, nothing_left

from selfplay import artifacts, policies, weights
from selfplay.store import Store
from selfplay.types import Candidate, Pair

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def calm(mini_world, tmp_path_factory):
    """A run of two rounds that nobody disturbed."""
    run_dir = tmp_path_factory.mktemp("calm") / "run"
    code, out = Command(mini_world, run_dir, "--rounds", "2", "--report").finish()
    assert code == 0, out
    return run_dir, out


def state(run_dir: Path) -> dict[str, bytes]:
    """Every artifact that two equal runs share to the byte: rows, weights, verdicts."""
    files = [
        *run_dir.glob("rounds/*/*/*.parquet"),
        *run_dir.glob("rounds/*/*/verdict.json"),
        *run_dir.glob("policies/*/*.safetensors"),
    ]
    return {str(f.relative_to(run_dir)): f.read_bytes() for f in files}


def test_two_rounds_from_prompts_to_the_swap(calm):
    run_dir, out = calm
    for stage in ("prompts", "generate", "score", "pairs", "depth", "train", "evaluate", "promote"):
        assert f"round 2: {stage} done" in out
    assert "promoted: policy 2 serves" in out
    assert os.readlink(run_dir / "current") == "policies/0002"
    store = Store(run_dir)
    assert [r["state"] for r in store.rounds()] == ["promoted", "promoted"]
    assert [(p["version"], p["parent"], p["reference"], p["state"]) for p in store.policies()] == [
        (0, None, None, "initial"),
        (1, 0, 0, "promoted"),
        (2, 1, 1, "promoted"),
    ]
    metrics = store.metrics(2)
    assert metrics["generate/candidates"] == 32 * 4
    assert metrics["depth/pairs"] == metrics["pairs/kept"] > 10
    assert metrics["train/update_relative_norm"] > 1e-4
    assert 0 < metrics["train/beta"] < metrics["train/beta_start"]
    assert metrics["train/agreement_mean"] < 1e-4
    assert metrics["evaluate/kl_current"] != metrics["evaluate/kl_initial"]
    assert {"evaluate/gold_total", "evaluate/gold_content", "evaluate/audit_gold_win_rate"} <= metrics.keys()
    assert metrics["promote/first_token_seconds"] > 0
    store.close()
    assert (run_dir / "report.png").stat().st_size > 10_000
    assert (run_dir / "report.html").is_file()
    assert nothing_left(run_dir)
    # nothing temporary, no trainer state
    assert not [p for p in (run_dir / "rounds").rglob("*") if p.name.endswith((".partial", ".shards", ".work"))]


def test_each_round_samples_its_own_policy_and_prompts(calm):
    run_dir, _ = calm
    first, second = (
        artifacts.read_rows(run_dir / "rounds" / r / "generate" / "candidates.parquet", Candidate)
        for r in ("0001", "0002")
    )
    assert ({c.policy for c in first}, {c.policy for c in second}) == ({0}, {1})
    assert not {c.prompt_id for c in first} & {c.prompt_id for c in second}
    for rows in (first, second):
        assert len({(c.prompt_id, c.index) for c in rows}) == len(rows)
    pairs = artifacts.read_rows(run_dir / "rounds" / "0002" / "depth" / "pairs.parquet", Pair)
    by_key = {(c.prompt_id, c.index): c for c in second}
    for pair in pairs:
        chosen, rejected = by_key[pair.prompt_id, pair.chosen_index], by_key[pair.prompt_id, pair.rejected_index]
        assert (pair.chosen_ids, pair.rejected_ids) == (chosen.token_ids, rejected.token_ids)
        assert pair.chosen_logp == chosen.logp
        assert pair.explicit_margin > 0


def test_a_policy_is_a_plain_checkpoint_with_the_initial_tokenizer(calm, mini_world):
    run_dir, _ = calm
    manifest = policies.verify(run_dir / "policies" / "0002")
    assert (manifest.parent, manifest.round, manifest.reference) == (1, 2, 1)
    assert manifest.packages["trl"].startswith("1.16")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (run_dir / "policies" / "0002" / name).read_bytes() == (mini_world / "policy" / name).read_bytes()
    specs = [policies.tensors(p) for p in (mini_world / "policy", run_dir / "policies" / "0002")]
    assert {n: s[1] for n, s in specs[0].items()} == {n: s[1] for n, s in specs[1].items()}


def test_called_again_it_shows_what_is_there(calm, mini_world):
    run_dir, _ = calm
    code, out = Command(mini_world, run_dir, "--rounds", "2").finish()
    assert code == 0
    assert "has its 2 rounds already" in out
    assert "promoted" in out


def test_killed_everywhere_the_run_ends_with_the_same_artifacts(calm, mini_world, tmp_path):
    """Engine in mid-generation, reward server, trainer, then the controller while its trainer trains, then the engine in
    mid-evaluation, and Ctrl-C: the same command goes on each time, no process is left, and every artifact is the same."""
    run_dir = tmp_path / "run"
    first = run_dir / "rounds" / "0001"

    run = Command(mini_world, run_dir, "--rounds", "1")
    run.until(lambda: list(first.glob("generate-*.shards/00000000.parquet")), "the first shard")
    run.kill_child("selfplay.engine")
    run.until((first / "generate").is_dir, "the end of generate")
    run.kill_child("reward.server")
    run.until(lambda: list(first.glob("train.work/checkpoint-*/trainer_state.json")), "a save of the trainer")
    os.kill(run.process.pid, signal.SIGKILL)
    out = run.finish()[1]
    assert "generator" in out
    assert nothing_left(run_dir)
    assert not (run_dir / "policies" / "0001").exists()

    run = Command(mini_world, run_dir, "--rounds", "1")
    run.kill_child("selfplay.trainer")
    run.until((first / "train").is_dir, "the end of train")
    run.kill_child("selfplay.engine")
    code, out = run.finish()
    assert code == 0, out
    assert "round 1 is unfinished: going on with it" in out
    assert "generate «kept»" in out
    assert "starting it again" in out

    run = Command(mini_world, run_dir, "--rounds", "2")
    run.until((run_dir / "rounds" / "0002" / "score").is_dir, "the end of score")
    run.process.send_signal(signal.SIGINT)
    code, out = run.finish()
    assert code == 130, out
    assert "the same command goes on" in out
    assert nothing_left(run_dir)

    code, out = Command(mini_world, run_dir, "--rounds", "2").finish()
    assert code == 0, out
    ours, theirs = state(run_dir), state(calm[0])
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert nothing_left(run_dir)


def test_what_cannot_run_is_refused_with_exit_code_2(calm, mini_world, tmp_path):
    """None of these may take an engine's start: they are refused before anything heavy begins."""
    run_dir, _ = calm

    def refused(*args: str, at: Path = tmp_path / "x") -> str:
        code, out = Command(mini_world, at, *args).finish(60)
        assert code == 2, out
        assert "Traceback" not in out
        return out

    assert "did you mean train.beta?" in refused("--set", "train.bta=1")
    assert "no such file" in refused("--config", str(tmp_path / "none.yaml"))
    assert "policy.model: /nowhere is no checkpoint folder" in refused("--set", "policy.model=/nowhere")
    assert "reward.model: /nowhere is no checkpoint folder" in refused("--set", "reward.model=/nowhere")
    assert "cannot be imported" in refused("--set", "evaluate.gold=selfplay.tiny:nothing")
    assert "made by another config: run.seed (0 there, 9 here)" in refused("--set", "run.seed=9", at=run_dir)
    assert "at least 1" in refused("--rounds", "0")
    two = tmp_path / "two-labels"
    two.mkdir()
    config = json.loads((mini_world / "reward" / "config.json").read_text()) | {"id2label": {"0": "a", "1": "b"}}
    (two / "config.json").write_text(json.dumps(config))
    assert "has num_labels 2; a reward model has 1" in refused("--set", f"reward.model={two}")


def test_a_folder_in_use_names_its_holder(mini_world, tmp_path):
    (tmp_path / "run").mkdir()
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\nfrom selfplay.store import RunLock\nlock = RunLock(Path({str(tmp_path / 'run')!r})).__enter__()\nprint('held', flush=True)\nsys.stdin.read()"
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


def test_a_failed_stage_says_what_to_do_and_a_round_without_pairs_is_skipped(calm, mini_world):
    """Round 3 fails in its trainer and goes on under a changed configuration, where its β may not fall, which is said; in
    round 4 no margin is above the noise."""
    run_dir, _ = calm
    code, out = Command(mini_world, run_dir, "--rounds", "3", "--set", "train.agreement_mean=1e-15").finish()
    assert code == 3, out
    assert "round 3: stage train failed: the reference's log-probabilities differ from the generator's" in out
    assert "what to do: " in out
    assert "trainer.log" in out
    assert os.readlink(run_dir / "current") == "policies/0002"
    assert nothing_left(run_dir)

    sets = ("--set", "reward.noise=1000", "--set", "train.beta_min=0.1")
    code, out = Command(mini_world, run_dir, "--rounds", "4", *sets).finish()
    assert code == 0, out
    assert out.count("β is held at its limit 0.1") == 1
    assert "score «kept»" in out
    assert "no pair was left to train on" in out
    store = Store(run_dir)
    assert [r["state"] for r in store.rounds()] == ["promoted", "promoted", "promoted", "skipped"]
    assert [e["kind"] for e in store.events(3)] == ["failed", "promoted"]
    assert store.metrics(3)["train/beta"] == 0.1
    assert store.metrics(4)["pairs/dropped_noise"] == store.metrics(4)["pairs/base"]
    store.close()
    assert os.readlink(run_dir / "current") == "policies/0003"


def test_on_a_full_disk_the_run_stops_and_goes_on_when_there_is_room(calm, mini_world, small_disk):
    disk = small_disk("64m")
    run_dir, filler = disk / "run", disk / "filler"
    run = Command(mini_world, run_dir, "--rounds", "1")
    run.until((run_dir / "rounds" / "0001" / "score").is_dir, "the end of score")
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    code, out = run.finish()
    assert code == 3, out
    assert "Traceback" not in out
    assert "the disk" in out and "free" in out
    assert nothing_left(run_dir)

    filler.unlink()
    code, out = Command(mini_world, run_dir, "--rounds", "1").finish()
    assert code == 0, out
    ours, theirs = state(run_dir), state(calm[0])
    assert len(ours) > 10
    assert [name for name in ours if ours[name] != theirs[name]] == []


def test_with_a_reference_that_stays_implicit_rewards_are_log_ratios_to_it(mini_world, tmp_path):
    run_dir = tmp_path / "run"
    code, out = Command(
        mini_world, run_dir, "--rounds", "2", "--set", "train.reference=initial", "--set", "pairs.implicit=dpo"
    ).finish()
    assert code == 0, out
    first, second = (
        artifacts.read_rows(run_dir / "rounds" / r / "pairs" / "pairs.parquet", Pair) for r in ("0001", "0002")
    )
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


def test_a_loss_that_is_not_finite_stops_the_round_and_changes_no_policy(mini_world, tmp_path):
    code, out = Command(mini_world, tmp_path / "run", "--rounds", "1", "--set", "train.learning_rate=1e20").finish()
    assert code == 3, out
    assert "round 1: stage train failed: step " in out
    assert "no weight was changed by this step" in out
    assert "lower the learning rate" in out
    assert os.readlink(tmp_path / "run" / "current") == "policies/0000"
    assert nothing_left(tmp_path / "run")
