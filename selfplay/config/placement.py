"""The section `placement`: which GPUs do what."""

from __future__ import annotations

from selfplay.config.base import Section


class PlacementConfig(Section):
    colocated: bool = False
    """Generator and trainer share their GPUs: the engine sleeps while the trainer works."""
    generator: list[int] | None = None
    """GPUs of the generator; by default all that are visible."""
    trainer: list[int] | None = None
    """GPUs of the trainer; by default all that are visible."""
    reward: list[int] | None = None
    """GPUs of the reward server; by default all that are visible."""
