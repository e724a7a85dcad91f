"""A run whose every process is killed in turn, that is interrupted, and whose disk fills up: the same command goes on each
time, no process is left, and in the end every artifact is that of a run that nobody disturbed."""

import contextlib
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
from mini import CALM, Command, nothing_left, sets, state

from selfplay.storage.ledger import RESTARTS, Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def fill(file: Path) -> None:
    with file.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(1 << 16))


def test_disturbed_everywhere_the_run_ends_with_the_same_artifacts(calm, mini_world, tmp_path, request):
    """One story for all faults: each start costs half a minute. Only root can fill a disk of its own."""
    root = os.geteuid() == 0
    disk = request.getfixturevalue("small_disk")("128m") if root else tmp_path
    run_dir, filler = disk / "run", disk / "filler"
    first, second = run_dir / "rounds" / "0001", run_dir / "rounds" / "0002"

    def command() -> Command:
        return Command(mini_world, run_dir, "--rounds", "2", *sets(*CALM))

    # The trainer while it embeds, the engine in mid-generation, the reward server, the controller while its trainer trains.
    run = command()
    run.until(lambda: list(first.glob(".prompts.partial/drawn.parquet")), "the draw")
    run.kill_child("selfplay.training.trainer")
    run.until(lambda: list(first.glob("generate-*.shards/00000000.parquet")), "the first shard")
    run.kill_child("selfplay.generation.engine")
    run.until(lambda: list(first.glob("score-*.shards/*.parquet")), "the first scores")
    run.kill_child("reward.server")
    run.until(lambda: list(first.glob("train.work/checkpoint-*/trainer_state.json")), "a save of the trainer")
    os.kill(run.process.pid, signal.SIGKILL)
    out = run.finish()[1]
    assert "the generator process" in out and "starting it again" in out
    assert nothing_left(run_dir)
    assert not (run_dir / "policies" / "0001").exists()

    # Ctrl-C, while the children import.
    run = command()
    run.until(lambda: run.children("selfplay.training.trainer"), "a trainer")
    run.process.send_signal(signal.SIGINT)
    code, out = run.finish()
    assert code == 130, out
    assert "the same command goes on" in out
    assert nothing_left(run_dir)

    # The trainer before it trains, the engine in mid-evaluation; then the disk fills up in the second round.
    run = command()
    run.kill_child("selfplay.training.trainer")
    run.until((first / "train").is_dir, "the end of train")
    run.kill_child("selfplay.generation.engine")
    if root:
        run.until((second / "score").is_dir, "the end of score")
        fill(filler)
    code, out = run.finish()
    assert code == (3 if root else 0), out
    assert "Traceback" not in out
    assert "round 1 is unfinished: going on with it" in out
    assert "round 1: generate «kept»" in out and "round 1: evolve «kept»" in out
    assert "the generator process" in out and "starting it again" in out
    assert "promoted: policy 1 serves" in out
    assert nothing_left(run_dir)

    if root:
        assert "the disk" in out and "free" in out
        filler.unlink()
        code, out = command().finish()
        assert code == 0, out
        assert "round 2 is unfinished: going on with it" in out and "round 2: score «kept»" in out
        assert nothing_left(run_dir)

    ours, theirs = state(run_dir), state(calm[0])
    assert ours.keys() == theirs.keys() and len(ours) > 20
    assert [name for name in ours if ours[name] != theirs[name]] == []
    store = Store(run_dir)
    events = store.events()
    store.close()
    assert [e["round"] for e in events if e["kind"] == "evolve"] == [1, 2]  # neither lost nor doubled
    restarts = Counter(e["kind"] for e in events if e["kind"] in RESTARTS)
    engines = restarts.pop("engine_restart", 0) + restarts.pop("swap_restart", 0)  # the second may fall into a swap
    assert engines == 2
    assert restarts == {"trainer_restart": 2, "reward_restart": 1}
