import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from epsilon_dpo_world import LORA, WORDS, PlainRecording, Recording, config, make, model, pairs, tokenizer, weights_of
from largest import Largest
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from trl import DPOConfig, DPOTrainer

from selfplay.methods import epsilon_dpo
from selfplay.methods.tiles import Tile

pytestmark = pytest.mark.service

GOLDEN = Path(__file__).parents[1] / "golden"


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


@pytest.mark.parametrize(("count", "rates"), [(8, [1.0]), (16, [0.0, 1.0])])
def test_a_warm_up_leaves_a_step_at_the_full_rate(tmp_path: Path, count: int, rates: list[float]) -> None:
    """Steps of 8 pairs: a warm-up begins at 0, so the only step has none."""
    trainer = make(
        tmp_path, pairs(count), num_train_epochs=1, warmup_steps=0.1, lr_scheduler_type="constant_with_warmup"
    )
    trainer.train()
    assert [log["learning_rate"] for log in trainer.state.log_history[:-1]] == [rate * 1e-2 for rate in rates]


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
