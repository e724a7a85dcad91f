"""Embeddings of prompts, in the trainer child: the policy's own last hidden states, or a model made for it."""

import gc
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from reward import hub
from selfplay.errors import CheckpointError, TrainError
from selfplay.methods import breadth
from selfplay.models import weights
from selfplay.models.kept import Kept
from selfplay.storage import tables, tensors
from selfplay.training.jobs import EmbedJob
from selfplay.types import Prompt

logger = logging.getLogger(__name__)

ORGANIZATION = "sentence-transformers"  # on the Hub, of a name that has none
BESIDE = ["pytorch_model*", "tf_*", "rust_*", "flax_*", "onnx/*", "openvino/*", "coreml/*", "*.onnx", "*.gguf"]
"""Files on the Hub that are not read: the same weights in other forms."""
BATCH_TOKENS = 8192  # of a forward pass, padding included

OnDone = Callable[[int], None]  # prompts that are done


def embed(job: EmbedJob, on_done: OnDone, models: Kept | None = None) -> dict[str, Any]:
    """Embed prompts and choose those that stand for all. Raises TrainError.

    models: those that the process keeps from order to order.

    The result, in the order of the prompts: `kept` (indices, ascending), `clusters` and `distances` (n) to the centre of
    each prompt's cluster, and `seconds`. No memory of the accelerator is held afterwards but its context.
    """
    started = time.perf_counter()
    prompts = tables.read_rows(job.prompts, Prompt)
    models = models or Kept(keeps=False)
    found = _by_policy(job, prompts, on_done, models) if job.embedding == "policy" else _by_model(job, prompts)
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
    try:
        kept, labels, distances = breadth.representatives(found, job.keep, job.clusters, job.seed)
    except ValueError as error:
        raise TrainError(
            "nonfinite", f"{job.embedding}: {error}", "the model may be damaged: check its files"
        ) from None
    return {
        "kept": kept.tolist(),
        "clusters": labels.tolist(),
        "distances": distances.tolist(),
        "seconds": time.perf_counter() - started,
    }


def _by_policy(job: EmbedJob, prompts: Sequence[Prompt], on_done: OnDone, models: Kept) -> NDArray[np.float32]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if job.dtype == "float32":
        model = models.shared(weights.masters(job.policy), job.trust_remote_code).eval()
    else:
        model = weights.load(job.policy, getattr(torch, job.dtype), job.trust_remote_code).eval()
    weights.require_memory(model)
    model = model.to(device)
    found: NDArray[np.float32] = hidden_states(model, [p.prompt_ids for p in prompts], job.pooling, on_done=on_done)
    return found


@torch.no_grad()
def hidden_states(
    model: Any,
    sequences: Sequence[Sequence[int]],
    pooling: Literal["mean", "last"] = "mean",
    batch_tokens: int = BATCH_TOKENS,
    on_done: OnDone = lambda count: None,
) -> NDArray[np.float32]:
    """The last hidden states of each sequence, (n, d): their mean over its tokens, summed in float32, or that of its last.

    Sequences of like length share a forward pass of at most `batch_tokens` tokens, padded on the right, where causal
    attention never looks. The output layer is left out.
    """
    trunk = model.get_decoder()
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    found: dict[int, NDArray[np.float32]] = {}
    start = 0
    while start < len(order):
        longest = len(sequences[order[start]])
        batch = order[start : start + max(1, batch_tokens // longest)]
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, i in enumerate(batch):
            ids[row, : len(sequences[i])] = torch.tensor(sequences[i])
            mask[row, : len(sequences[i])] = 1
        ids, mask = ids.to(model.device), mask.to(model.device)
        hidden = trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.float()
        lengths = mask.sum(1)
        if pooling == "last":
            pooled = hidden[torch.arange(len(batch), device=hidden.device), lengths - 1]
        else:  # a padded state is left out, not multiplied by 0: it may be infinite
            pooled = hidden.masked_fill(mask[..., None] == 0, 0.0).sum(1) / lengths[:, None]
        found |= dict(zip(batch, pooled.cpu().numpy(), strict=True))
        start += len(batch)
        on_done(start)
    return np.stack([found[i] for i in range(len(sequences))])


def _by_model(job: EmbedJob, prompts: Sequence[Prompt]) -> NDArray[np.float32]:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise TrainError(
            "input",
            f"breadth.embedding {job.embedding} needs the package sentence-transformers: {error}",
            "pip install sentence-transformers, or set breadth.embedding to policy",
        ) from error
    try:
        folder = _folder(job.embedding, job.trust_remote_code)
        for file in folder.rglob("*.safetensors"):
            tensors.bound_header(file)
        model = SentenceTransformer(
            str(folder), trust_remote_code=job.trust_remote_code, model_kwargs={"use_safetensors": True}
        )
    except (OSError, ValueError, CheckpointError) as error:
        raise TrainError(
            "input", f"breadth.embedding {job.embedding} cannot be loaded: {error}", "give a folder or a Hub id"
        ) from error
    texts = ["\n".join(m["content"] for m in p.messages) for p in prompts]
    return np.asarray(model.encode(texts, convert_to_numpy=True, show_progress_bar=False), np.float32)


def _folder(name: str, trust_remote_code: bool) -> Path:
    """The folder of a model; one of the Hub is downloaded first, so that its files can be looked at before they are loaded."""
    if Path(name).is_dir():
        return Path(name)
    hub.bounded()
    from huggingface_hub import snapshot_download

    beside = BESIDE if trust_remote_code else [*BESIDE, "*.py"]
    return Path(snapshot_download(name if "/" in name else f"{ORGANIZATION}/{name}", ignore_patterns=beside))
