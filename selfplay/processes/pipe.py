"""The two pipes between the controller and a child, read and written line by line.

Both are used without blocking, so that neither side can wait for the other for ever: while the controller writes a long
order, it also reads what the child says. The work is linear in the length of a line.
"""

from __future__ import annotations

import os
from collections import deque
from typing import IO

from reward import polling
from selfplay.processes import children

LONGEST_LINE = 256 << 20
"""In bytes. The longest lines have some numbers for each prompt or answer of a shard or a round, and a million of them take 20 MB."""
READ_BYTES = 1 << 20  # The most that is read at a time. A pipe usually holds 64 KiB.


class Pipe:
    """The controller's end: lines of the child come in through `source`, and orders go out through `sink`.

    `silence` (seconds) is the longest time in which neither pipe may move.
    """

    def __init__(self, source: IO[bytes], sink: IO[bytes]) -> None:
        self._source, self._sink = source, sink
        self._lines: deque[bytes] = deque()  # Whole lines that nobody has asked for yet.
        self._pieces: list[bytes] = []  # What has come of the line that has not ended yet.
        self._length = 0  # Of these pieces, in bytes.
        self.overlong = False
        """Whether a line came that is longer than any may be. Then the output counts as closed."""
        for stream in (source, sink):
            os.set_blocking(stream.fileno(), False)

    def read_line(self, silence: float) -> bytes | None:
        """The next line without its end, or None where the child has closed its output. Raises TimeoutError."""
        while not self._lines:
            self._wait(silence)
            if not self._read():
                return None
        return self._lines.popleft()

    def take_in(self) -> bool:
        """Read what the child has written so far and keep it for `read_line`, so that it need not wait to write more.

        Returns whether the child still has its output open.
        """
        while not self.overlong and polling.wait({self._source: polling.READ}, 0):
            if not self._read():
                return False
        return not self.overlong

    @property
    def source(self) -> IO[bytes]:
        """What to wait for where several pipes are read."""
        return self._source

    @property
    def has_lines(self) -> bool:
        """Whether whole lines have come that nobody has asked for yet."""
        return bool(self._lines)

    def lines_so_far(self) -> tuple[list[bytes], bool]:
        """The whole lines that have come, without waiting for more, and whether the child has its output still open."""
        open_still = self.take_in()
        lines = list(self._lines)
        self._lines.clear()
        return lines, open_still

    def write(self, data: bytes, silence: float) -> None:
        """Write all of `data`. Raises TimeoutError, and BrokenPipeError where the child has closed one of the pipes.

        What the child writes is read meanwhile and kept for `read_line`. A child that is still telling of an earlier order
        takes no new one before it has been heard.
        """
        left = memoryview(data)
        while left:
            readable, writable = self._wait(silence, self._sink)
            if readable and not self._read():
                raise BrokenPipeError("the child has closed its output")
            if writable:
                left = left[os.write(self._sink.fileno(), left) :]

    def _wait(self, silence: float, sink: IO[bytes] | None = None) -> tuple[bool, bool]:
        """Wait until `source` can be read or `sink` can be written; tells which. Raises TimeoutError."""
        ready = polling.wait({self._source: polling.READ} | ({sink: polling.WRITE} if sink else {}), silence)
        if not ready:
            raise TimeoutError(f"nothing moved for {silence:.0f} s")
        return self._source in ready, sink in ready

    def _read(self) -> bool:
        """Take in what the child has written; False where it has closed its output."""
        try:
            # This bypasses the buffer of the file object, because `poll` does not see what lies in that buffer.
            chunk = os.read(self._source.fileno(), READ_BYTES)
        except BlockingIOError:
            return True
        children.note_output()
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            self._lines.append(b"".join([*self._pieces, end]))
            self._pieces.clear()
            self._length = 0
        self._pieces.append(rest)
        self._length += len(rest)
        if self._length > LONGEST_LINE:  # It would fill the memory of the controller.
            self._pieces.clear()
            self.overlong = True
        return bool(chunk) and not self.overlong
