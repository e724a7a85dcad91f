"""Logs: they stay short, keep their end, and make room on a full disk."""

import os

from child_world import start
from daemon_world import until

from selfplay.processes import logs


def test_the_log_of_a_child_is_bounded_while_it_runs_and_keeps_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "LARGEST_LOG", 1000)
    monkeypatch.setattr(logs, "LOG_SECONDS", 0.01)
    log, before = tmp_path / "echo.log", tmp_path / "echo.log.1"
    log.write_text("x" * 1001)
    child = start(tmp_path)
    child.wait_for("ready")
    until(lambda: log.read_text() == "a library's print\n")
    assert before.read_text() == "x" * 1000
    with log.open("a") as file:
        file.write("y" * 3000 + "the end")
    until(lambda: before.read_text() == "y" * 993 + "the end")
    until(lambda: log.stat().st_size <= 1000)
    with log.open("a") as file:
        file.write("goes on")
    assert log.read_text() == "goes on"  # cut, not full of holes
    child.stop()


def test_a_log_that_has_filled_the_disk_makes_room(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "LARGEST_LOG", 1000)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "sendfile", full)
    log = tmp_path / "echo.log"
    log.write_text("x" * 1001)
    logs.bound_log(log)
    assert log.stat().st_size == 0


def test_a_link_in_the_place_of_a_log_leads_nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "LARGEST_LOG", 1000)
    log, other = tmp_path / "echo.log", tmp_path / "other"
    other.write_text("x" * 1001)
    log.symlink_to(other)
    logs.bound_log(log)
    assert other.stat().st_size == 1001 and not (tmp_path / "echo.log.1").exists()
    with logs.open_log(log) as file:
        file.write(b"ours")
    assert log.read_text() == "ours" and other.stat().st_size == 1001
    (tmp_path / "echo.log.1").symlink_to(other)
    log.write_text("y" * 1001)
    logs.bound_log(log)
    assert (tmp_path / "echo.log.1").read_text() == "y" * 1000 and other.stat().st_size == 1001


def test_the_last_line_is_the_last_one_that_is_not_blank(tmp_path):
    log = tmp_path / "echo.log"
    for text, last in ((b"", "it said nothing"), (b"one\n two \n\n  \n", "two"), (b"x" * 9000 + b"\n\xff", "\ufffd")):
        log.write_bytes(text)
        assert logs.last_line(log) == last
