"""The pipe: lines come out whole, however they come in, and a long one costs no more than its length."""

import math
import os
import random
import sys
import threading
import time

import pytest
from child_world import gone, start

from reward import polling
from selfplay.processes import pipe as pipe_module
from selfplay.processes.child import ChildDied
from selfplay.processes.pipe import Pipe


@pytest.fixture
def ends():
    """A pipe, and what stands for the child: a file to write lines to, and one to read orders from."""
    (source, says), (hears, sink) = os.pipe(), os.pipe()
    files = [os.fdopen(source, "rb"), os.fdopen(sink, "wb"), os.fdopen(says, "wb", 0), os.fdopen(hears, "rb", 0)]
    yield Pipe(files[0], files[1]), files[2], files[3]
    for file in files:
        file.close()


def test_lines_are_the_same_wherever_they_are_cut(ends):
    pipe, says, _ = ends
    rng = random.Random(0)
    lines = [rng.randbytes(rng.choice([0, 1, 3, 500])).replace(b"\n", b"") for _ in range(200)]
    sent, found = b"".join(line + b"\n" for line in lines), []
    while sent:
        length = rng.choice([1, 2, 7, 4000])
        says.write(sent[:length])
        sent = sent[length:]
        while len(found) < len(lines):
            try:
                found.append(pipe.read_line(silence=0))
            except TimeoutError:
                break
    assert found == lines


def test_a_closed_output_ends_the_lines_after_the_last_whole_one(ends):
    pipe, says, _ = ends
    says.write(b"whole\ncut in the mid")
    says.close()
    assert [pipe.read_line(silence=1) for _ in range(3)] == [b"whole", None, None]


def test_silence_is_an_error_for_reader_and_writer(ends):
    pipe, _, _ = ends
    with pytest.raises(TimeoutError):
        pipe.read_line(silence=0.01)
    with pytest.raises(TimeoutError):
        pipe.write(b"x" * (4 << 20), silence=0.01)  # More than any pipe holds.


def test_writing_fails_once_the_other_side_is_closed(ends):
    pipe, says, hears = ends
    says.close()
    with pytest.raises(BrokenPipeError):
        pipe.write(b"x" * (4 << 20), silence=5)
    hears.close()
    with pytest.raises(BrokenPipeError):
        pipe.write(b"x\n", silence=5)


def test_what_comes_in_while_a_long_order_goes_out_is_kept(ends):
    pipe, says, hears = ends
    order, answer = b"o" * 3_000_000, b"a" * 3_000_000
    heard = bytearray()

    def child():
        says.write(answer + b"\n")  # It takes nothing before all of this is read.
        while len(heard) < len(order):
            heard.extend(hears.read(1 << 20))

    thread = threading.Thread(target=child)
    thread.start()
    pipe.write(order, silence=60)
    thread.join()
    assert bytes(heard) == order and pipe.read_line(silence=60) == answer


@pytest.mark.slow
def test_a_long_line_costs_no_more_than_its_length(tmp_path):
    """A reader that looked at the whole line again for each 64 KiB of it would take some 4 CPU seconds here."""
    long = """
from selfplay.processes.protocol import protocol
channel = protocol()
channel.ready()
for order in channel.orders():
    channel.result(order, "x" * order["length"])
"""
    child = start(tmp_path, [sys.executable, "-c", long])
    child.wait_for("ready")
    before = time.process_time()
    answer = child.order("say", length=48_000_000)
    assert time.process_time() - before < 1
    child.stop()
    assert answer == "x" * 48_000_000


def test_a_line_without_an_end_ends_the_output(ends, monkeypatch):
    monkeypatch.setattr(pipe_module, "LONGEST_LINE", 1000)
    pipe, says, _ = ends
    says.write(b"a" * 1000 + b"\n" + b"b" * 900 + b"\n" + b"c" * 600)
    assert [len(pipe.read_line(silence=1)) for _ in range(2)] == [1000, 900]
    says.write(b"c" * 401)
    assert pipe.read_line(silence=1) is None and pipe.overlong
    assert pipe.lines_so_far() == ([], False) and not pipe._pieces


@pytest.mark.slow
@pytest.mark.parametrize("way", ["order", "heard", "wait"])
def test_a_child_that_ends_no_line_is_ended_with_a_reason(tmp_path, monkeypatch, way):
    for module in ("pipe", "child"):
        monkeypatch.setattr(f"selfplay.processes.{module}.LONGEST_LINE", 1 << 20)
    endless = "import sys\nwhile True: sys.stdout.write('x' * 4096)"
    child = start(tmp_path, [sys.executable, "-c", endless])
    began = time.monotonic()
    with pytest.raises(ChildDied, match="the echo process wrote a line of more than 1048576 bytes and was ended"):
        if way == "wait":
            child.wait()
        order = child.send("anything")
        while way == "heard":
            child.heard()
        child.result(order)
    assert time.monotonic() - began < 10 and gone(tmp_path)


def test_a_wait_without_an_end_ends_when_something_comes():
    read, written = (os.fdopen(end, mode) for end, mode in zip(os.pipe(), ("rb", "wb"), strict=True))
    with read, written:
        written.write(b"x")
        written.flush()
        assert polling.wait({read: polling.READ}, math.inf) == {read: polling.READ}
