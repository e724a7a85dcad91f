"""What the trainer child does for an order: load, check agreement, train, export, canaries, size of the update."""

import copy
import hashlib
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from datasets.table import InMemoryTable
from peft import LoraConfig
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from selfplay.errors import DamagedError, TrainError
from selfplay.models import weights
from selfplay.models.kept import Kept
from selfplay.storage import folders, seals, tables
from selfplay.training import exporting, saves, sharding
from selfplay.training.data import COLUMNS, check_pairs
from selfplay.training.epsilon_dpo import EpsilonDPOConfig, EpsilonDPOTrainer
from selfplay.training.jobs import STOP, CanaryJob, LoraJob, TrainJob
from selfplay.training.pace import Report, Reporter, flat

logger = logging.getLogger(__name__)
AGREEMENT = "agreement.json"  # beside the saves: what the check has found
transformers_logging.disable_progress_bar()


def train(job: TrainJob, report: Report, kept: Kept | None = None) -> dict[str, Any] | None:
    """Do a job; every process of a distributed run calls it, and rank 0 gets the result. Raises TrainError.

    kept: where the process keeps models from order to order. The policy and the reference of this job stay there, and what
    was trained joins them: one of the first two and the last are what the next round starts from.

    The result: `history` (metrics of each optimizer step), `steps`, `beta` (the last), `agreement` {mean, p99, tokens}
    or None, `update` {share_changed, relative_norm}, `canaries` (nats each) and `seconds` {load, train, export}, with
    the agreement check in `train`.
    """
    clock, kept = _Clock(), kept or Kept(keeps=False)
    kept.only([weights.masters(job.policy), weights.masters(job.reference)])
    try:
        trainer = _build(job, report, kept)
    except ValueError as error:  # a setting or data that cannot be trained on; later on it would be a bug
        raise TrainError("input", str(error), "change the setting or the data that the message names") from error
    checkpoint = _resume_point(job, trainer)
    if checkpoint is not None:
        logger.info("going on from %s", checkpoint)
    clock.lap("load")
    check = _AgreementCheck(job, trainer, report)
    trainer.add_callback(check)
    trainer.add_callback(_StopOnRequest(job.work / STOP, trainer))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    clock.lap("train")
    if trainer.state.global_step < trainer.state.max_steps:
        return {"stopped": trainer.state.global_step, "repairs": seals.repairs()}

    beta, steps = trainer.beta, trainer.state.global_step
    history = [flat(logs) | {"step": logs["step"]} for logs in trainer.state.log_history if "loss" in logs]
    model, device, found = trainer.accelerator.unwrap_model(trainer.model), trainer.args.device, check.found
    sharded = trainer.is_fsdp_enabled
    del trainer, check
    made = exporting.sharded(job, model, device) if sharded else exporting.whole(job, model, device, kept)
    if made is None:
        return None
    clock.lap("export")
    return {
        "history": history, "steps": steps, "beta": beta, "agreement": found, **made, "seconds": clock.laps,
        "repairs": seals.repairs(),
    }  # fmt: skip


def canaries(job: CanaryJob) -> dict[str, Any]:
    """`canaries`: the summed log-probability (nats) of each sequence."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = weights.load(job.policy, getattr(torch, job.dtype), job.trust_remote_code).to(device).eval()
    return {"canaries": weights.sequence_logps(model, job.canary_ids)}


def _build(job: TrainJob, report: Report, kept: Kept) -> EpsilonDPOTrainer:
    """Data, models, tokenizer and the trainer over them."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if job.processes not in (None, world):
        raise TrainError("input", f"train.accelerate asks for {job.processes} processes, and the launcher started {world}",
                         "see what accelerate launch makes of the file")  # fmt: skip
    accumulation, rest = divmod(job.batch_pairs, job.micro_batch_pairs * world)
    if rest or not accumulation:
        raise TrainError("input", f"batch_pairs {job.batch_pairs} is not a multiple of micro_batch_pairs "
                         f"{job.micro_batch_pairs} × {world} processes", "change one of the two")  # fmt: skip
    args = EpsilonDPOConfig(
        output_dir=str(job.work), report_to="none", disable_tqdm=True, logging_steps=1,
        use_cpu=not torch.cuda.is_available(),  # unless it is told, accelerate runs CPU processes each for itself
        beta=job.beta, epsilon=job.epsilon, beta_min=job.beta_min, beta_max=job.beta_max,
        label_smoothing=job.label_smoothing, nll_weight=job.nll_weight, learning_rate=job.learning_rate, lr_scheduler_type=job.schedule,
        warmup_steps=job.warmup_ratio, max_grad_norm=job.max_grad_norm, weight_decay=job.weight_decay,
        num_train_epochs=job.epochs, per_device_train_batch_size=job.micro_batch_pairs,
        per_device_eval_batch_size=job.micro_batch_pairs, gradient_accumulation_steps=accumulation,
        max_length=job.max_length, bf16=job.bf16, gradient_checkpointing=job.gradient_checkpointing,
        save_strategy="steps" if job.save_steps else "no", save_steps=job.save_steps or 1, save_total_limit=2,
        seed=job.seed % 2**32, data_seed=job.seed % 2**32, trust_remote_code=job.trust_remote_code,
    )  # fmt: skip
    pairs = _read_pairs(job.pairs, job.replayed)
    check_pairs(pairs, job.max_length)
    policy = kept.own(weights.masters(job.policy), job.trust_remote_code)
    context = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and job.max_length > context:
        raise TrainError("input", f"max_length {job.max_length} exceeds the model's context of {context}", "lower it")
    reference: Any = None  # with an adapter: the model under it
    if job.reference.resolve() != job.policy.resolve():
        reference = kept.shared(weights.masters(job.reference), job.trust_remote_code)
    elif job.lora is None and sharding.is_sharded():  # read again it takes no memory before it is spread
        reference = kept.shared(weights.masters(job.policy), job.trust_remote_code)
    elif job.lora is None:
        reference = copy.deepcopy(policy)
    shares = world if sharding.is_sharded() else 1
    weights.require_memory(policy, reference, of_policy=4 if job.lora is None else 1, processes=shares)
    trainer = EpsilonDPOTrainer(
        policy, reference, args=args, train_dataset=pairs,
        processing_class=AutoTokenizer.from_pretrained(job.initial, trust_remote_code=job.trust_remote_code),
        peft_config=lora_config(job.lora),
    )  # fmt: skip
    assert trainer.accelerator.num_processes == world, "the processes do not know of each other"
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Reporter(report, trainer))
    return trainer


def lora_config(lora: LoraJob | None) -> Any:
    if lora is None:
        return None
    return LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=lora.target_modules,
                      task_type="CAUSAL_LM")  # fmt: skip


def _read_pairs(path: Path, replayed: Path | None = None) -> Any:
    """The pairs of a file as a Dataset in memory, those of `replayed` behind them. Raises TrainError («input»)."""
    if replayed is None:
        return Dataset(InMemoryTable(_read_table(path)))
    names = [*COLUMNS, "chosen_logp", "rejected_logp"]
    return Dataset(InMemoryTable(pa.concat_tables([_read_table(one).select(names) for one in (path, replayed)])))


def _read_table(path: Path) -> pa.Table:
    """A file of pairs. Raises TrainError (kind «input») for a file that is not one."""
    try:
        table = tables.read_whole(path)
    except (OSError, pa.ArrowInvalid, DamagedError) as error:
        raise TrainError("input", f"{path} is no Parquet file of pairs: {error}", "write it again") from error
    if missing := [name for name in ("chosen_logp", "rejected_logp") if name not in table.column_names]:
        raise TrainError("input", f"{path} lacks {', '.join(missing)}", "write the generator's log-probabilities too")
    return table


def agreement(ours: np.ndarray, theirs: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    """Mean and 99th percentile of |ours − theirs| / tokens over responses (n,): summed nats of each response under the
    trainer's reference and under the generator that sampled it."""
    off = np.abs(ours - theirs) / tokens
    return {"mean": float(off.mean()), "p99": float(np.quantile(off, 0.99)), "tokens": int(tokens.sum())}


def _resume_point(job: TrainJob, trainer: EpsilonDPOTrainer) -> Path | None:
    """The last whole checkpoint of this very job in `work`; what another job or a killed save left there is removed.

    The same job: same settings, pairs (by content), number of processes and models (by path: a policy never changes).
    """
    elsewhere = {
        "out",
        "replayed",
        "agreement_mean",
        "agreement_p99",
        "agreement_pairs",
        "processes",
        "min_update",
        "canary_ids",
        "serving_dtype",
    }
    settings = job.model_dump(mode="json", exclude=elsewhere)
    settings["world"] = trainer.accelerator.num_processes
    with job.pairs.open("rb") as file:
        settings["pairs"] = hashlib.file_digest(file, "sha256").hexdigest()
    if job.replayed is not None:
        with job.replayed.open("rb") as file:
            settings["replayed"] = hashlib.file_digest(file, "sha256").hexdigest()
    mark = job.work / "job.json"
    if trainer.accelerator.is_main_process:
        folders.make(job.work)
        (job.work / STOP).unlink(missing_ok=True)
        same = saves.remembered(mark) == settings
        if not same:
            (job.work / AGREEMENT).unlink(missing_ok=True)
            seals.write_json(mark, settings)
        saves.keep_whole(job.work, same)
    trainer.accelerator.wait_for_everyone()
    whole = sorted(job.work.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    return whole[-1] if whole else None


class _StopOnRequest(TrainerCallback):
    """Saves and ends the training after the step in which the file STOP appeared; every process of it alike."""

    def __init__(self, request: Path, trainer: EpsilonDPOTrainer) -> None:
        self._request, self._trainer = request, trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        accelerator = self._trainer.accelerator
        asked = self._request.exists()
        if accelerator.num_processes > 1:
            flag = torch.tensor(float(asked), device=accelerator.device)
            asked = bool(accelerator.reduce(flag, reduction="sum") > 0)
        if asked and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True


class _AgreementCheck(TrainerCallback):
    """Before the first optimizer step: do trainer and generator mean the same model and the same tokens?

    A seeded sample of the round's pairs is compared: it shows what is wrong as surely as all of them, which would cost a
    fifth of the training. A resumed job has passed already: its figures lie beside its checkpoints. Each batch is told as
    progress of step 0, since they can take longer than a trainer may be silent.
    """

    def __init__(self, job: TrainJob, trainer: EpsilonDPOTrainer, report: Report) -> None:
        self._job, self._trainer, self._report = job, trainer, report
        self.found: dict[str, float] | None = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        job, trainer, kept = self._job, self._trainer, self._job.work / AGREEMENT
        bounds = {"mean": job.agreement_mean, "p99": job.agreement_p99}
        if not any(bounds.values()):
            return
        found = saves.remembered(kept) or self._measured()
        logger.info("agreement with the generator: %s", found)
        for name, bound in bounds.items():
            if bound is not None and not found[name] <= bound:  # NaN must not pass
                raise TrainError(
                    "agreement",
                    f"the reference's log-probabilities differ from the generator's by {found['mean']:.3g} nats a "
                    f"token (99th percentile {found['p99']:.3g}, {found['tokens']} tokens); the bound on the {name} is "
                    f"{bound:g}",
                    "the pairs were not sampled from this reference, or the two run in other dtypes: generate again, "
                    "or calibrate the bound",
                )
        trainer.accelerator.wait_for_everyone()
        if trainer.accelerator.is_main_process:
            seals.write_json(kept, found)
        self.found = found

    def _measured(self) -> dict[str, float]:
        everything, own = self._trainer.train_dataset, tables.count_rows(self._job.pairs)
        count = min(self._job.agreement_pairs, own)
        rows = np.random.default_rng(self._job.seed % 2**63).choice(own, count, replace=False)
        sample = everything.select(np.sort(rows))
        batch, done = self._job.micro_batch_pairs * self._trainer.accelerator.num_processes, 0

        def tell() -> None:
            nonlocal done
            done = min(done + batch, count)
            if self._trainer.accelerator.is_main_process:
                self._report(0, self._trainer.state.max_steps, {}, {"compared": done, "to_compare": count})

        ours = torch.cat(self._trainer.reference_logps(sample, tell)).double().numpy()
        table: pa.Table = sample.with_format("arrow")[:]
        sides = ("chosen", "rejected")
        theirs = np.concatenate([table[f"{side}_logp"].to_numpy() for side in sides])
        tokens = np.concatenate([pc.list_value_length(table[f"{side}_ids"]).to_numpy() for side in sides])
        return agreement(ours, theirs, tokens)


class _Clock:
    """Seconds of each part of the work."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now
