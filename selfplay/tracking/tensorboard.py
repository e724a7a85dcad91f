"""TensorBoard: event files in `<run>/tensorboard`, written without torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from selfplay.config import Config

PACKAGE = "tensorboard"
SECRETS = ()


def require() -> None:
    """It needs nothing beside its package."""


def open_run(config: Config, run_dir: Path, run_id: str) -> TensorBoard:
    return TensorBoard(run_dir / "tensorboard")


class TensorBoard:
    """Event files in a folder."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(folder))

    def log(self, axis: str, values: Mapping[str, float], step: int) -> None:
        summary = self._summary(
            value=[self._summary.Value(tag=f"{axis}/{k}", simple_value=v) for k, v in values.items()]
        )
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        self._writer.close()
