"""Reaping: what a killed controller leaves behind is ended at the next start, and nothing finished is lost."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
from child_world import ECHO, gone, start
from mini import ROOT

from selfplay.errors import DiskError
from selfplay.processes import scratch
from selfplay.processes.child import ChildDied
from selfplay.processes.reaping import marked, reap
from selfplay.storage import hashes

# Three stages, each done by a child; the controller records what it did and may be killed at any moment.
PIPELINE = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from selfplay.storage import folders, hashes
from selfplay.processes.child import Child
from selfplay.processes.reaping import reap
run = Path({run!r})
reap(run)
code = '''
import time
from pathlib import Path
from selfplay.processes.protocol import protocol
channel = protocol()
channel.ready()
for order in channel.orders():
    for i in range(5):
        time.sleep(0.02)
        with (Path(order["out"]) / "rows.txt").open("a") as file:
            file.write(f'{{order["stage"]}} {{i}}\\\\n')
    channel.result(order, 5)
'''
child = Child("worker", [sys.executable, "-c", code], run_dir=run, log=run / "worker.log")
child.start()
child.wait_for("ready")
for stage in ("one", "two", "three"):
    if (run / stage).is_dir():
        continue
    with folders.folder(run / stage) as folder:
        before = hashes.hash_files(run / "one") if stage != "one" else {{}}
        rows = child.order("work", stage=stage, out=str(folder))
        folders.write_json(folder / "manifest.json", {{"rows": rows, "before": before}})
child.stop()
"""


@pytest.mark.slow
def test_killed_anywhere_and_run_again_the_result_is_the_same(tmp_path):
    def command(run: Path) -> subprocess.Popen:
        code = PIPELINE.format(root=str(Path(__file__).parents[2]), run=str(run))
        return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])

    def result(run: Path) -> dict[str, bytes]:
        return {str(p.relative_to(run)): p.read_bytes() for s in ("one", "two", "three") for p in (run / s).rglob("*")}

    calm = tmp_path / "calm"
    calm.mkdir()
    assert command(calm).wait() == 0
    rng, kills, storms = random.Random(0), 0, 0
    while kills < 3:  # a fast machine may finish a run between two kills: then another one is disturbed
        storms += 1
        assert storms < 20
        stormy = tmp_path / f"stormy-{storms}"
        stormy.mkdir()
        while True:
            process = command(stormy)
            try:
                assert process.wait(rng.uniform(0.05, 0.5 + 0.3 * kills)) == 0
                break
            except subprocess.TimeoutExpired:
                victims = [process.pid, *marked(stormy)]
                os.kill(rng.choice(victims), signal.SIGKILL)
                kills += 1
                process.wait()
                assert gone(stormy)
            assert kills < 60
        assert result(stormy) == result(calm)
    assert json.loads((stormy / "three" / "manifest.json").read_text())["before"] == hashes.hash_files(calm / "one")
    assert not [p for p in stormy.iterdir() if p.name.endswith(".partial")]
    assert not list(Path(tempfile.gettempdir()).glob(f"{scratch._prefix(stormy)}*")), "of a killed guard, too"


def test_temporary_files_of_a_child_go_with_it_and_those_of_a_killed_guard_at_the_next_start(tmp_path):
    code = "import os, pathlib, sys, tempfile; sys.path.insert(0, sys.argv[1]); tempfile.mkdtemp(); " + ECHO
    child = start(tmp_path, [sys.executable, "-c", code, str(ROOT)])
    child.wait_for("ready")
    (folder,) = Path(tempfile.gettempdir()).glob(f"{scratch._prefix(tmp_path)}*")
    assert len(list(folder.iterdir())) == 1 and folder.stat().st_mode & 0o777 == 0o700
    child.stop()
    assert not folder.exists()
    child = start(tmp_path)
    child.wait_for("ready")
    os.kill(child.pid, signal.SIGKILL)
    child.stop()
    (folder,) = Path(tempfile.gettempdir()).glob(f"{scratch._prefix(tmp_path)}*")
    folder.with_name(folder.name + "-link").symlink_to(tmp_path)
    reap(tmp_path)
    assert not folder.exists() and tmp_path.is_dir()
    folder.with_name(folder.name + "-link").unlink()


def test_without_room_for_temporary_files_it_is_said_where(tmp_path, monkeypatch):
    """The guard finds a folder that nothing can be made in; the controller finds none at all."""
    (tmp_path / "sitecustomize.py").write_text("import tempfile\ntempfile.tempdir = '/proc/self'\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    child = start(tmp_path)
    with pytest.raises(ChildDied, match="was not started: no folder can be made in /proc/self .* TMPDIR"):
        child.wait_for("ready")
    none = "No usable temporary directory found in ['/tmp', '/var/tmp']"
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(
        tempfile, "_get_default_tempdir", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError(2, none))
    )
    with pytest.raises(DiskError, match="No usable temporary directory") as refused:
        reap(tmp_path)
    assert "TMPDIR" in refused.value.hint
