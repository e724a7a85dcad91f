"""ε-DPO as a subclass of TRL's DPOTrainer; the only module that imports TRL.

`python -m selfplay.trainer` drives it for a round; alone it is used like any TRL trainer, with a dataset of token ids:

    args = EpsilonDPOConfig(output_dir, beta=0.1, epsilon=0.01)
    EpsilonDPOTrainer(model, ref_model, args=args, train_dataset=pairs, processing_class=tokenizer).train()

What changes against TRL 1.16: the loss (each pair has its own β), β itself (it moves after each optimizer step and is
part of every checkpoint), the dataset (token ids, taken as they are, never truncated), and the defaults that would hide
something: bf16, gradient checkpointing, the length limit and the filter of NaN losses are off, dropout is always off.
"""

import logging
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from selfplay import artifacts
from selfplay.epsilon_dpo import chosen_logps, epsilon_steps, next_beta, pair_betas, pair_losses, perturbed_logps
from selfplay.errors import TrainError

logger = logging.getLogger(__name__)

COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
STATE_FILE = "epsilon_dpo.json"  # β of a checkpoint; written last: a checkpoint without it is not whole

# What one optimizer step adds up over its pairs, by name; the order is that of the tensor that processes exchange.
SUMS = ("pairs", "up", "down", "loss", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected",
        "rewards/accuracies", "kl/pair_tokens")  # fmt: skip


@dataclass
class EpsilonDPOConfig(DPOConfig):
    """TRL's DPOConfig, plus ε and the limits of β, minus the defaults that hide something."""

    epsilon: float = field(default=0.01, metadata={"help": "Perturbation ε in [0, 1); 0 is plain DPO."})
    beta_min: float | None = field(default=None, metadata={"help": "β never falls below this."})
    beta_max: float | None = field(default=None, metadata={"help": "β never rises above this."})
    bf16: bool | None = field(default=False, metadata={"help": "bf16 mixed precision; TRL's default is on."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute activations; TRL's is on."})
    max_length: int | None = field(
        default=None, metadata={"help": "Refuse pairs whose prompt and response are longer (tokens); nothing is cut."}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Must stay off: it would hide NaN losses."})

    def __post_init__(self) -> None:
        super().__post_init__()
        low = 0.0 if self.beta_min is None else self.beta_min
        high = math.inf if self.beta_max is None else self.beta_max
        if not 0 <= self.epsilon < 1:
            raise ValueError(f"epsilon must lie in [0, 1), got {self.epsilon}: set 0.01, or 0 for plain DPO")
        if not (self.beta > 0 and low <= self.beta <= high):
            raise ValueError(f"beta must be positive and in [beta_min, beta_max] = [{low}, {high}], got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must lie in [0, 0.5), got {self.label_smoothing}: 0.5 learns nothing")


def refuse(args: DPOConfig) -> None:
    """Raise ValueError for what TRL would take silently and ε-DPO does not do."""
    wrong = [
        (not isinstance(args, EpsilonDPOConfig), "args must be an EpsilonDPOConfig"),
        (len(args.loss_type) != 1, "several losses at once are not supported: set loss_type='sigmoid'"),
        (args.loss_type[0] != "sigmoid", f"loss_type {args.loss_type[0]!r} has no instance β: set loss_type='sigmoid'"),
        (args.loss_weights not in (None, [1.0]), "loss_weights is not supported: leave it None, scale learning_rate"),
        (args.f_divergence_type != "reverse_kl", "f-divergences are not supported: set f_divergence_type='reverse_kl'"),
        (args.ld_alpha is not None, "ld_alpha re-weights tokens, which ε-DPO does not define: set ld_alpha=None"),
        (args.use_weighting, "WPO weighting is not supported: set use_weighting=False"),
        (args.sync_ref_model, "the reference must stay fixed while β moves: set sync_ref_model=False"),
        (args.precompute_ref_log_probs, "the reference's logits are needed: set precompute_ref_log_probs=False"),
        (args.use_liger_kernel, "Liger kernels replace the forward that gives the logits: set use_liger_kernel=False"),
        (args.padding_free, "padding_free is not supported: set padding_free=False"),
        (not args.disable_dropout, "with dropout the steps would be noise: set disable_dropout=True"),
        (args.logging_nan_inf_filter, "NaN losses must not be hidden: set logging_nan_inf_filter=False"),
    ]
    for is_wrong, what in wrong:
        if is_wrong:
            raise ValueError(what)


def check_pairs(dataset: Any, max_length: int | None = None) -> None:
    """Raise ValueError unless `dataset` is a non-empty Dataset of token ids, none longer than `max_length`."""
    if not isinstance(dataset, Dataset):
        raise ValueError(f"the dataset must be a datasets.Dataset of known lengths, got {type(dataset).__name__}")
    missing = [name for name in COLUMNS if name not in dataset.column_names]
    if missing:
        raise ValueError(f"the dataset lacks {', '.join(missing)}: it must hold token ids, not text")
    if len(dataset) == 0:
        raise ValueError("the dataset has no pairs: there is nothing to train on")
    table: pa.Table = dataset.select_columns(list(COLUMNS)).with_format("arrow")[:]
    lengths = {name: pc.list_value_length(table[name]).combine_chunks().fill_null(0) for name in COLUMNS}
    for name, n in lengths.items():
        if (shortest := pc.min(n).as_py()) == 0:
            raise ValueError(f"row {pc.index(n, shortest).as_py()} has no {name}: drop the pair")
    if max_length is not None:
        for name in COLUMNS[1:]:
            total = pc.add(lengths["prompt_ids"], lengths[name])
            if (longest := pc.max(total).as_py()) > max_length:
                raise ValueError(
                    f"row {pc.index(total, longest).as_py()}: prompt_ids and {name} have {longest} tokens, more than "
                    f"max_length {max_length}; raise it or drop the pair: training never truncates"
                )


def largest_id(dataset: Dataset) -> int:
    """The largest token id in a checked dataset."""
    table: pa.Table = dataset.select_columns(list(COLUMNS)).with_format("arrow")[:]
    return max(int(pc.max(pc.list_flatten(table[name])).as_py()) for name in COLUMNS)


class EpsilonDPOTrainer(DPOTrainer):
    """DPOTrainer with the ε-DPO loss and schedule of β.

    `beta` is the current β. It changes after each optimizer step that was not skipped, by the mean step over all
    pairs of all micro-batches and processes, before a checkpoint of that step is written, and `train` restores it from
    the checkpoint it resumes. Raises ValueError for settings that ε-DPO does not define (`refuse`) and for data that it
    cannot take as it is (`check_pairs`), TrainError («nonfinite») when a loss or the gradient norm is not finite.

    Logged, as means over the steps since the last log: `beta` (after the update), `epsilon/up`, `zero` and `down`
    (shares of s = +1, 0, −1), `beta_at_limit` (1 where β met a limit), `logps/*` (nats a response), `rewards/*` (with
    the step's β, not β_i), and `kl/pair_tokens`: r·log r − r + 1 summed over the pairs' own tokens, r = π_θ/π_ref, in
    nats a response. That estimates KL(policy ‖ reference) as if these tokens were samples of the reference; they are a
    selection of such samples, so read it as an alarm, not as the KL of fresh text.
    """

    beta: float
    _name = "EpsilonDPO"

    def __init__(
        self, model: Any, ref_model: Any = None, args: EpsilonDPOConfig | None = None, data_collator: Any = None,
        train_dataset: Any = None, *rest: Any, **kwargs: Any,
    ) -> None:  # fmt: skip
        if args is None:
            raise ValueError("args is required: EpsilonDPOConfig(output_dir, …)")
        refuse(args)
        check_pairs(train_dataset, args.max_length)
        if kwargs.get("compute_metrics") is not None:
            raise ValueError("compute_metrics is not supported: whole logits are never kept")
        self._sums = torch.zeros(len(SUMS))
        self._step_sums: dict[str, float] = {}
        super().__init__(model, ref_model, args, data_collator, train_dataset, *rest, **kwargs)
        words = self.model.get_input_embeddings().num_embeddings
        if (largest := largest_id(self.train_dataset)) >= words:
            raise ValueError(f"token id {largest} is not among the model's {words}: another tokenizer's pairs?")
        # Before the callbacks that save and log, which run on later events of the same step.
        self.add_callback(_BetaUpdate(self))

    # --- data -------------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: DPOConfig, dataset_name: str) -> Dataset:
        """Token ids as they are. TRL's own preparation adds EOS, tokenises text, and drops what is too long."""
        check_pairs(dataset, args.max_length)
        return dataset

    # --- loss -------------------------------------------------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False) -> Tensor:
        """ε-DPO loss of one micro-batch: the mean over its pairs. Rows of `inputs` are [chosen; rejected]."""
        assert not return_outputs, "only compute_metrics asks for outputs, and that is refused"
        mask, targets = self._response(inputs)
        outputs = self._forward(model, inputs, mask, router_logits=self.aux_loss_enabled)
        logits = outputs.logits[:, :-1][mask]
        with torch.no_grad():
            ref_logits = self._reference_logits(inputs, mask)
            ref_logp = chosen_logps(ref_logits, targets)
        logp = chosen_logps(logits, targets)

        ratio = _per_response(logp - ref_logp, mask)
        margins = _pair_difference(ratio)
        steps = torch.zeros_like(margins, dtype=torch.long)
        if self.args.epsilon > 0:
            logp_plus, logp_minus = perturbed_logps(logits.detach(), ref_logits, targets, self.args.epsilon)
            plus = _pair_difference(_per_response(logp_plus - logp.detach(), mask))
            minus = _pair_difference(_per_response(logp_minus - logp.detach(), mask))
            steps = epsilon_steps(torch.zeros_like(plus), plus, minus)
        betas = pair_betas(self.beta, steps, self.args.epsilon)
        losses = pair_losses(margins, betas, self.args.label_smoothing)

        log_r = (logp - ref_logp).detach().clamp(max=20.0)
        kl = _per_response(log_r.exp() * (log_r - 1) + 1, mask)
        self._count(steps, losses.detach(), _per_response(logp.detach(), mask), ratio.detach(), kl)
        loss = losses.mean()
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
        return loss

    def _response(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mask (2B, R) over the window of positions that hold response tokens in any row, and those N tokens, (N,).

        Prompt positions before that window get no logits at all.
        """
        mask = inputs["completion_mask"][:, 1:].bool()
        first = int(mask.any(dim=0).int().argmax())
        mask = mask[:, first:]
        return mask, inputs["input_ids"][:, first + 1 :][mask]

    def _forward(self, model: Any, inputs: Mapping[str, Tensor], mask: Tensor, router_logits: bool = False) -> Any:
        kwargs = {"output_router_logits": True} if router_logits else {}
        # One position more than the window: the last one predicts the token after the sequence.
        return model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False,
            logits_to_keep=mask.size(1) + 1, **kwargs,
        )  # fmt: skip

    def _reference_logits(self, inputs: Mapping[str, Tensor], mask: Tensor) -> Tensor:
        """Reference logits of the N response tokens, (N, V), without gradient: of the reference model, or of the model
        under the adapter (its «ref» copy, where TRL made one)."""
        model, adapter = self.ref_model, nullcontext()
        if model is None:
            assert is_peft_model(self.model), "TRL keeps a reference model for everything but adapters"
            bare, model = self.accelerator.unwrap_model(self.model), self.model
            adapter = use_adapter(bare, adapter_name="ref" if "ref" in bare.peft_config else None)
        plain = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), plain, adapter:
            return self._forward(model, inputs, mask).logits[:, :-1][mask]

    def reference_logps(self) -> tuple[Tensor, Tensor]:
        """Reference log-probabilities (nats, summed) of the training pairs in their order: chosen (n,), rejected (n,).

        A collective call: every process gets all of them.
        """
        parts: list[Tensor] = []
        for batch in self.get_eval_dataloader(self.train_dataset):
            batch = self._prepare_inputs(batch)
            mask, targets = self._response(batch)
            with torch.no_grad():
                logps = _per_response(chosen_logps(self._reference_logits(batch, mask), targets), mask)
            parts.append(self.accelerator.gather_for_metrics(torch.stack(logps.chunk(2), dim=1)).cpu())
        logps = torch.cat(parts)
        return logps[:, 0], logps[:, 1]

    # --- what a step adds up ----------------------------------------------------------------------------------------

    def _count(self, steps: Tensor, losses: Tensor, logp: Tensor, ratio: Tensor, kl: Tensor) -> None:
        """Add one micro-batch to the sums of the running optimizer step; in evaluation, log it and leave them alone."""
        chosen, rejected = (self.beta * ratio).chunk(2)
        values = {
            "pairs": torch.ones_like(losses), "up": (steps > 0).float(), "down": (steps < 0).float(), "loss": losses,
            "logps/chosen": logp.chunk(2)[0], "logps/rejected": logp.chunk(2)[1],
            "rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/accuracies": (chosen > rejected).float(),
            "kl/pair_tokens": kl.view(2, -1).mean(0),
        }  # fmt: skip
        sums = torch.stack([values[name].sum() for name in SUMS])
        if self.model.training:
            self._sums = self._sums.to(sums.device) + sums
        else:
            self._log_means("eval", self._gathered(sums))

    def _gathered(self, sums: Tensor) -> dict[str, float]:
        total = self.accelerator.reduce(sums, reduction="sum") if self.accelerator.num_processes > 1 else sums
        return dict(zip(SUMS, total.tolist(), strict=True))

    def _log_means(self, mode: str, sums: dict[str, float]) -> None:
        n = sums["pairs"]
        metrics = {name: sums[name] / n for name in SUMS if "/" in name}
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        metrics |= {"epsilon/up": sums["up"] / n, "epsilon/down": sums["down"] / n}
        metrics["epsilon/zero"] = 1 - metrics["epsilon/up"] - metrics["epsilon/down"]
        metrics["beta"] = self.beta
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Before each optimizer step, on every process alike: add up the step, stop if anything in it is not finite."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(grad_norm, DTensor):  # FSDP2 gives each process its share of it
            grad_norm = grad_norm.full_tensor()
        self._step_sums = self._gathered(self._sums)
        self._sums = torch.zeros_like(self._sums)
        # With fp16 a non-finite norm is the loss scaler's business: it skips the step.
        norm = 0.0 if self.accelerator.scaler is not None else float(grad_norm)
        if not (math.isfinite(norm) and math.isfinite(self._step_sums["loss"])):
            raise TrainError(
                "nonfinite",
                f"step {self.state.global_step + 1}: the mean loss is "
                f"{self._step_sums['loss'] / self._step_sums['pairs']:g} and the gradient norm {norm:g}; no weight was "
                "changed by this step",
                "lower the learning rate or max_grad_norm, and look for non-finite weights in the policy and reference",
            )
        return grad_norm

    def step_taken(self) -> None:
        """After `optimizer.step()`: move β by the mean step of its pairs, unless the optimizer skipped the step."""
        limited = False
        if not self.accelerator.optimizer_step_was_skipped:
            sums = self._step_sums
            wanted = next_beta(self.beta, (sums["up"] - sums["down"]) / sums["pairs"], self.args.epsilon)
            low = -math.inf if self.args.beta_min is None else self.args.beta_min
            high = math.inf if self.args.beta_max is None else self.args.beta_max
            self.beta = min(max(wanted, low), high)
            limited = self.beta != wanted
            if limited:
                logger.warning("step %d: beta %.6g held at %.6g", self.state.global_step + 1, wanted, self.beta)
        self._log_means("train", self._step_sums)
        self._metrics["train"]["beta_at_limit"].append(float(limited))

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card: TRL would write one with each checkpoint."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            state = {"beta": self.beta, "epsilon": self.args.epsilon, "step": self.state.global_step}
            artifacts.sync_tree(folder)
            artifacts.write_json(folder / STATE_FILE, state)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """TRL's `train`; a checkpoint to resume from also gives β. Raises ValueError where it has none."""
        checkpoint = resume_from_checkpoint or None
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
            if checkpoint is None:
                raise ValueError(f"no checkpoint to resume from in {self.args.output_dir}")
        if checkpoint is not None:
            file = Path(str(checkpoint)) / STATE_FILE
            if not file.is_file():
                raise ValueError(f"{file} is missing: the checkpoint is not whole; resume from an earlier one")
            self.beta = float(artifacts.read_json(file)["beta"])
        return super().train(resume_from_checkpoint=checkpoint, **kwargs)


class _BetaUpdate(TrainerCallback):
    """Tells the trainer that the optimizer was stepped: the one moment between the step and its checkpoint."""

    def __init__(self, trainer: EpsilonDPOTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.step_taken()


def _per_response(values: Tensor, mask: Tensor) -> Tensor:
    """Sum per-token values (N,), given in the order of `mask` (2B, R), over each response: (2B,)."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values).sum(dim=1)


def _pair_difference(values: Tensor) -> Tensor:
    """Chosen minus rejected, (B,), of values in rows [chosen; rejected], (2B,)."""
    chosen, rejected = values.chunk(2)
    return chosen - rejected
