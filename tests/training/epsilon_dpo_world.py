"""ε-DPO trainers over random models of a few thousand weights, whose losses, steps and β can be looked at."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from plain_trainer import PlainEpsilonDPOTrainer
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
)

from selfplay.training.epsilon_dpo import EpsilonDPOConfig, EpsilonDPOTrainer

WORDS = 60


def tokenizer(words: int = WORDS) -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, words)}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def model(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": WORDS,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes)))


def pairs(n: int = 16, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, WORDS, (length,), generator=generator).tolist()

    return Dataset.from_list([
        {"prompt_ids": ids(3, 9), "chosen_ids": [*ids(2, 12), 2], "rejected_ids": [*ids(2, 12), 2]} for _ in range(n)
    ])  # fmt: skip


def config(folder: Path, **changes: Any) -> EpsilonDPOConfig:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "beta": 0.1,
        "epsilon": 0.1,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        "data_seed": 3,
    }
    return EpsilonDPOConfig(**(settings | changes))


class Recording(EpsilonDPOTrainer):
    """Keeps the loss, the steps s and the β of every training micro-batch, and β after every optimizer step."""

    def __init__(self, *rest: Any, **kwargs: Any) -> None:
        self.losses: list[float] = []
        self.steps: list[list[int]] = []
        self.used: list[float] = []
        self.betas: list[float] = []
        super().__init__(*rest, **kwargs)
        self.remove_callback(PrinterCallback)

    def _compute_loss(self, *rest: Any, **kwargs: Any) -> torch.Tensor:
        loss = super()._compute_loss(*rest, **kwargs)
        if self.model.training:
            self.losses.append(loss.item())
            self.used.append(self.beta)
        return loss

    def _count(self, steps: torch.Tensor, *rest: Any) -> None:
        if self.model.training:
            self.steps.append(steps.tolist())
        super()._count(steps, *rest)

    def step_taken(self) -> None:
        super().step_taken()
        self.betas.append(self.beta)


class PlainRecording(Recording, PlainEpsilonDPOTrainer):
    """The same of the trainer that holds whole logits."""


def make(
    folder: Path, data: Dataset | None = None, policy: Any = None, reference: Any = None, peft_config: Any = None,
    kind: type[Recording] = Recording, **changes: Any,
) -> Recording:  # fmt: skip
    """A trainer whose reference is another random model, so that steps are taken from the first batch on."""
    return kind(
        policy or model(), reference or model(7), args=config(folder, **changes), train_dataset=data or pairs(),
        processing_class=tokenizer(), peft_config=peft_config,
    )  # fmt: skip


def weights_of(trainer: EpsilonDPOTrainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=True)
