"""Training an adapter."""

import math
from pathlib import Path

import pytest
import torch
from epsilon_dpo_world import LORA, config, make, model, pairs, tokenizer, weights_of
from peft.tuners.tuners_utils import BaseTunerLayer

from selfplay.training.epsilon_dpo import EpsilonDPOTrainer

pytestmark = pytest.mark.service


def test_an_adapter_learns_and_its_base_does_not_move(tmp_path: Path) -> None:
    trainer = EpsilonDPOTrainer(
        model(), None, args=config(tmp_path), train_dataset=pairs(), processing_class=tokenizer(), peft_config=LORA
    )
    before = weights_of(trainer)
    trainer.train()
    moved = {name for name, tensor in weights_of(trainer).items() if not torch.equal(before[name], tensor)}
    assert moved and all("lora_" in name for name in moved)
    first, *_, last, _ = trainer.state.log_history
    assert first["epsilon/zero"] == 1.0, "a fresh adapter is its own reference"
    assert last["loss"] < first["loss"] and trainer.beta != 0.1


def test_in_bf16_an_adapter_casts_no_input_and_learns_the_same_to_the_bit(tmp_path: Path) -> None:
    found = []
    for casts in (False, True):
        trainer = make(tmp_path / str(casts), peft_config=LORA, max_steps=3, bf16=True)
        layers = [layer for layer in trainer.model.modules() if isinstance(layer, BaseTunerLayer)]
        assert layers and not any(layer.cast_input_dtype_enabled for layer in layers)
        for layer in layers:
            layer.cast_input_dtype_enabled = casts
        trainer.train()
        found.append(weights_of(trainer))
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_an_explicit_reference_of_an_adapter_is_used(tmp_path: Path) -> None:
    trainer = make(tmp_path, peft_config=LORA, max_steps=1)
    full = make(tmp_path, max_steps=1)
    assert trainer.reference_logps()[0].tolist() == full.reference_logps()[0].tolist()
    trainer.train()
    full.train()
    assert trainer.losses[0] == pytest.approx(full.losses[0], rel=1e-5)  # the adapter starts as nothing
    assert trainer.losses[0] != pytest.approx(math.log(2), rel=1e-2)
