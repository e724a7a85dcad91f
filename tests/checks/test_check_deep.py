"""`check --deep`: a whole round of four prompts, in a folder of which nothing is left."""

import io
from pathlib import Path

import pytest
from mini import config
from rich.console import Console

from selfplay.checks.deep import deep, smallest
from selfplay.config import PublishConfig, load
from selfplay.errors import InputError
from selfplay.processes.reaping import RUN_MARKER
from selfplay.reporting.terminal import Display

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_round_of_four_prompts_is_one_step_with_the_memory_of_a_whole_one(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    given = load(file, ["publish={hub: me/mine, folder: /srv/mine, vllm: ['http://host']}"])
    small = smallest(given)
    assert (small.prompts.per_round, small.generate.candidates, small.train.epochs) == (4, 2, 1)
    assert small.train.batch_pairs >= 4 > small.train.batch_pairs - 4 * given.train.micro_batch_pairs * 8
    for name in ("micro_batch_pairs", "max_length", "accelerate", "lora", "bf16", "gradient_checkpointing"):
        assert getattr(small.train, name) == getattr(given.train, name), name
    assert (small.generate.engine, small.placement, small.policy) == (
        given.generate.engine,
        given.placement,
        given.policy,
    )
    assert small.track == "none" and small.publish == PublishConfig()


def test_what_a_round_refuses_is_refused_and_leaves_nothing(mini_world, tmp_path):
    wrong = config(mini_world, "policy.model=./nowhere")
    with pytest.raises(InputError, match="nowhere is no checkpoint folder"):
        deep(wrong, tmp_path / "runs" / "mine", Display(Console(file=io.StringIO())))
    assert not (tmp_path / "runs").exists()


@pytest.mark.timeout(400)
def test_the_whole_path_is_tried_beside_the_run_folder(mini_world, tmp_path):
    run_dir, said = tmp_path / "run", io.StringIO()
    run_dir.mkdir()
    (run_dir / "mine").write_text("untouched")
    left = tmp_path / ".run.deep-left" / "rounds"  # of one that was killed
    left.mkdir(parents=True)
    before = {path: path.stat().st_mtime_ns for path in [run_dir, *run_dir.rglob("*")]}
    found = deep(config(mini_world), run_dir, Display(Console(file=said, width=200)))
    assert [finding.level for finding in found] == ["ok", "ok"], found
    assert "8 answers were sampled and scored" in found[0].text and "one optimizer step" in found[1].text
    for stage in ("import", "generate", "score", "pairs", "train", "evaluate", "promote"):
        assert f"{stage} done" in said.getvalue()
    assert {path: path.stat().st_mtime_ns for path in [run_dir, *run_dir.rglob("*")]} == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    marker = f"{RUN_MARKER}={tmp_path.resolve()}/".encode()
    assert not [pid for pid in Path("/proc").glob("[0-9]*/environ") if marker in _read(pid)]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended
        return b""
