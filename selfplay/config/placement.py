"""The section `placement`: which GPUs do what."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from selfplay.config.base import Section

Gpus = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class PlacementConfig(Section):
    """A GPU is named by its number among those that the controller may use. Where CUDA_VISIBLE_DEVICES is `4,5,6,7`, number 0 is
    the GPU 4."""

    shared: bool = False
    """Every role uses every GPU, by turns: all engines sample and sleep, the reward models score and end, the trainer trains.
    `placement: shared` is short for it. Scores do not overlap with sampling then."""
    colocated: bool = False
    """Generator and trainer share their GPUs: the engine sleeps while the trainer works. Part of `shared`."""
    generator: Gpus | None = None
    """GPUs of the generator. The default is all that are visible."""
    trainer: Gpus | None = None
    """GPUs of the trainer. The default is all that are visible."""
    reward: Gpus | None = None
    """GPUs of the reward server. The default is all that are visible."""

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, given: Any) -> Any:
        given = {"shared": True} if given == "shared" else given
        if isinstance(given, dict) and given.get("shared") is True:
            return {"colocated": True, **given}
        return given

    @model_validator(mode="after")
    def _roles_fit(self) -> PlacementConfig:
        roles = {name: gpus for name in ("generator", "trainer", "reward") if (gpus := getattr(self, name)) is not None}
        if self.shared and (roles or not self.colocated):
            raise ValueError(
                "shared gives every role all GPUs by turns, so nothing else goes with it; to use some of the GPUs only, set "
                "CUDA_VISIBLE_DEVICES"
            )
        for name, gpus in roles.items():
            if twice := [gpu for gpu in gpus if gpus.count(gpu) > 1]:
                raise ValueError(f"{name} names GPU {twice[0]} twice")
        return self
