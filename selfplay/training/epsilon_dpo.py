"""ε-DPO as a subclass of TRL's DPOTrainer; the only module that imports TRL.

`python -m selfplay.training.trainer` drives it for a round; alone it is used like any TRL trainer, with a dataset of token ids:

    args = EpsilonDPOConfig(output_dir, beta=0.1, epsilon=0.01)
    EpsilonDPOTrainer(model, ref_model, args=args, train_dataset=pairs, processing_class=tokenizer).train()

What changes against TRL 1.16: the loss (each pair has its own β; of both models' logits there is never more than a
tile), β itself (it moves after each optimizer step and is part of every checkpoint), the dataset (token ids, taken as
they are, never truncated), and the defaults that would hide something: bf16, gradient checkpointing, the length limit
and the filter of NaN losses are off, dropout is always off.
"""

import logging
import math
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from selfplay.errors import TrainError
from selfplay.methods import head
from selfplay.methods.epsilon_dpo import (
    chosen_drop,
    epsilon_steps,
    next_beta,
    pair_betas,
    pair_losses,
)
from selfplay.models import adapters
from selfplay.training import saves, sharding, step_sums
from selfplay.training.batches import pair_difference, pair_weights
from selfplay.training.data import check_pairs, largest_id
from selfplay.training.passes import Passes, bare
from selfplay.training.refusals import check_limits, refuse
from selfplay.training.step_sums import SUMS

logger = logging.getLogger(__name__)

STATE_FILE = saves.STATE  # written last: a checkpoint without it is not whole
DROP_STEPS = 10  # optimizer steps over which `chosen_drop` averages


@dataclass
class EpsilonDPOConfig(DPOConfig):
    """TRL's DPOConfig, plus ε and the limits of β, minus the defaults that hide something."""

    epsilon: float = field(default=0.01, metadata={"help": "Perturbation ε in [0, 1); 0 is plain DPO."})
    beta_min: float | None = field(default=None, metadata={"help": "β never falls below this."})
    beta_max: float | None = field(default=None, metadata={"help": "β never rises above this."})
    nll_weight: float = field(default=0.0, metadata={"help": "Weight of the chosen responses' NLL a token (RPO)."})
    bf16: bool | None = field(default=False, metadata={"help": "bf16 mixed precision; TRL's default is on."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute activations; TRL's is on."})
    max_length: int | None = field(
        default=None, metadata={"help": "Refuse pairs whose prompt and response are longer (tokens); nothing is cut."}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Must stay off: it would hide NaN losses."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_limits(self)

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """At most all steps but one. A warm-up begins at a learning rate of 0, at which the only step would change nothing."""
        steps: int = super().get_warmup_steps(num_training_steps)
        return min(steps, num_training_steps - 1)


class EpsilonDPOTrainer(Passes, DPOTrainer):
    """DPOTrainer with the ε-DPO loss and schedule of β.

    `beta` is the current β. It changes after each optimizer step that was not skipped, by the mean step over all
    pairs of all micro-batches and processes, before a checkpoint of that step is written, and `train` restores it from
    the checkpoint it resumes. Raises ValueError for settings that ε-DPO does not define (`refuse`), for data that it
    cannot take as it is (`check_pairs`) and for models whose logits are not a linear layer over their last hidden
    states (`head`), TrainError («input») when the first batch shows that a model does more to its logits than scale and
    soft-cap them, and («nonfinite») when a loss or the gradient norm is not finite. There is no fall-back to whole
    logits: they would fail later, and less clearly, for want of memory.

    Logged, as means over the steps since the last log: `beta` (after the update), `epsilon/up`, `zero` and `down`
    (shares of s = +1, 0, −1), `beta_at_limit` (1 where β met a limit), `logps/*` (nats a response), `logratios/*` (the
    same less the reference's), `rewards/*` (with the step's β, not β_i), `nll/chosen` (nats a token), `chosen_drop`
    (nats a response by which both chosen and rejected fell, over the last steps: see there), and `kl/pair_tokens`:
    r·log r − r + 1 summed over the pairs' own tokens, r = π_θ/π_ref, in nats a response. That estimates KL(policy ‖
    reference) as if these tokens were samples of the reference; they are a selection of such samples, so read it as an
    alarm, not as the KL of fresh text.
    """

    beta: float
    _name = "EpsilonDPO"

    def __init__(
        self, model: Any, ref_model: Any = None, args: EpsilonDPOConfig | None = None, data_collator: Any = None,
        train_dataset: Any = None, *rest: Any, **kwargs: Any,
    ) -> None:  # fmt: skip
        if args is None:
            raise ValueError("args is required: EpsilonDPOConfig(output_dir, …)")
        if not isinstance(args, EpsilonDPOConfig):
            raise ValueError("args must be an EpsilonDPOConfig")
        refuse(args)
        check_pairs(train_dataset, args.max_length)
        if kwargs.get("compute_metrics") is not None:
            raise ValueError("compute_metrics is not supported: whole logits are never kept")
        self._sums = torch.zeros(len(SUMS))
        self._step_sums: dict[str, float] = {}
        self._step_pairs = 0  # of the running optimizer step, in all processes
        self.tokens: Any = 0  # trained on by this process, prompts included
        self._logratios: deque[list[float]] = deque(maxlen=DROP_STEPS)
        self.ref_model = ref_model  # where it is sharded, that comes before TRL has set it
        super().__init__(model, ref_model, args, data_collator, train_dataset, *rest, **kwargs)
        if self.accelerator.is_fsdp2 and self.ref_model is not ref_model:
            raise ValueError("under FSDP2 the reference must be given as a model: pass ref_model")
        words = self.model.get_input_embeddings().num_embeddings
        if (largest := largest_id(self.train_dataset)) >= words:
            raise ValueError(f"token id {largest} is not among the model's {words}: another tokenizer's pairs?")
        self._make_lean()
        # Before the callbacks that save and log, which run on later events of the same step.
        self.add_callback(_BetaUpdate(self))

    def create_accelerator_and_postprocess(self) -> None:
        """The accelerator; under FSDP2 with the reference sharded by it, before TRL would do so in its own way."""
        super().create_accelerator_and_postprocess()
        if self.accelerator.is_fsdp2:
            sharding.prepare(self.accelerator, self.ref_model)

    # --- data -------------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: DPOConfig, dataset_name: str) -> Dataset:
        """Token ids as they are. TRL's own preparation adds EOS, tokenises text, and drops what is too long."""
        check_pairs(dataset, args.max_length)
        return dataset

    # --- loss -------------------------------------------------------------------------------------------------------

    def _make_lean(self) -> None:
        """Let policy and reference be read before their heads; refuse what would break that."""
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ValueError("FSDP 1 flattens the output head away: set fsdp_version: 2 in the accelerate config")
        if self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise ValueError("DeepSpeed ZeRO-3 hides the output head: shard with FSDP2 instead, or use ZeRO-2")
        if isinstance(self.model, PeftModel) and self.model.active_peft_config.is_prompt_learning:
            raise ValueError("prompt learning adds tokens of its own: use LoRA")
        if isinstance(self.model, PeftModel) and self.args.bf16 and not self.accelerator.is_fsdp2:
            adapters.leave_dtypes(self.model)
        self._unchecked = [self.model]
        head.make_lean(bare(self.model))
        if self.ref_model is not None:
            self._unchecked.append(self.ref_model)
            head.make_lean(bare(self.accelerator.unwrap_model(self.ref_model)))

    def get_batch_samples(self, *args: Any) -> Any:
        """The micro-batches of the next optimizer step, with the weight of each pair; its pairs are counted.

        At the end of an epoch accelerate gives every process a whole micro-batch, filled up with pairs from the start of
        the epoch. Those weigh 0.
        """
        batches, items = super().get_batch_samples(*args)
        size, accelerator = self.args.per_device_train_batch_size, self.accelerator
        pairs = [size * accelerator.num_processes] * len(batches)
        if batches and accelerator.gradient_state.end_of_dataloader:
            pairs[-1] = (len(self.train_dataset) - 1) % pairs[-1] + 1
        self._step_pairs = sum(pairs)
        for batch, count in zip(batches, pairs, strict=True):
            batch["weights"] = pair_weights(batch, count - size * accelerator.process_index)
        return batches, items

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Loss of one micro-batch. In training weighted so that a step's loss is the mean over its pairs.

        What calls this divides by the number of micro-batches, and gradients are the mean over the processes; the last
        micro-batch of an epoch may have fewer pairs than the others.
        """
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.tokens += inputs["attention_mask"].sum()
        if self.model.training and self._step_pairs:
            rows = len(inputs["weights"]) * self.accelerator.num_processes
            loss = loss * (rows * self.current_gradient_accumulation_steps / self._step_pairs)
        return loss

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False) -> Tensor:
        """ε-DPO loss of one micro-batch: the mean over its pairs. Rows of `inputs` are [chosen; rejected].

        With `weights` (B,) among the inputs, the mean of the weighted losses.
        """
        assert not return_outputs, "only compute_metrics asks for outputs, and that is refused"
        (summed, ratio, plus, minus, kl), aux_loss = self._responses(model, inputs)
        q_plus, q_minus = pair_difference(plus), pair_difference(minus)  # less q
        steps = epsilon_steps(torch.zeros_like(q_plus), q_plus, q_minus)
        betas = pair_betas(self.beta, steps, self.args.epsilon)
        losses = pair_losses(pair_difference(ratio), betas, self.args.label_smoothing)
        nll = -(summed / inputs["completion_mask"].sum(dim=1)).chunk(2)[0]
        if self.args.nll_weight > 0:
            losses = losses + self.args.nll_weight * nll

        weights = inputs["weights"] if "weights" in inputs else torch.ones_like(nll)
        self._count(steps, weights, losses.detach(), summed.detach(), ratio.detach(), nll.detach(), kl)
        loss = (weights * losses).mean()
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * weights.mean() * aux_loss
        return loss

    def _check_head(self, model: Any, unwrapped: Any, inputs: Mapping[str, Tensor]) -> None:
        """Before a model is used for the first time: is the head that we compute its own? A collective call."""
        if not any(one is unwrapped for one in self._unchecked):
            return
        with self._as_it_is():
            if not head.agrees(model, inputs["input_ids"][:1, :8]):
                raise TrainError(
                    "input", f"{type(bare(unwrapped)).__name__} does more to its logits than its config says: ε-DPO "
                    "projects hidden states itself (weight, bias, scale, soft-capping) and would train another model",
                    "take another architecture, or teach selfplay/methods/head.py this one",
                )  # fmt: skip
        self._unchecked = [one for one in self._unchecked if one is not unwrapped]

    @contextmanager
    def _as_reference(self) -> Iterator[Any]:
        """The reference to call: its own model, or the model under the adapter (its «ref» copy, where TRL made one)."""
        model, adapter = self.ref_model, nullcontext()
        if model is None:
            assert isinstance(self.model, PeftModel), "TRL keeps a reference model for everything but adapters"
            unwrapped, model = self.accelerator.unwrap_model(self.model), self.model
            adapter = use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None)
        with torch.no_grad(), self._as_it_is(), adapter, self._autocast():
            yield model

    def _as_it_is(self) -> Any:
        """While activations are not recomputed."""
        return disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)

    def _autocast(self) -> Any:
        """What the policy runs in, for what is computed beside it. FSDP2's units cast weights and inputs themselves."""
        return nullcontext() if self.accelerator.is_fsdp2 else self.accelerator.autocast()

    # --- what a step adds up ----------------------------------------------------------------------------------------

    def _count(self, steps: Tensor, weights: Tensor, *rest: Tensor) -> None:
        """Add one micro-batch to the sums of the running optimizer step; in evaluation, log it and leave them alone."""
        sums = step_sums.of_micro_batch(self.beta, weights, steps, *rest)
        if self.model.training:
            self._sums = self._sums.to(sums.device) + sums
        else:
            self._log_means("eval", self._gathered(sums))

    def _gathered(self, sums: Tensor) -> dict[str, float]:
        total = self.accelerator.reduce(sums, reduction="sum") if self.accelerator.num_processes > 1 else sums
        return dict(zip(SUMS, total.tolist(), strict=True))

    def _log_means(self, mode: str, sums: dict[str, float]) -> None:
        for name, value in step_sums.means(sums, self.beta).items():
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
        self._logratios.append(
            [self._step_sums[f"logratios/{one}"] / self._step_sums["pairs"] for one in ("chosen", "rejected")]
        )
        self._metrics["train"]["chosen_drop"].append(chosen_drop(self._logratios))

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card: TRL would write one with each checkpoint."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            state = {"beta": self.beta, "epsilon": self.args.epsilon, "step": self.state.global_step,
                     "logratios": list(self._logratios)}  # fmt: skip
            saves.finish(folder, state)

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
            state = saves.state(Path(str(checkpoint)))
            self.beta = float(state["beta"])
            self._logratios.extend(state["logratios"])
        return super().train(resume_from_checkpoint=checkpoint, **kwargs)


class _BetaUpdate(TrainerCallback):
    """Tells the trainer that the optimizer was stepped: the one moment between the step and its checkpoint."""

    def __init__(self, trainer: EpsilonDPOTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.step_taken()
