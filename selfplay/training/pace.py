"""What the trainer tells of its progress: the metrics of each optimizer step, and within a long one how far and how fast it is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from selfplay.training.epsilon_dpo import EpsilonDPOTrainer

SECONDS = 1.0  # least time between two reports from within a step

Report = Callable[[int, int, dict[str, float | None], dict[str, float]], None]
"""Steps done, steps, metrics of the step that ended, and the pace (`Reporter.pace`)."""


def flat(logs: dict[str, float]) -> dict[str, float | None]:
    """Flat `train/name` floats of a log entry; None for what is not finite, which JSON cannot hold."""
    return {
        f"train/{name.replace('/', '_')}": float(value) if math.isfinite(value) else None
        for name, value in logs.items()
        if name != "step"
    }


class Reporter(TrainerCallback):
    """Tells of each optimizer step, and of the micro-batches of one that takes longer than a second."""

    def __init__(self, report: Report, trainer: EpsilonDPOTrainer) -> None:
        self._report, self._trainer = report, trainer
        self._began = self._told = time.monotonic()
        self._first = self._micro = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._first = state.global_step  # where a resumed training goes on
        self._began = time.monotonic()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._micro = 0

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._micro += 1
        if state.is_world_process_zero and time.monotonic() - self._told >= SECONDS:
            within = {"micro_batch": self._micro, "micro_batches": self._trainer.current_gradient_accumulation_steps}
            self._tell(state, {}, {**within, **self.pace(state)})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs and state.is_world_process_zero:
            self._micro = 0
            self._tell(state, flat(logs), self.pace(state))

    def pace(self, state: Any) -> dict[str, float]:
        """`tokens_per_second`, of prompts and responses in all processes, and `seconds_left`; empty before there is any."""
        seconds = time.monotonic() - self._began
        tokens = float(self._trainer.tokens) * self._trainer.accelerator.num_processes  # the one wait for the GPU
        steps = (
            state.global_step - self._first + self._micro / max(1, self._trainer.current_gradient_accumulation_steps)
        )
        if not steps or seconds <= 0:
            return {}
        left = (state.max_steps - self._first - steps) * seconds / steps
        return {"tokens_per_second": tokens / seconds, "seconds_left": left}

    def _tell(self, state: Any, metrics: dict[str, float | None], pace: dict[str, float]) -> None:
        self._told = time.monotonic()
        self._report(state.global_step, state.max_steps, metrics, pace)
