"""Settings, data and models that the trainer refuses."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from epsilon_dpo_world import WORDS, config, make, model, pairs, tokenizer, weights_of
from peft import PromptTuningConfig
from transformers import (
    LlamaForCausalLM,
)
from trl import DPOConfig

from selfplay.errors import TrainError
from selfplay.training.epsilon_dpo import EpsilonDPOConfig, EpsilonDPOTrainer

pytestmark = pytest.mark.service


@pytest.mark.parametrize(
    "setting",
    [
        {"loss_type": "hinge"}, {"loss_type": ["sigmoid", "sft"]}, {"f_divergence_type": "js_divergence"},
        {"ld_alpha": 0.5}, {"use_weighting": True}, {"sync_ref_model": True}, {"precompute_ref_log_probs": True},
        {"use_liger_kernel": True}, {"disable_dropout": False}, {"padding_free": True}, {"loss_weights": [2.0]},
        {"logging_nan_inf_filter": True}, {"epsilon": 1.0}, {"epsilon": -0.1}, {"beta": 0.0}, {"label_smoothing": 0.5},
        {"nll_weight": -1.0}, {"beta": 0.1, "beta_min": 0.2}, {"beta": 0.1, "beta_max": 0.05},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_have_no_meaning_are_refused(tmp_path: Path, setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(reversed(setting)).split("_")[0]):
        make(tmp_path, **setting)


def test_a_plain_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="EpsilonDPOConfig"):
        EpsilonDPOTrainer(model(), args=DPOConfig(str(tmp_path), use_cpu=True), train_dataset=pairs())


def test_defaults_that_hide_something_are_off(tmp_path: Path) -> None:
    args = EpsilonDPOConfig(str(tmp_path), use_cpu=True)
    assert (args.bf16, args.gradient_checkpointing, args.max_length, args.logging_nan_inf_filter) == (False,) * 2 + (
        None,
        False,
    )
    assert args.epsilon == 0.01


ROW = {"prompt_ids": [3, 4], "chosen_ids": [5, 2], "rejected_ids": [6, 7, 2]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "not text"),
        ([ROW, ROW | {"rejected_ids": []}], "row 1 has no rejected_ids"),
        ([ROW, ROW | {"chosen_ids": [5] * 40}], "row 1.*42 tokens"),
        ([ROW | {"chosen_ids": [WORDS, 2]}], f"token id {WORDS}"),
    ],
)
def test_data_that_cannot_be_taken_as_it_is(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path, data=Dataset.from_list(rows), max_length=32)


class Scaled(LlamaForCausalLM):
    """A model whose config says nothing of what it does to its logits."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * 1.1
        return outputs


def test_a_model_that_does_more_to_its_logits_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    for policy, reference in ((Scaled(model().config), model()), (model(), Scaled(model().config))):
        trainer = make(tmp_path, policy=policy, reference=reference)
        with pytest.raises(TrainError, match="Scaled does more to its logits") as error:
            trainer.train()
        assert error.value.kind == "input" and trainer.losses == []


def test_prompt_learning_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use LoRA"):
        make(tmp_path, peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def test_no_pairs_are_refused(tmp_path: Path) -> None:
    empty = pairs(1).select([])
    with pytest.raises(ValueError, match="no pairs"):
        EpsilonDPOTrainer(model(), args=config(tmp_path), train_dataset=empty, processing_class=tokenizer())


def test_a_loss_that_is_not_a_number_stops_before_any_weight_changes(tmp_path: Path) -> None:
    broken = model()
    broken.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan
    trainer = make(tmp_path, policy=broken)
    before = weights_of(trainer)
    with pytest.raises(TrainError, match="step 1: the mean loss is nan") as error:
        trainer.train()
    assert error.value.kind == "nonfinite" and error.value.hint
    assert all(torch.equal(before[name], t) or t.isnan().any() for name, t in weights_of(trainer).items())
