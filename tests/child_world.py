"""A trivial child for the tests of supervision, and the ways to start it and to see that it is gone."""

import sys
import time
from pathlib import Path

from selfplay.processes.child import Child
from selfplay.processes.reaping import marked

ECHO = """
import subprocess, sys
from selfplay.processes.protocol import protocol
channel = protocol()
print("a library's print")
grandchild = subprocess.Popen(["sleep", "300"], start_new_session=True)
channel.ready(grandchild=grandchild.pid)
for order in channel.orders():
    if order["order"] == "add":
        channel.progress(order, done=1)
        channel.result(order, order["a"] + order["b"])
    elif order["order"] == "hang":
        __import__("time").sleep(300)
    else:
        channel.error(order, "input", "unknown order", "send «add»")
"""
# What a launcher does: start the real child as a process of its own and wait for it.
LAUNCHER = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', sys.argv[1]]))"


def start(tmp_path: Path, argv: list[str] | None = None, **settings) -> Child:
    child = Child("echo", argv or [sys.executable, "-c", ECHO], run_dir=tmp_path, log=tmp_path / "echo.log", **settings)
    child.start()
    return child


def gone(tmp_path: Path, within: float = 20.0) -> bool:
    deadline = time.monotonic() + within
    while marked(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not marked(tmp_path)
