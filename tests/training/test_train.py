import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from largest import Largest
from peft import LoraConfig, PromptTuningConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from plain_trainer import PlainEpsilonDPOTrainer
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
)
from trl import DPOConfig, DPOTrainer

from selfplay.errors import TrainError
from selfplay.methods import epsilon_dpo
from selfplay.methods.tiles import Tile
from selfplay.training.epsilon_dpo import STATE_FILE, EpsilonDPOConfig, EpsilonDPOTrainer

pytestmark = pytest.mark.service

GOLDEN = Path(__file__).parents[1] / "golden"
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


# --- the authors' trajectory ----------------------------------------------------------------------------------------


def golden_models(golden: dict[str, Any]) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    weights = load_file(GOLDEN / "edpo.safetensors")
    loaded = []
    for name in ("policy", "reference"):
        one = LlamaForCausalLM(LlamaConfig(**golden["model_config"]))
        one.load_state_dict({k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(f"{name}.")})
        loaded.append(one)
    return loaded[0], loaded[1]


def test_golden_trajectory_of_the_authors(tmp_path: Path) -> None:
    golden = json.loads((GOLDEN / "edpo.json").read_text())
    policy, reference = golden_models(golden)
    micro = golden["micro_batches"]
    rows = [pair for batch in micro for pair in batch["pairs"]]
    data = Dataset.from_list([{f"{k}_ids": row[k] for k in ("prompt", "chosen", "rejected")} for row in rows])
    args = config(
        tmp_path, per_device_train_batch_size=len(micro[0]["pairs"]), num_train_epochs=1,
        gradient_accumulation_steps=golden["gradient_accumulation_steps"], learning_rate=golden["learning_rate"],
        beta=golden["beta"], epsilon=golden["epsilon"], max_grad_norm=0.0, weight_decay=0.0,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = Recording(
        policy, reference, args=args, train_dataset=data,
        processing_class=tokenizer(golden["model_config"]["vocab_size"]),
    )  # fmt: skip
    trainer.train()

    assert trainer.losses == pytest.approx([batch["loss"] for batch in micro], rel=1e-4)
    after = [*trainer.used[1:], trainer.beta]  # β that the next micro-batch uses
    assert after == pytest.approx([batch["beta_after"] for batch in micro], abs=1e-6)
    assert [np.mean(np.array(s) == 1) for s in trainer.steps] == [batch["steps_p"] for batch in micro]
    assert [np.mean(np.array(s) == -1) for s in trainer.steps] == [batch["steps_n"] for batch in micro]
    for name, parameter in trainer.model.named_parameters():
        assert parameter.norm().item() == pytest.approx(golden["final_parameter_norms"][name], rel=1e-5)


# --- loss -------------------------------------------------------------------------------------------------------------


def test_without_epsilon_it_is_the_sigmoid_loss_of_trl(tmp_path: Path) -> None:
    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *rest: Any) -> Any:
            return dataset

    ours = make(tmp_path, epsilon=0.0)
    ours.train()
    lengths = [2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in pairs()]
    assert int(ours.tokens) == 2 * sum(lengths)  # two epochs
    names = ("output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "beta",
             "learning_rate", "lr_scheduler_type", "save_strategy", "logging_steps", "disable_tqdm", "use_cpu", "seed",
             "data_seed", "bf16", "gradient_checkpointing", "max_length")  # fmt: skip
    theirs = Tokenised(
        model(), model(7), args=DPOConfig(**{name: getattr(ours.args, name) for name in names}), train_dataset=pairs(),
        processing_class=tokenizer(), callbacks=[],
    )  # fmt: skip
    theirs.train()
    for log, other in zip(ours.state.log_history[:-1], theirs.state.log_history[:-1], strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"):
            assert log[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), name
        assert log["beta"] == 0.1
    for name, parameter in theirs.model.named_parameters():
        torch.testing.assert_close(ours.model.get_parameter(name), parameter, rtol=1e-4, atol=1e-5)


def gemma(seed: int) -> Gemma2ForCausalLM:
    """A model with soft-capping, tied weights and a vocabulary large beside the rest."""
    torch.manual_seed(seed)
    return Gemma2ForCausalLM(Gemma2Config(
        vocab_size=WORDS, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, pad_token_id=0, final_logit_softcapping=2.0,
        initializer_range=0.2, attn_implementation="eager"))  # fmt: skip


LEAN_CASES: dict[str, Any] = {
    "full": lambda: {},
    "tied": lambda: {"policy": model(tie_word_embeddings=True), "reference": model(7, tie_word_embeddings=True)},
    "capped": lambda: {"policy": gemma(0), "reference": gemma(7)},
    "adapter": lambda: {"peft_config": LORA},
    "adapter alone": lambda: {"peft_config": LORA, "reference": None},
    "head saved by the adapter": lambda: {"peft_config": LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"), "reference": None},
    "recomputed": lambda: {"gradient_checkpointing": True},
    "smoothed": lambda: {"label_smoothing": 0.1},
    "in bf16": lambda: {"bf16": True},
}  # fmt: skip


@pytest.mark.parametrize("name", LEAN_CASES)
def test_it_equals_the_trainer_that_holds_whole_logits(tmp_path: Path, name: str) -> None:
    trained = []
    for kind in (Recording, PlainRecording):
        settings = {"policy": model(), "reference": model(7), "peft_config": None} | LEAN_CASES[name]()
        policy, reference, peft_config = (settings.pop(one) for one in ("policy", "reference", "peft_config"))
        trainer = kind(
            policy, reference, args=config(tmp_path, **settings), train_dataset=pairs(), processing_class=tokenizer(),
            peft_config=peft_config,
        )  # fmt: skip
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.train()
        with trainer.accelerator.autocast():
            trainer._compute_loss(trainer.model, batch).backward()
        gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
        trainer.model.zero_grad()
        trainer.train()
        trained.append((trainer, gradients))
    (lean, gradients), (plain, wanted) = trained
    rough = name == "in bf16"  # the plain one rounds its logits to bfloat16 before they are mixed
    assert set(gradients) == set(wanted)
    for parameter, gradient in gradients.items():
        if rough:
            assert (gradient - wanted[parameter]).norm() < 2e-2 * wanted[parameter].norm(), parameter
        else:
            torch.testing.assert_close(gradient, wanted[parameter], rtol=1e-5, atol=1e-5)
    assert lean.losses == pytest.approx(plain.losses, rel=2e-2 if rough else 1e-5)
    if not rough:
        assert lean.steps == plain.steps
        assert lean.betas == plain.betas != [0.1] * 4


def test_whole_logits_never_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epsilon_dpo, "usual_tile", lambda _: Tile(8, 100))
    trainer = make(tmp_path, policy=model(vocab_size=4000), reference=model(7, vocab_size=4000))
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    trainer._compute_loss(trainer.model, batch)  # with the check of the heads, over a few tokens
    trainer.model.requires_grad_(False)
    trainer.model.model.requires_grad_(True)
    trainer.model.model.embed_tokens.requires_grad_(False)
    with Largest() as largest:
        trainer._compute_loss(trainer.model, batch).backward()
        trainer.reference_logps()
    assert largest.elements < 0.2 * int(batch["completion_mask"].sum()) * 4000


def test_reference_logps_are_those_of_each_sequence_alone(tmp_path: Path) -> None:
    """Padding, batching and the window of response positions must not show."""
    trainer = make(tmp_path)
    chosen, rejected = trainer.reference_logps()
    for row, *got in zip(pairs(), chosen, rejected, strict=True):
        for name, logp in zip(("chosen_ids", "rejected_ids"), got, strict=True):
            ids = torch.tensor([row["prompt_ids"] + row[name]])
            logps = trainer.ref_model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            assert logp.item() == pytest.approx(logps[len(row["prompt_ids"]) - 1 :].sum().item(), rel=1e-5)


def test_reference_logps_of_some_pairs_are_theirs_in_their_order_and_each_batch_is_told(tmp_path: Path) -> None:
    """Six of sixteen pairs, in batches of four."""
    trainer = make(tmp_path, per_device_eval_batch_size=4)
    everything, told, rows = trainer.reference_logps(), [], [11, 2, 3, 15, 0, 7]
    found = trainer.reference_logps(trainer.train_dataset.select(rows), lambda: told.append(1))
    for some, whole in zip(found, everything, strict=True):
        torch.testing.assert_close(some, whole[rows], rtol=1e-5, atol=1e-5)
    assert len(told) == 2


def test_a_policy_that_is_its_reference_takes_no_step(tmp_path: Path) -> None:
    trainer = make(tmp_path, reference=model(), num_train_epochs=1)
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert (
        first["epsilon/zero"] == 1.0 and first["beta"] == 0.1 and first["kl/pair_tokens"] == pytest.approx(0, abs=1e-5)
    )
    assert second["epsilon/zero"] < 1.0 and second["kl/pair_tokens"] > 0


def test_kl_is_that_of_the_two_models_at_the_tokens_of_the_pairs(tmp_path: Path) -> None:
    """With r = π/π_ref, the mean over responses of Σ_t r·log r − r + 1, at the weights that the first step begins with."""
    trainer = make(tmp_path, num_train_epochs=1, per_device_train_batch_size=16, gradient_accumulation_steps=1)
    policy, reference, found = model(), model(7), []
    for row in pairs():
        for name in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor(row["prompt_ids"] + row[name])
            with torch.no_grad():
                logps = [
                    m(ids[None])
                    .logits[0, :-1]
                    .log_softmax(-1)
                    .gather(-1, ids[1:, None])[len(row["prompt_ids"]) - 1 :, 0]
                    for m in (policy, reference)
                ]
            ratio = (logps[0] - logps[1]).exp()
            found.append((ratio * ratio.log() - ratio + 1).sum().item())
    trainer.train()
    assert trainer.state.log_history[0]["kl/pair_tokens"] == pytest.approx(np.mean(found), rel=1e-4)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain, recomputed = make(tmp_path), make(tmp_path, gradient_checkpointing=True)
    plain.train()
    recomputed.train()
    assert plain.losses == pytest.approx(recomputed.losses, rel=1e-6)


def test_router_loss_of_a_mixture_of_experts_is_added(tmp_path: Path) -> None:
    def mixture() -> MixtralForCausalLM:
        torch.manual_seed(0)
        return MixtralForCausalLM(MixtralConfig(
            vocab_size=WORDS, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=2, pad_token_id=0, router_aux_loss_coef=0.5,
            output_router_logits=True))  # fmt: skip

    losses = {}
    for coefficient in (0.0, 0.5):
        trainer = make(tmp_path, policy=mixture(), reference=mixture(), max_steps=1, router_aux_loss_coef=coefficient)
        trainer.train()
        losses[coefficient] = trainer.losses[0]
    assert losses[0.0] == pytest.approx(math.log(2), rel=1e-5)
    assert (
        losses[0.5] > losses[0.0] + 0.4
    )  # the balancing loss of two experts is 1 at balance, times two experts a token


def test_nll_of_the_chosen_is_added_by_its_weight(tmp_path: Path) -> None:
    """Per chosen response −log π(y_w|x) / |y_w|, mean over pairs, here against each response scored alone."""
    plain, mixed = make(tmp_path, num_train_epochs=1), make(tmp_path, num_train_epochs=1, nll_weight=0.5)
    batch = next(iter(mixed.get_train_dataloader()))
    alone = []
    for ids, mask in zip(batch["input_ids"][:4], batch["completion_mask"][:4].bool(), strict=True):
        logps = mixed.model(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        alone.append(-logps[mask[1:]].mean().item())
    plain.train()
    mixed.train()
    assert mixed.losses[0] == pytest.approx(plain.losses[0] + 0.5 * np.mean(alone), rel=1e-5)
    assert mixed.state.log_history[-2]["nll/chosen"] < plain.state.log_history[-2]["nll/chosen"]


def test_a_short_last_micro_batch_counts_by_its_pairs(tmp_path: Path) -> None:
    """13 pairs in steps of 8: the second step has micro-batches of 4 and 1, and is what one batch of 5 would be."""
    trainers = [
        make(tmp_path, pairs(13), num_train_epochs=1, per_device_train_batch_size=size, gradient_accumulation_steps=n)
        for size, n in ((4, 2), (8, 1))
    ]
    for trainer in trainers:
        trainer.train()
    uneven, whole = trainers
    for log, other in zip(uneven.state.log_history[:-1], whole.state.log_history[:-1], strict=True):
        for name in ("loss", "grad_norm"):
            assert log[name] == pytest.approx(other[name], rel=1e-4)
    for name, expected in weights_of(whole).items():
        torch.testing.assert_close(weights_of(uneven)[name], expected, rtol=1e-4, atol=1e-5)


def test_the_drop_of_the_chosen_is_averaged_over_the_last_steps(tmp_path: Path) -> None:
    """Ten steps' means of log π/π_ref, which a checkpoint carries on; the reference of the first step is the policy."""
    whole = make(
        tmp_path, reference=model(), num_train_epochs=7, learning_rate=3e-2, save_strategy="steps", save_steps=3
    )
    whole.train()
    logs = [log for log in whole.state.log_history if "chosen_drop" in log]
    sides = [[log[f"logratios/{side}"] for log in logs] for side in ("chosen", "rejected")]
    for i, log in enumerate(logs):
        last = [np.mean(side[max(0, i - 9) : i + 1]) for side in sides]
        assert log["chosen_drop"] == pytest.approx(max(0.0, -max(last)), abs=1e-6)
        beta = logs[i - 1]["beta"] if i else 0.1
        margin = log["logratios/chosen"] - log["logratios/rejected"]
        assert log["rewards/margins"] == pytest.approx(beta * margin, rel=1e-5, abs=1e-6)
    assert logs[0]["chosen_drop"] == pytest.approx(0, abs=1e-5)
    resumed = make(tmp_path / "again", reference=model(), num_train_epochs=7, learning_rate=3e-2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert resumed.state.log_history[-2]["chosen_drop"] == logs[-1]["chosen_drop"]


# --- beta -------------------------------------------------------------------------------------------------------------


def test_beta_moves_once_an_optimizer_step_by_the_mean_of_all_its_pairs(tmp_path: Path) -> None:
    """20 pairs in micro-batches of 4, two a step: 8, 8 and 4 pairs."""
    trainer = make(tmp_path, data=pairs(20), num_train_epochs=1)
    trainer.train()
    groups = [trainer.steps[0:2], trainer.steps[2:4], trainer.steps[4:]]
    assert trainer.used == [trainer.used[i] for i in (0, 0, 2, 2, 4)]
    beta, wanted = 0.1, []
    for group in groups:
        s = [one for micro in group for one in micro]
        beta = beta / (1 + 0.1 * sum(s) / len(s))
        wanted.append(beta)
    assert trainer.betas == pytest.approx(wanted, rel=1e-9)
    assert len(set(wanted)) > 1
    logged = trainer.state.log_history[:3]
    assert [log["beta"] for log in logged] == pytest.approx(wanted, rel=1e-9)
    assert [log["epsilon/up"] for log in logged] == [np.mean(np.concatenate(group) == 1) for group in groups]


def test_a_skipped_optimizer_step_leaves_beta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(tmp_path, num_train_epochs=1)
    monkeypatch.setattr(
        Accelerator, "optimizer_step_was_skipped", property(lambda self: trainer.state.global_step == 0)
    )
    trainer.train()
    assert trainer.betas[0] == 0.1
    s = [*trainer.steps[2], *trainer.steps[3]]
    assert trainer.betas[1] == pytest.approx(0.1 / (1 + 0.1 * sum(s) / len(s)))


def test_evaluation_touches_neither_steps_nor_beta(tmp_path: Path) -> None:
    plain = make(tmp_path)
    plain.train()
    evaluated = Recording(
        model(), model(7), args=config(tmp_path, eval_strategy="steps", eval_steps=1), train_dataset=pairs(),
        eval_dataset=pairs(6, seed=1), processing_class=tokenizer(),
    )  # fmt: skip
    before = evaluated.evaluate()
    assert evaluated.beta == 0.1 and before["eval_loss"] > 0 and "eval_epsilon/up" in before
    evaluated.train()
    assert evaluated.betas == plain.betas


def test_beta_stays_within_its_limits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    free = make(tmp_path)
    free.train()
    limit = (min(free.betas) + 0.1) / 2
    with caplog.at_level(logging.WARNING, logger="selfplay.training.epsilon_dpo"):
        limited = make(tmp_path, beta_min=limit, beta_max=0.1)
        limited.train()
    assert all(limit <= beta <= 0.1 for beta in limited.betas)
    assert any(log["beta_at_limit"] == 1 for log in limited.state.log_history[:-1])
    assert "held at" in caplog.text


def test_a_resumed_run_ends_with_the_same_bytes_and_beta(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole", save_strategy="steps", save_steps=1)
    whole.train()
    saved = [json.loads((tmp_path / f"whole/checkpoint-{i}" / STATE_FILE).read_text())["beta"] for i in (1, 2, 3, 4)]
    assert saved == whole.betas and len(set(saved)) > 1
    for i in (1, 2, 3):  # within an epoch and at its end
        resumed = make(tmp_path / "again")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{i}"))
        assert resumed.beta == whole.beta
        assert all(torch.equal(weights_of(whole)[name], tensor) for name, tensor in weights_of(resumed).items())
    last = make(tmp_path / "whole")
    last.train(resume_from_checkpoint=True)
    assert last.beta == whole.beta and last.losses == []


def test_a_checkpoint_without_beta_is_refused(tmp_path: Path) -> None:
    trainer = make(tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
    trainer.train()
    (tmp_path / "checkpoint-1" / STATE_FILE).unlink()
    with pytest.raises(ValueError, match="not whole"):
        make(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="no checkpoint"):
        make(tmp_path / "empty").train(resume_from_checkpoint=True)


# --- adapters ---------------------------------------------------------------------------------------------------------

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=True)


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


# --- refusals ---------------------------------------------------------------------------------------------------------


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
