"""TensorBoard: one event file in `<run>/tensorboard`, written without torch, that each start of the run goes on with."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from selfplay.config import Config

PACKAGE = "tensorboard"
SECRETS = ()
NAME = "events.out.tfevents."  # How the name of an event file begins. TensorBoard reads them by name, and follows the last.
FRAME = 16  # Bytes of a record beside its data: length (8), its check sum (4), and the check sum of the data (4).


def require() -> None:
    """It needs nothing beside its package."""


def open_run(config: Config, run_dir: Path, run_id: str) -> TensorBoard:
    return TensorBoard(run_dir / "tensorboard")


class TensorBoard:
    """The newest event file of a folder, or a new one. TensorBoard's own writer would begin another at each start."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        path = max(folder.glob(f"{NAME}*"), default=folder / f"{NAME}{int(time.time()):010d}.selfplay")
        file = path.open("ab+")
        file.truncate(end := _end(file))  # What a killed writer left of a record would hide all that follows.
        self._writer = RecordWriter(file)
        if not end:
            self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def log(self, axis: str, values: Mapping[str, float], step: int) -> None:
        summary = self._summary(
            value=[self._summary.Value(tag=f"{axis}/{k}", simple_value=v) for k, v in values.items()]
        )
        self._write(self._event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        self._writer.close()

    def _write(self, event: object) -> None:
        self._writer.write(event.SerializeToString())  # type: ignore[attr-defined]
        self._writer.flush()


def _end(file: BinaryIO) -> int:
    """Where the last whole record of an event file ends, in bytes. No record is without data."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    size, before, end = file.seek(0, 2), 0, 0
    while end < size:
        file.seek(end)
        length = int.from_bytes(file.read(8), "little")
        if not length or end + FRAME + length > size:
            break
        before, end = end, end + FRAME + length
    file.seek(before)
    record = file.read(end - before)
    return end if not record or record[-4:] == masked_crc32c(record[12:-4]).to_bytes(4, "little") else before
