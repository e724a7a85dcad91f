"""A step of ε-DPO beside one of TRL's DPO: seconds and peak memory, at the shapes of models of 1 to 8 billion parameters.

Both trainers run their own loops on the same data: forward, backward, clipping and optimizer, in bfloat16 with float32
weights, activations recomputed. The models have few layers. Two depths are measured, and a line through them says what the
whole model would take: that is marked as extrapolated.
"""

from __future__ import annotations

import copy
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from gpu_kit import checkpoints, memory
from gpu_kit.part import Findings
from gpu_kit.sizes import Shape, Sizes, StepCase
from selfplay.training.epsilon_dpo import EpsilonDPOConfig, EpsilonDPOTrainer

ARMS = ("TRL's DPO", "ε-DPO")
Step = tuple[float, float]  # seconds, GiB at the peak


class TokenisedDPOTrainer(DPOTrainer):
    """TRL's own trainer on data that is tokenised already, as ours is."""

    def _prepare_dataset(self, dataset: Any, *rest: Any) -> Any:
        return dataset


class Clock(TrainerCallback):
    """Seconds of each step, and the peak of the memory in all but the first."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if len(self.seconds) == 1:
            memory.forget_peak()
        _finish()
        self._began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        _finish()
        self.seconds.append(time.perf_counter() - self._began)


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(sizes: Sizes, work: Path, findings: Findings) -> None:
    for case in sizes.cases:
        found: dict[tuple[str, int], Step] = {}
        for layers in sizes.depths:
            for arm in ARMS:
                what = f"{case.name}, {layers} layers: {arm}"
                with findings.step(what):
                    found[arm, layers] = step(arm, case, layers, sizes, work)
                    seconds, peak = found[arm, layers]
                    findings.tell(what, seconds_a_step=seconds, GiB_peak=peak)
        for arm in ARMS:
            if all((arm, layers) in found for layers in sizes.depths):
                extrapolate(findings, case, arm, sizes.depths, [found[arm, layers] for layers in sizes.depths])
        ours, theirs = (found.get((arm, sizes.depths[-1])) for arm in reversed(ARMS))
        if ours and theirs:
            findings.tell(
                f"{case.name}, {sizes.depths[-1]} layers: ε-DPO ÷ TRL's DPO",
                seconds=ours[0] / theirs[0],
                peak=ours[1] / theirs[1],
            )


def extrapolate(findings: Findings, case: StepCase, arm: str, depths: tuple[int, int], steps: list[Step]) -> None:
    """A line through the figures at two depths, at the depth of the whole model."""
    layers = case.shape.layers
    seconds, peak = (a + (b - a) / (depths[1] - depths[0]) * (layers - depths[0]) for a, b in zip(*steps, strict=True))
    findings.tell(f"{case.name}, all {layers} layers, extrapolated: {arm}", seconds_a_step=seconds, GiB_peak=peak)


def step(arm: str, case: StepCase, layers: int, sizes: Sizes, work: Path) -> Step:
    """Median seconds of the timed steps, and the peak."""
    clock = Clock()
    trainer = build(arm, case, case.shape.with_layers(layers), sizes, work, clock)
    try:
        trainer.train()
        return statistics.median(clock.seconds[1:]), memory.peak()
    finally:
        del trainer
        checkpoints.release()


def build(arm: str, case: StepCase, shape: Shape, sizes: Sizes, work: Path, clock: Clock) -> Any:
    from peft import LoraConfig

    model = checkpoints.language_model(shape, torch.float32)
    kind, config = (EpsilonDPOTrainer, EpsilonDPOConfig) if arm == "ε-DPO" else (TokenisedDPOTrainer, DPOConfig)
    args = config(
        output_dir=str(work / "steps"), use_cpu=not torch.cuda.is_available(), bf16=True, gradient_checkpointing=True,
        max_length=None, report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1000,
        per_device_train_batch_size=sizes.pairs, max_steps=sizes.steps + 1, beta=0.1, learning_rate=1e-5,
    )  # fmt: skip
    lora = LoraConfig(r=sizes.rank, lora_alpha=2 * sizes.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return kind(
        model, None if case.lora else copy.deepcopy(model), args=args, train_dataset=pairs(shape, sizes),
        processing_class=checkpoints.tokenizer(shape.vocabulary), callbacks=[clock],
        peft_config=lora if case.lora else None,
    )  # fmt: skip


def pairs(shape: Shape, sizes: Sizes) -> Any:
    """Pairs of the longest prompts and answers, enough for every step."""
    from datasets import Dataset

    torch.manual_seed(5)
    count = sizes.pairs * (sizes.steps + 1)

    def ids(length: int) -> list[list[int]]:
        found: list[list[int]] = torch.randint(10, shape.vocabulary, (count, length)).tolist()
        return found

    answers = [ids(sizes.answer_tokens) for _ in range(2)]
    return Dataset.from_dict(
        {"prompt_ids": ids(sizes.prompt_tokens), "chosen_ids": answers[0], "rejected_ids": answers[1]}
    )
