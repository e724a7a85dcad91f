"""The policy that training leaves: exported, compared with what it began from, and scored as it will be served."""

from __future__ import annotations

import contextlib
import gc
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from selfplay.errors import TrainError
from selfplay.models import adapters, gathered, weights
from selfplay.models import sharded as models
from selfplay.models.kept import Kept
from selfplay.storage import folders
from selfplay.training.jobs import TrainJob

Made = dict[str, Any]  # `update` {share_changed, relative_norm}, and `canaries` (nats each)


def whole(job: TrainJob, model: Any, device: torch.device, kept: Kept) -> Made | None:
    """Export a model that each process has whole; rank 0 does so, and gets what was made. Raises TrainError («no_update»)."""
    if gathered.rank():
        return None
    _make_room(device)
    with _folder(job) as part:
        if job.lora is not None:
            _sort_modules(model)
            model.save_pretrained(part / "adapter")
            model = adapters.merged(model)
        model = model.to("cpu")
        start = kept.shared(weights.masters(job.policy), job.trust_remote_code)
        update = _checked(job, *weights.update_size(start, model))
        next_start = kept.beside(weights.masters(job.policy), model)
        weights.export(model, job.policy, job.initial, part, _dtype(job))
        del start, model
        served = weights.load(part, _dtype(job), job.trust_remote_code).to(device).eval()
        canaries = weights.sequence_logps(served, job.canary_ids)
    if next_start is not None:
        kept.put(weights.masters(job.out), next_start)
    return {"canaries": canaries, "update": update}


def sharded(job: TrainJob, model: Any, device: torch.device) -> Made | None:
    """Export a model that the processes share; all of them call it, and none holds more than its share and some blocks.

    Rank 0 writes, and gets what was made. Raises TrainError («no_update»).
    """
    _make_room(device)
    adapter = models.adapter(model) if job.lora is not None else {}
    if gathered.rank():
        models.export(model, None, job.policy, job.initial, None, _dtype(job))
        return None
    with _folder(job) as part:
        if job.lora is not None:
            _sort_modules(model)
            model.save_pretrained(part / "adapter", state_dict=adapter)
        # As it is stored it stays on the disk, and is read a block at a time.
        start = weights.load(weights.masters(job.policy), "auto", job.trust_remote_code)
        size = models.export(model, start, job.policy, job.initial, part, _dtype(job))
        assert size is not None, "rank 0 wrote it"
        update = _checked(job, *size)
        del start, model
        _make_room(device)
        with tempfile.TemporaryDirectory(prefix="selfplay-") as beside:
            served = weights.load_in_parts(part, _dtype(job), device, Path(beside), job.trust_remote_code).eval()
            canaries = weights.sequence_logps(served, job.canary_ids, device)
    return {"canaries": canaries, "update": update}


def _checked(job: TrainJob, share: float, norm: float) -> dict[str, float]:
    if norm < job.min_update or share == 0:
        raise TrainError(
            "no_update",
            f"training moved the weights by {norm:.3g} of their norm ({share:.2%} of the elements); the least that "
            f"counts is {job.min_update:g}",
            "raise the learning rate, the epochs or the pairs of a round",
        )
    return {"share_changed": share, "relative_norm": norm}


def _folder(job: TrainJob) -> contextlib.AbstractContextManager[Path]:
    if job.out.exists():  # a run that ended between its export and its answer
        shutil.rmtree(job.out)
    return folders.folder(job.out)


def _sort_modules(model: Any) -> None:
    """Bring the names in an adapter's configuration into order: in a set it would differ between two processes."""
    for config in model.peft_config.values():
        if isinstance(config.target_modules, set):
            config.target_modules = sorted(config.target_modules)


def _make_room(device: torch.device) -> None:
    """Let go of the GPU's memory that nothing uses any more: of the reference, the optimizer, or the trained model."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _dtype(job: TrainJob) -> torch.dtype:
    found: torch.dtype = getattr(torch, job.serving_dtype)
    return found
