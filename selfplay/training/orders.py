"""What the controller asks of the trainer child: orders, and the stage `train`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from selfplay.config import EveryN, TrainConfig
from selfplay.errors import CheckpointError, Interrupted, TrainError
from selfplay.evaluation import evaluate
from selfplay.processes.child import ChildDied, ChildError
from selfplay.processes.logs import last_line
from selfplay.reporting.terminal import Line
from selfplay.rounds.run import packages
from selfplay.storage import folders, hashes, policies
from selfplay.training.jobs import STOP, FeaturesJob, LoraJob, TrainJob
from selfplay.types import Pair, Policy

if TYPE_CHECKING:
    from selfplay.rounds.round import Round

TRAINER_STARTS = 2  # a trainer that dies is started once more; it resumes from its last save


def order(
    r: Round,
    name: str,
    job: BaseModel,
    on_progress: Callable[[dict[str, Any]], None] = lambda event: None,
    meanwhile: Callable[[], object] = lambda: None,
    last: bool = True,
) -> dict[str, Any]:
    """Give the trainer an order and wait for its result. Raises TrainError.

    `meanwhile` works with the engine while the trainer does; where both share a GPU it comes first, the engine then
    sleeps, and the trainer ends with its order, so that none of its memory is left when the engine wakes. Not so before
    the `last` order of two that follow each other: the engine sleeps on, and the trainer waits for the next one.
    """
    colocated = r.config.placement.colocated
    for start in range(TRAINER_STARTS):
        try:
            if colocated:
                meanwhile()
                if r.run.generator.policy is not None:  # an engine without one holds no memory yet
                    r.run.generator.sleep()
            trainer = r.run.trainer()
            sent = trainer.send(name, job=job.model_dump(mode="json"))
            if not colocated:
                meanwhile()
            result = trainer.result(sent, on_progress)
            if colocated and last:
                r.run.stop_trainer()
                if r.run.generator.policy is not None:
                    r.run.generator.wake()
            assert isinstance(result, dict)
            return result
        except ChildError as error:
            raise TrainError(error.kind, str(error), error.hint) from error
        except ChildDied as error:
            if start + 1 == TRAINER_STARTS:
                why = f"{error}; the last it said: {last_line(error.log)}"
                raise TrainError("died", why, "it resumes from its last save: run the same command again") from error
            r.run.stop_trainer()  # else it would be told once more, as one that died while it waited
            r.run.event("trainer_restart", f"{error}; starting it again, it resumes from its last save")
    raise AssertionError("every start returns or raises")


def features(r: Round, out: Path, line: Line) -> dict[str, float]:
    """Have gradient features of the round's kept base pairs clustered into `out`; metrics. `train` is to follow."""
    settings, against = r.config.train, reference_policy(r)
    policy = r.run.policy(r.sampler)
    for used in (policy, against):
        policies.verify(r.run.policies.folder(used.version))
    kept = sum(p.kept_because is not None for p in r.rows("pairs", "pairs", Pair))
    job = FeaturesJob(
        pairs=r.dir / "pairs" / "pairs.parquet",
        policy=Path(policy.path),
        reference=Path(against.path),
        out=out,
        dim=r.config.depth.dim,
        layers=r.config.depth.layers,
        clusters=r.config.depth.clusters or max(1, round(math.sqrt(kept))),
        closeness=r.config.depth.closeness,
        seed=r.seed("depth"),
        micro_batch_pairs=settings.micro_batch_pairs,
        lora=None if settings.lora is None else LoraJob.model_validate(settings.lora.model_dump()),
        dtype="bfloat16" if settings.bf16 else "float32",
        gradient_checkpointing=settings.gradient_checkpointing,
        beta=_first_beta(r),
        epsilon=settings.epsilon,
        label_smoothing=settings.label_smoothing,
        nll_weight=settings.nll_weight,
        threads=settings.cpu_threads,
        trust_remote_code=r.config.policy.trust_remote_code,
    )
    line.update(text="gradients of the base pairs")

    def progress(event: dict[str, Any]) -> None:
        r.run.breathe("shard")  # what is lost to a stop is seconds: this part is not kept
        line.update(text=f"gradients of {event['done']} of {kept} base pairs")

    found = order(
        r,
        "features",
        job,
        progress,
        # Where it shares a GPU, the engine sleeps from here to the end of training.
        meanwhile=lambda: evaluate.champion_answers(r) if r.config.placement.colocated else None,
        last=False,
    )
    return {name: math.nan if value is None else value for name, value in found.items()}


def train(r: Round, folder: Path, line: Line) -> Mapping[str, float]:
    """Train this round's policy into `folder`/policy; the champion's answers to the gate are sampled meanwhile."""
    job, against = _train_job(r, folder)
    alarmed: set[str] = set()

    wants_to_stop: list[Interrupted] = []

    def save(stop: Interrupted) -> None:
        wants_to_stop[:] = [stop]
        folders.make(job.work)
        (job.work / STOP).touch()  # the trainer saves at the end of its step, and answers

    def meanwhile() -> None:
        try:
            evaluate.champion_answers(r)
        except Interrupted as stop:
            if stop.now or r.config.placement.colocated:  # then the trainer has not begun
                raise
            save(stop)

    def progress(event: dict[str, Any]) -> None:
        try:
            r.run.breathe("step")
        except Interrupted as stop:
            if stop.now:
                raise
            save(stop)
        metrics = event["metrics"]
        for name, text in alarms(metrics, r.config.train).items():
            if name not in alarmed:  # once a round: what has begun mostly lasts
                alarmed.add(name)
                r.run.event("warning", f"round {r.index}, training step {event['step']}: {text}")
        loss, beta = metrics.get("train/loss"), metrics.get("train/beta")
        text = f"loss {loss:.3f}, β {beta:.4g}" if loss is not None and beta is not None else ""
        line.update(done=event["step"], total=event["steps"], text=text)

    result = order(r, "train", job, progress, meanwhile)
    if "stopped" in result:
        raise wants_to_stop[0] if wants_to_stop else Interrupted("the trainer was asked to stop")
    _write_manifest(r, job.out, result, against)
    folders.write_json(folder / "history.json", result["history"])
    last = result["history"][-1]
    mean = _mean_over(result["history"])
    metrics = {
        "beta_start": job.beta,
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
    line.update(text=f"β {job.beta:g} → {result['beta']:.4g}, update {metrics['update_relative_norm']:.2e}")
    return metrics


def alarms(metrics: Mapping[str, float | None], settings: TrainConfig) -> dict[str, str]:
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


def _train_job(r: Round, folder: Path) -> tuple[TrainJob, Policy]:
    settings, serving = r.config.train, r.config.policy.dtype
    against = reference_policy(r)
    policy = r.run.policy(r.sampler)
    policies.verify(r.run.policies.folder(r.sampler))
    policies.verify(r.run.policies.folder(against.version))
    sampled_by_reference = against.version == r.sampler
    exact = serving == "float32"
    job = TrainJob(
        pairs=r.dir / "depth" / "pairs.parquet",
        policy=Path(policy.path),
        reference=Path(against.path),
        initial=Path(r.run.policy(0).path),
        work=r.dir / "train.work",
        out=folder / "policy",
        serving_dtype=serving,
        lora=None if settings.lora is None else LoraJob.model_validate(settings.lora.model_dump()),
        beta=_first_beta(r),
        agreement_mean=(settings.agreement_mean or (1e-3 if exact else 5e-2)) if sampled_by_reference else None,
        agreement_p99=(settings.agreement_p99 or (1e-2 if exact else 2.5e-1)) if sampled_by_reference else None,
        seed=r.seed("train"),
        threads=settings.cpu_threads,
        canary_ids=r.run.canary_ids,
        trust_remote_code=r.config.policy.trust_remote_code,
        **{
            name: getattr(settings, name)
            for name in (
                "epsilon", "beta_min", "beta_max", "label_smoothing", "nll_weight", "learning_rate", "epochs",
                "batch_pairs", "micro_batch_pairs", "schedule", "warmup_ratio", "max_grad_norm", "weight_decay",
                "max_length", "save_steps", "gradient_checkpointing", "bf16", "min_update",
            )
        },
    )  # fmt: skip
    return job, against


def _first_beta(r: Round) -> float:
    """β goes on where training against this very reference left it; a refreshed one starts anew."""
    settings, policy = r.config.train, r.run.policy(r.sampler)
    beta = policy.beta if policy.beta is not None and policy.round >= reference(r)[1] else settings.beta
    return min(max(beta, settings.beta_min), settings.beta_max)


def reference(r: Round) -> tuple[int, int]:
    """The version of this round's reference, and the round that it began with."""
    rule = r.config.train.reference
    every = rule.every if isinstance(rule, EveryN) else 1 if rule == "previous" else r.index
    first = r.index - (r.index - 1) % every
    if rule == "initial":
        return 0, first
    return int(r.run.store.round(first)["sampler"]), first


def reference_policy(r: Round) -> Policy:
    """This round's reference. Raises CheckpointError where retention has deleted its weights."""
    version = reference(r)[0]
    try:
        return r.run.policy(version)
    except CheckpointError as error:
        raise CheckpointError(
            f"the reference of round {r.index} is policy {version} (train.reference), and {error}",
            "it was not the reference when old policies were deleted: set train.reference to previous or initial",
        ) from error


def record_candidate(r: Round) -> None:
    """Enter the trained policy in the ledger."""
    manifest = policies.read(r.run.policies.folder(r.index))
    if not any(p["version"] == r.index for p in r.run.store.policies()):
        r.run.store.record_policy(
            r.index,
            "candidate",
            round=r.index,
            parent=manifest.parent,
            reference=manifest.reference,
            beta=manifest.beta,
        )


def _write_manifest(r: Round, exported: Path, result: dict[str, Any], against: Policy) -> None:
    manifest = policies.Manifest(
        version=r.index,
        parent=r.sampler,
        round=r.index,
        beta=result["beta"],
        reference=against.version,
        reference_sha256=policies.weights_sha256(policies.read(r.run.policies.folder(against.version))),
        fingerprint=r.config.fingerprint(),
        packages=packages(),
        update=result["update"],
        files=hashes.hash_files(exported),
        canaries={"token_ids": r.run.canary_ids, "logps": result["canaries"]},
    )
    folders.write_json(exported / folders.MANIFEST, dataclasses.asdict(manifest))


def _mean_over(history: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """Mean of each metric over the optimizer steps that have it."""
    names = {name for step in history for name in step if name.startswith("train/")}
    means = {}
    for name in sorted(names):
        values = [v for step in history if (v := step.get(name)) is not None]
        if values:
            means[name] = sum(values) / len(values)
    return means
