"""Files as streams of bytes in UTF-8: decompressed where they are compressed, whatever they are called."""

from __future__ import annotations

import codecs
import contextlib
import io
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from selfplay.errors import InputError

PACKED = {
    b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\x04\x22\x4d\x18": "lz4", b"\xfd7zXZ\x00": "xz",
}  # fmt: skip
"""How compressed files begin, and what pyarrow calls the compression; it has no xz, which Python reads."""
WIDE = {b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}
BOM = b"\xef\xbb\xbf"
HEAD = 1 << 16
BLOCK = 1 << 18


def head(path: Path) -> bytes:
    """The first bytes of a file as they are on the disk."""
    with path.open("rb") as file:
        return file.read(HEAD)


def packing(start: bytes) -> str | None:
    """The compression of a file that begins so."""
    return next((name for magic, name in PACKED.items() if start.startswith(magic)), None)


def is_wide(start: bytes) -> bool:
    """Whether a text begins with the mark of UTF-16. A text in UTF-8 never has a zero byte behind it."""
    return start[:2] in WIDE and b"\0" in start[2:64]


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Yield the content of a file in UTF-8, without a byte order mark. Raises InputError where it cannot be decompressed."""
    with path.open("rb") as raw, contextlib.ExitStack() as stack:
        how = packing(raw.read(8))
        raw.seek(0)
        stream: Any = raw
        if how == "xz":
            stream = stack.enter_context(lzma.open(raw))
        elif how is not None:
            stream = stack.enter_context(pa.CompressedInputStream(pa.PythonFile(raw, "r"), how))
        content = io.BufferedReader(_Blocks(_blocks(path, stream)), BLOCK)
        start = content.peek(64)[:64]
        if is_wide(start):
            content = io.BufferedReader(_Blocks(_recoded(path, content, WIDE[start[:2]])), BLOCK)
        elif start.startswith(BOM):
            content.read(len(BOM))
        yield content


class _Blocks(io.RawIOBase):
    """Blocks of bytes as a stream."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._left = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._left = memoryview(block)
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


def _blocks(path: Path, stream: Any) -> Iterator[bytes]:
    try:
        while block := stream.read(BLOCK):
            yield bytes(block)
    except (lzma.LZMAError, EOFError, OSError) as error:
        raise InputError(f"{path} cannot be read to its end: {error}", "it may be cut off: fetch it again") from None


def _recoded(path: Path, content: BinaryIO, encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)()
    content.read(2)
    try:
        while block := content.read(BLOCK):
            yield decoder.decode(block).encode()
        yield decoder.decode(b"", final=True).encode()
    except UnicodeError as error:
        raise InputError(f"{path} is no valid UTF-16: {error}", "write it in UTF-8") from None
