"""The stage `train`: ε-DPO on the round's pairs, by the trainer child."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from selfplay.config import Config, Ema, TrainConfig
from selfplay.errors import Interrupted
from selfplay.progress import Line, left
from selfplay.stage import Metrics, Stage
from selfplay.storage import folders, hashes, policies, tables
from selfplay.training import launch
from selfplay.training.jobs import STOP, LoraJob, TrainJob
from selfplay.training.replay import write_replayed
from selfplay.training.service import Trainer
from selfplay.types import Policy, Reference

REPLAYED = "replayed.parquet"  # pairs of earlier rounds that were trained on again


def _space(config: Config, weights: int) -> int:
    """Bytes of an exported policy with its float32 masters, of two saves of the trainer, and of a reference of its own."""
    masters = 2 * weights
    average = masters if isinstance(config.train.reference, Ema) else 0
    return 2 * masters + average + (0 if config.train.lora else 2 * 3 * masters)


TRAIN = Stage(
    name="train",
    reads=("depth/pairs.parquet",),
    writes=("history.json",),
    unit="steps",
    log="trainer",
    space=_space,
)


def train(
    out: Path,
    line: Line,
    *,
    trainer: Trainer,
    pairs: Path,
    earlier: Sequence[Path],
    work: Path,
    policy: Policy,
    reference: Reference,
    initial: Policy,
    version: int,
    beta: float,
    canary_ids: list[list[int]],
    packages: dict[str, str],
    config: Config,
    seed: int,
    meanwhile: Callable[[], object],
    breathe: Callable[[str], None],
    warn: Callable[[str], None],
) -> Metrics:
    """Train policy `version` from `policy` into out/policy, with its manifest, and write history.json.

    earlier: pairs that earlier rounds trained on, for `train.replay`. work: the folder for the trainer's saves, from which it
    resumes. initial: the policy whose tokenizer every export carries. beta: at the start (`train.beta`, or where an earlier round
    against the same reference left it). meanwhile: work for the engine while the trainer works. breathe: called at each
    step; when it raises Interrupted, the trainer saves its state first. Raises TrainError.
    """
    replayed, again = None, round(config.train.replay * tables.count_rows(pairs)) if earlier else 0
    if again:
        replayed = out / REPLAYED
        again = write_replayed(replayed, earlier, again, seed)
    job = train_job(out, pairs, replayed, work, policy, reference, initial, beta, canary_ids, config, seed)
    warned: set[str] = set()
    wants_to_stop: list[Interrupted] = []

    def save(stop: Interrupted) -> None:
        wants_to_stop[:] = [stop]
        folders.make(job.work)
        (job.work / STOP).touch()  # the trainer saves at the end of its step, and answers

    def work_of_engine() -> None:
        try:
            meanwhile()
        except Interrupted as stop:
            if stop.now or trainer.apart:  # then the trainer has not begun
                raise
            save(stop)
        line.update(text="waits for the trainer")

    def progress(event: dict[str, Any]) -> None:
        try:
            breathe("step")
        except Interrupted as stop:
            if stop.now:
                raise
            save(stop)
        metrics = event["metrics"]
        for name, text in warnings(metrics, config.train).items():
            if name not in warned:  # once a round: what has begun mostly lasts
                warned.add(name)
                warn(f"training step {event['step']}: {text}")
        line.update(done=event["step"], total=event["steps"], text=words(metrics, event.get("pace", {})))

    line.update(text="waits for the trainer")
    result = trainer.order("train", job, progress, work_of_engine)
    if "stopped" in result:
        raise wants_to_stop[0] if wants_to_stop else Interrupted("the trainer was asked to stop")
    manifest = policies.Manifest(
        version=version,
        parent=policy.version,
        round=version,
        beta=result["beta"],
        reference=reference.version,
        reference_sha256=reference.sha256,
        fingerprint=config.fingerprint(),
        packages=packages,
        update=result["update"],
        files=hashes.hash_files(job.out),
        canaries={"token_ids": canary_ids, "logps": result["canaries"]},
    )
    policies.write(job.out, manifest)
    folders.write_json(out / "history.json", result["history"])
    found = metrics(result, beta) | ({"replayed": float(again)} if config.train.replay else {})
    line.update(text=f"β {beta:g} → {found['beta']:.4g}, update {found['update_relative_norm']:.2e}")
    return found


def train_job(
    out: Path,
    pairs: Path,
    replayed: Path | None,
    work: Path,
    policy: Policy,
    reference: Reference,
    initial: Policy,
    beta: float,
    canary_ids: list[list[int]],
    config: Config,
    seed: int,
) -> TrainJob:
    """What the trainer is told."""
    settings, serving = config.train, config.policy.dtype
    checked = reference.version == policy.version  # the generator's log-probabilities are those of the reference
    exact = serving == "float32"
    return TrainJob(
        pairs=pairs,
        replayed=replayed,
        policy=Path(policy.path),
        reference=Path(reference.path),
        initial=Path(initial.path),
        work=work,
        out=out / "policy",
        serving_dtype=serving,
        lora=None if settings.lora is None else LoraJob.model_validate(settings.lora.model_dump()),
        beta=beta,
        processes=launch.read(settings.accelerate).processes,
        agreement_mean=(settings.agreement_mean or (1e-3 if exact else 5e-2)) if checked else None,
        agreement_p99=(settings.agreement_p99 or (1e-2 if exact else 2.5e-1)) if checked else None,
        agreement_pairs=settings.agreement_pairs,
        seed=seed,
        canary_ids=canary_ids,
        trust_remote_code=config.policy.trust_remote_code,
        **{
            name: getattr(settings, name)
            for name in (
                "epsilon", "beta_min", "beta_max", "label_smoothing", "nll_weight", "learning_rate", "epochs",
                "batch_pairs", "micro_batch_pairs", "schedule", "warmup_ratio", "max_grad_norm", "weight_decay",
                "max_length", "save_steps", "gradient_checkpointing", "bf16", "min_update",
            )
        },
    )  # fmt: skip


def words(metrics: Mapping[str, float | None], pace: Mapping[str, float]) -> str:
    """How far the trainer is: the metrics of the step that ended, or the place within a long one; the pace, and what is left."""
    said = []
    if "compared" in pace:
        said.append(f"compares itself with the engine: {pace['compared']:.0f} of {pace['to_compare']:.0f} pairs")
    loss, beta = metrics.get("train/loss"), metrics.get("train/beta")
    if loss is not None and beta is not None:
        said.append(f"loss {loss:.3f}, β {beta:.4g}")
    if "micro_batch" in pace:
        said.append(f"micro-batch {pace['micro_batch']:.0f} of {pace['micro_batches']:.0f}")
    if "tokens_per_second" in pace:
        said.append(f"{pace['tokens_per_second']:,.0f} tokens/s, {left(pace['seconds_left'])}")
    return ", ".join(said)


def warnings(metrics: Mapping[str, float | None], settings: TrainConfig) -> dict[str, str]:
    """What a person should know of an optimizer step, and do about it, by the metric that shows it."""
    found = {}
    if metrics.get("train/beta_at_limit"):
        found["beta_at_limit"] = (
            f"β is held at its limit {metrics['train/beta']:.4g} and no longer follows ε: widen train.beta_min and "
            "beta_max, or lower train.epsilon"
        )
    drop, limit = metrics.get("train/chosen_drop") or 0.0, settings.max_chosen_drop
    if limit is not None and drop > limit:
        found["chosen_drop"] = (
            f"chosen and rejected responses have both lost {drop:.1f} nats or more to the reference (train.max_chosen_drop "
            f"is {limit:g}): raise train.beta, lower the learning rate, or set train.nll_weight"
        )
    return found


def metrics(result: Mapping[str, Any], beta: float) -> Metrics:
    """Metrics of the stage, from the trainer's answer. `beta`: at the start."""
    last = result["history"][-1]
    mean = _mean_over(result["history"])
    return {
        "beta_start": beta,
        "beta": result["beta"],
        "steps": result["steps"],
        "update_relative_norm": result["update"]["relative_norm"],
        "share_changed": result["update"]["share_changed"],
        "loss": mean.get("train/loss", math.nan),
        "last_loss": last.get("train/loss") or math.nan,
        **{f"agreement_{k}": v for k, v in (result["agreement"] or {}).items() if k != "tokens"},
        **{f"seconds_{k}": v for k, v in result["seconds"].items()},
        **{k.removeprefix("train/"): v for k, v in mean.items() if k not in ("train/loss", "train/beta")},
        "chosen_drop": last.get("train/chosen_drop") or 0.0,  # a running mean already
    }


def _mean_over(history: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """Mean of each metric over the optimizer steps that have it."""
    names = {name for step in history for name in step if name.startswith("train/")}
    means = {}
    for name in sorted(names):
        values = [v for step in history if (v := step.get(name)) is not None]
        if values:
            means[name] = sum(values) / len(values)
    return means
