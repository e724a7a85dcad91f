"""What concerns all children of a process."""

from pathlib import Path

from child_world import start

from selfplay.processes import children
from selfplay.processes.reaping import marked


def test_secrets_that_are_not_theirs_are_kept_from_children(tmp_path, monkeypatch):
    monkeypatch.setattr(children, "_withheld", set())
    monkeypatch.setenv("THE_TOKEN", "hush-hush")
    monkeypatch.setenv("THE_KEY", "theirs")
    children.withhold("THE_TOKEN", "NOT_SET")
    child = start(tmp_path)
    child.wait_for("ready")
    inside = [pid for pid in marked(tmp_path) if b"hush-hush" in Path(f"/proc/{pid}/environ").read_bytes()]
    theirs = [pid for pid in marked(tmp_path) if b"theirs" in Path(f"/proc/{pid}/environ").read_bytes()]
    child.stop()
    assert inside == [] and len(theirs) >= 2
