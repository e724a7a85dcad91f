"""Two runners of one folder: locks that are deleted, folders that are moved and copied, runners that are killed."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faulty_world import HAS_COMPILER, until

from selfplay.errors import InputError, LockLost
from selfplay.rounds.command import take_over
from selfplay.storage import folders
from selfplay.storage.ledger import Store
from selfplay.storage.lock import RunLock
from selfplay.storage.runner import Runner as Record

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def refused(run_dir: Path) -> InputError:
    with pytest.raises(InputError) as error, RunLock(run_dir) as lock:
        Store(run_dir, lock)
    return error.value


def opened(run_dir: Path) -> int:
    """Work in a folder for a moment; the token."""
    with RunLock(run_dir) as lock:
        Store(run_dir, lock).close()
        assert lock.runner is not None
        return lock.runner.token


def remembered(run_dir: Path, **changes: object) -> None:
    """Have the ledger say something else of its last runner."""
    store = Store(run_dir)
    store.set_state("runner", store.state("runner") | changes)
    store.close()


@pytest.mark.slow
def test_a_lock_that_is_deleted_keeps_a_second_runner_out_and_comes_back(tmp_path, runners):
    run_dir = tmp_path / "run"
    first = runners(run_dir)
    first.working()
    (run_dir / ".lock").unlink()
    code, said = runners(run_dir).ended()
    assert code == 2 and "is in use by" in said
    until((run_dir / ".lock").exists)  # its next write has made it anew
    before = folders.read_json(run_dir / "last.json")
    assert f"is in use by process {json.loads((run_dir / '.lock').read_text())['pid']} on " in str(refused(run_dir))
    first.kill()
    assert opened(run_dir) == before + 1


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C compiler")
def test_where_folders_cannot_be_locked_a_deleted_lock_stops_the_first_runner_and_no_second_one_starts(
    tmp_path, runners
):
    run_dir = tmp_path / "run"
    first = runners(run_dir, faults="folders")
    first.working()
    first.signal(signal.SIGSTOP)
    (run_dir / ".lock").unlink()
    code, said = runners(run_dir, faults="folders").ended()
    assert code == 2 and "though its lock is free" in said
    first.signal(signal.SIGCONT)
    code, said = first.ended()
    assert code == 3 and "was deleted or replaced while this process worked there" in said


@pytest.mark.slow
def test_a_folder_that_is_moved_while_it_is_served_stops_its_runner_and_goes_on_at_its_new_place(tmp_path, runners):
    first = runners(tmp_path / "run")
    first.working()
    first.signal(signal.SIGSTOP)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert "is in use by process" in str(refused(tmp_path / "moved"))
    first.signal(signal.SIGCONT)
    code, said = first.ended()
    assert (
        code == 3
        and "was moved, deleted or replaced while this process worked in it" in said
        and not (tmp_path / "run").exists()
    )
    assert opened(tmp_path / "moved") == 2
    store = Store(tmp_path / "moved")
    assert f"the run is in {tmp_path / 'moved'} from here on" in store.events()[-1]["text"]
    store.close()


def moved_at(line: int, root: Path) -> bool:
    """Work a step in a folder that is moved before a line of selfplay/storage runs, counted from 1; False where there are not
    so many. What follows has to be LockLost, and nothing may appear in the old place."""
    run_dir, lines = root / "run", itertools.count(1)

    def trace(frame, event, argument):
        if os.sep + "storage" + os.sep not in frame.f_code.co_filename:
            return None
        if event == "line" and next(lines) == line:
            sys.settrace(None)
            run_dir.rename(root / "moved")
        return trace

    def step(name: str) -> None:
        with folders.folder(run_dir / "rounds" / name) as out:
            (out / "file").write_text(name)
        folders.write_json(run_dir / "last.json", name)
        store.event("step", name)

    with RunLock(run_dir) as lock:
        store = Store(run_dir, lock)
        step("first")
        before = sys.gettrace()
        try:
            sys.settrace(trace)
            step("second")
            sys.settrace(before)
            if run_dir.exists():
                return False
            step("third")
        except LockLost:
            assert not run_dir.exists(), line
            return True
        finally:
            sys.settrace(before)
    raise AssertionError(f"nobody noticed that the folder was moved before line {line}")


@pytest.mark.slow
def test_wherever_in_a_step_the_folder_is_moved_the_error_says_so_and_the_old_place_stays_empty(tmp_path):
    assert next(n for n in itertools.count(1) if not moved_at(n, tmp_path / str(n))) > 100


def test_a_ledger_that_cannot_be_opened_any_more_says_that_its_folder_was_moved(tmp_path):
    with RunLock(tmp_path / "run") as lock:
        store = Store(tmp_path / "run", lock)
        (tmp_path / "run").rename(tmp_path / "moved")
        with ThreadPoolExecutor(1) as other, pytest.raises(LockLost), store._engine.connect():
            other.submit(store.event, "step", "in a thread with a connection of its own").result()


@pytest.mark.slow
def test_a_copy_of_a_folder_that_is_served_asks_first_and_then_goes_its_own_way(tmp_path, runners, capsys):
    run_dir, copy = tmp_path / "run", tmp_path / "copy"
    first = runners(run_dir)
    first.working()
    first.signal(signal.SIGSTOP)
    shutil.copytree(run_dir, copy)
    error = refused(copy)
    assert (
        f"this is a copy of {run_dir} on " in str(error) and "still works" in str(error) and "take-over" in error.hint
    )
    take_over(TINY, [], copy)
    assert "is a run of its own now" in capsys.readouterr().out
    assert opened(copy) == 3
    assert "is in use by process" in str(refused(run_dir))  # what was copied is as it was
    first.kill()
    shutil.copytree(run_dir, tmp_path / "later")
    assert opened(tmp_path / "later") == 2  # its runner is gone: nobody has to be asked


def test_what_is_known_of_a_runner_elsewhere_decides_about_a_copy(tmp_path):
    run_dir = tmp_path / "run"
    opened(run_dir)
    there = {"inode": 1, "path": "/elsewhere/run", "ended": False}
    remembered(run_dir, **there, host="other", boot="another")
    assert "a copy of /elsewhere/run on other" in str(refused(run_dir)) and "may still work" in str(refused(run_dir))
    remembered(run_dir, **there, processes=1)  # in another container of this machine
    store = Store(run_dir)
    here = Record.here(run_dir)
    store.close()
    remembered(run_dir, host=here.host, boot=here.boot)
    assert "may still work" in str(refused(run_dir))
    remembered(run_dir, ended=True)
    assert opened(run_dir) == 2
    remembered(run_dir, **there, boot="the boot before")  # this machine was started anew
    assert opened(run_dir) == 3
    remembered(run_dir, ended=False, host="other", boot="another")  # the same folder, and its lock is free
    assert opened(run_dir) == 4


def test_a_process_whose_number_was_given_again_is_gone(tmp_path):
    here = Record.here(tmp_path)
    assert here.fate == "alive"
    assert dataclasses.replace(here, started=here.started - 1).fate == "gone"
    assert dataclasses.replace(here, boot="").fate == "unknown"
    assert Record.read({"pid": 1}) is None and Record.read("no JSON") is None


def test_a_later_runner_in_the_ledger_rolls_back_what_an_earlier_one_writes(tmp_path):
    with RunLock(tmp_path) as lock:
        store = Store(tmp_path, lock)
        store.event("step", "first")
        remembered(tmp_path, token=7)
        with pytest.raises(LockLost, match=r"taken over by another process \(token 7, here 1\)"):
            store.event("step", "second")
        assert [event["text"] for event in store.events()] == ["first"]
        store.close()


def test_what_lost_its_folder_commits_no_stage(tmp_path):
    run_dir = tmp_path / "run"
    with (
        RunLock(run_dir),
        pytest.raises(LockLost, match="moved, deleted or replaced"),
        folders.folder(run_dir / "rounds" / "0001"),
    ):
        run_dir.rename(tmp_path / "moved")
        (run_dir / "rounds").mkdir(parents=True)
    assert not (run_dir / "rounds" / "0001").exists() and not (tmp_path / "moved" / "rounds" / "0001").exists()


def test_a_copy_of_links_in_its_place_is_not_the_folder(tmp_path):
    run_dir = tmp_path / "run"
    with RunLock(run_dir):
        run_dir.rename(tmp_path / "moved")
        run_dir.mkdir()
        (tmp_path / "moved" / ".lock").rename(run_dir / ".lock")
        with pytest.raises(LockLost, match="moved, deleted or replaced"):
            folders.write_json(run_dir / "written.json", {})
    assert not (run_dir / "written.json").exists()


def test_threads_that_ask_while_the_lock_is_made_anew_are_not_in_each_others_way(tmp_path):
    with RunLock(tmp_path / "run") as lock, ThreadPoolExecutor(4) as threads:
        asking = [threads.submit(lambda: [lock.check() for _ in range(2000)]) for _ in range(4)]
        while not all(thread.done() for thread in asking):
            (tmp_path / "run" / ".lock").unlink(missing_ok=True)
        for thread in asking:
            thread.result()


@pytest.mark.parametrize("name", ["logs", "policies", ".lock", "ledger.sqlite"])
def test_a_file_where_the_run_has_a_folder_is_named_and_the_other_way_round(tmp_path, name):
    run_dir = tmp_path / "run"
    opened(run_dir)
    (run_dir / name).unlink(missing_ok=True)
    (run_dir / name).touch() if name in ("logs", "policies") else (run_dir / name).mkdir()
    with pytest.raises(InputError, match=rf"/{name} is a (file|folder), where the run has a (folder|file)") as error:
        RunLock(run_dir).__enter__()
    assert error.value.exit_code == 2 and "move it away" in error.value.hint
