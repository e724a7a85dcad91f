"""A reward model is loaded, and scores conversations in batches of similar length.

A score is raw, without a sigmoid and without scaling. It is one of three things:

- the single logit of an `AutoModelForSequenceClassification`;
- the weighted sum of the heads that were named, for a model with several heads;
- the `score` that the model puts out, for a model whose own code combines its heads (as the gating of ArmoRM does).
"""

import hashlib
import json
import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from reward import hub, onednn
from reward.chat import ChatEncoder
from reward.schema import Health, Item
from reward.scorer import ModelRefused, Score, Stopped

__all__ = ["ModelRefused", "RewardModel", "Score", "Stopped", "batches", "load", "load_all"]

BESIDE = ["consolidated*", "adapter_*", "*/*.safetensors"]  # files of a model on the Hub that are not read
LARGEST_HEADER = 32 << 20  # bytes of a safetensors header, which is parsed as a whole; large models need a third of it
UNLIMITED = 10**9  # A tokenizer without a limit says 10**30.
DEFAULT_MAX_TOKENS = 4096  # of a model that names no limit
CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 1024, 16384  # A batch takes twice as long if the cache of a CPU cannot hold it.
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class RewardModel:
    """A loaded model with its tokenizer. `load` makes one. Only one thread at a time may call `score`.

    `batch_tokens` is the most tokens of one forward pass, with the padding. An item that is longer goes alone.
    """

    def __init__(
        self, model: Any, encoder: ChatEncoder, health: Health, batch_tokens: int, heads: Mapping[str, float]
    ) -> None:
        self.health = health
        self.stopping = threading.Event()
        self.counts: Counter[str] = Counter()
        self._model = model
        self._encoder = encoder
        self._batch_tokens = batch_tokens
        self._embeddings: int = model.get_input_embeddings().weight.shape[0]
        pad = model.config.get_text_config().pad_token_id
        self._pad: int | None = pad if pad is not None and 0 <= pad < self._embeddings else None
        self._combine = self._combination(heads)

    def score(self, items: Sequence[Item]) -> list[Score]:
        """A score for each item, in order. On a CPU, the same items in one call get the same scores to the bit.

        Raises Stopped once `stopping` is set.
        """
        encoded = self._encoder.encode(items)
        scores = [Score(reason=e) if isinstance(e, str) else Score() for e in encoded]
        sequences = {i: e for i, e in enumerate(encoded) if not isinstance(e, str)}
        for i in [i for i, ids in sequences.items() if max(ids) >= self._embeddings]:
            del sequences[i]
            scores[i] = Score(reason="has a token that the model has no embedding for")
        for batch in batches({i: len(ids) for i, ids in sequences.items()}, self._batch_tokens):
            if self.stopping.is_set():
                raise Stopped
            for i, value in zip(batch, self._forward([sequences[i] for i in batch]), strict=True):
                scores[i] = (
                    Score(value=value) if math.isfinite(value) else Score(reason=f"the model's score is {value}")
                )
        return scores

    def _forward(self, sequences: Sequence[list[int]]) -> list[float]:
        """The scores of sequences. They are padded on the right to (B, T), on whatever side the tokenizer pads."""
        pad, width = self._pad_id(sequences), max(map(len, sequences))
        ids = torch.tensor([s + [pad] * (width - len(s)) for s in sequences], device=self._model.device)
        mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences], device=self._model.device)
        with torch.inference_mode():
            scores = self._combine(self._model(input_ids=ids, attention_mask=mask))
        assert scores.shape == (len(sequences),), f"scores of shape {tuple(scores.shape)}"
        values: list[float] = scores.tolist()
        self.counts["tokens"] += sum(map(len, sequences))
        self.counts["padded_tokens"] += len(sequences) * width
        return values

    def _combination(self, heads: Mapping[str, float]) -> Callable[[Any], torch.Tensor]:
        """What turns the output of the model into scores (B,). A trial conversation shows what the output looks like.

        Raises ModelRefused if the model has several heads and none is named, or if it lacks a head that is named.
        """
        trial = Item.model_validate({"messages": [{"role": "user", "content": "Hello"}], "response": "Hello."})
        (ids,) = self._encoder.encode([trial])
        assert isinstance(ids, list), "the encoder has checked a conversation like this one"
        with torch.inference_mode():
            output = self._model(input_ids=torch.tensor([ids], device=self._model.device))
        combined, separate = getattr(output, "score", None), getattr(output, "rewards", None)
        if not heads and combined is not None and combined.numel() == 1:
            return lambda output: output.score.float().reshape(-1)
        field = "rewards" if separate is not None else "logits"
        count = getattr(output, field).shape[-1]
        labels = self._model.config.id2label
        numbers = [str(i) for i in range(count)]
        names = [str(labels[i]) for i in range(count)] if len(labels) == count else numbers
        if not heads and count == 1:
            return lambda output: output.logits[:, 0].float()
        if not heads:
            raise ModelRefused(
                f"a reward model has one label, this one has num_labels = {count}: name the heads to add up, "
                f"--head NAME or --head NAME=WEIGHT, out of {', '.join(names)}"
            )
        if unknown := [h for h in heads if h not in names + numbers]:
            raise ModelRefused(f"the model has no head {unknown[0]!r}; it has {', '.join(names)}")
        each = [float(heads.get(n, heads.get(i, 0.0))) for n, i in zip(names, numbers, strict=True)]
        weights = torch.tensor(each, device=self._model.device)
        return lambda output: getattr(output, field).float() @ weights

    def _pad_id(self, sequences: Sequence[list[int]]) -> int:
        """The id of the padding. A decoder model reads the logit of the last token that is not `config.pad_token_id`.

        A model that names a padding id was trained with that rule. Another one names none, or one that it has no embedding
        for. It reads the last token, whatever that is, so the padding must differ from every last token of the batch.
        """
        if self._pad is not None:
            return self._pad
        last = {s[-1] for s in sequences}
        pad = next(i for i in range(len(last) + 1) if i not in last)
        self._model.config.get_text_config().pad_token_id = pad
        return pad


def batches(lengths: Mapping[int, int], budget: int) -> Iterator[list[int]]:
    """Keys in batches of similar length, in each of which count × longest ≤ `budget`.

    The longest come first: if memory is too short, it shows at once.
    """
    batch: list[int] = []
    longest = 0
    for key in sorted(lengths, key=lambda k: (-lengths[k], k)):
        if batch and (len(batch) + 1) * longest > budget:
            yield batch
            batch = []
        longest = longest if batch else lengths[key]
        batch.append(key)
    if batch:
        yield batch


def load(name: str, *, device: str = "auto", **options: Any) -> RewardModel:
    """The reward model in a folder, or on the Hub, on one device. See `load_all`."""
    return load_all(name, devices=device, **options)[0]


def load_all(
    name: str,
    *,
    devices: str = "auto",
    dtype: str = "auto",
    batch_tokens: int | None = None,
    max_tokens: int | None = None,
    heads: Mapping[str, float] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    template_date: date | None = None,
) -> list[RewardModel]:
    """The reward model in a folder, or on the Hub, once for each device.

    `devices` is `cpu`, a list such as `cuda:0,cuda:1`, `auto` (a GPU if there is one) or `all` (every GPU). The `dtype`
    `auto` is that of the checkpoint. `batch_tokens` has a default for each kind of device, which was the fastest one.
    `heads` has the weight of each head by its name. `chat_template_kwargs` are given to the chat template, and
    `template_date` is the date that it prints (see ChatEncoder).
    Raises ModelRefused.
    """
    heads = heads or {}
    folder = _folder(name, revision, trust_remote_code)
    own_code = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(folder, **own_code)
        tokenizer = AutoTokenizer.from_pretrained(folder, **own_code)
    except Exception as error:  # The readers of these files may raise anything, and tokenizers raises bare Exceptions.
        raise ModelRefused(f"{name}: {error}") from error
    files = _weight_files(name, folder)
    identity = [files, dict(sorted(heads.items())), _other_files(folder, trust_remote_code)]
    found = []
    for device in _devices(devices):
        try:
            encoder = ChatEncoder(
                tokenizer, limit_of(config, tokenizer, max_tokens), chat_template_kwargs, template_date
            )
            model, info = AutoModelForSequenceClassification.from_pretrained(
                folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **own_code
            )
            model = model.to(device).eval().requires_grad_(False)
        except Exception as error:  # The readers of its files, and code that comes with a model, may raise anything.
            raise ModelRefused(f"{name}: {type(error).__name__}: {error}") from error
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"])[:5])
            raise ModelRefused(f"{name}: no trained reward model, its weight files lack {missing}")
        model.config.use_cache = False
        onednn.take_over(model)
        health = Health(
            model=name,
            parameters=model.num_parameters(),
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(model.device),
            max_tokens=encoder.max_tokens,
            weights_sha256=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
            template_sha256=encoder.template_sha256,
            files=files,
        )
        budget = batch_tokens or (CPU_BATCH_TOKENS if model.device.type == "cpu" else GPU_BATCH_TOKENS)
        try:
            found.append(RewardModel(model, encoder, health, budget, heads))
        except ModelRefused as error:
            raise ModelRefused(f"{name}: {error}") from error
        except Exception as error:  # Code that comes with a model runs here for the first time.
            raise ModelRefused(f"{name}: {type(error).__name__} at its first conversation: {error}") from error
    return found


def limit_of(config: Any, tokenizer: Any, max_tokens: int | None) -> int:
    """How many tokens a conversation may have. Its configuration, its tokenizer and a setting may each limit it."""
    limits = [
        getattr(config.get_text_config(), "max_position_embeddings", None),
        tokenizer.model_max_length,
        max_tokens,
    ]
    known = [int(limit) for limit in limits if limit is not None and 0 < limit < UNLIMITED]
    return min(known, default=DEFAULT_MAX_TOKENS)


def _devices(names: str) -> list[str]:
    if names == "auto":
        return ["cuda" if torch.cuda.is_available() else "cpu"]
    if names == "all":
        return [f"cuda:{n}" for n in range(torch.cuda.device_count())] or ["cpu"]
    return [n.strip() for n in names.split(",")]


def _folder(name: str, revision: str | None, trust_remote_code: bool) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelRefused(f"{name}: no model here, the folder has no config.json")
        return path
    if path.exists() or not HUB_NAME.fullmatch(name):
        raise ModelRefused(
            f"{name}: there is no such folder; give the folder of a saved model, or owner/name on the Hub"
        )
    hub.bounded()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"] + ["*.py"] * trust_remote_code
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=BESIDE))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise ModelRefused(f"{name}: neither a folder nor to be had from the Hub ({error})") from error


def _weight_files(name: str, folder: Path) -> dict[str, str]:
    """The SHA-256 of each weight file that from_pretrained reads: one file, or the shards that an index names."""
    if (folder / "adapter_config.json").is_file():
        raise ModelRefused(
            f"{name}: an adapter lies there (adapter_config.json), which would be put on top of the model: move it away, or "
            "merge it with its model"
        )
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        names = ["model.safetensors"]
    elif index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        raise ModelRefused(
            f"{name}: no model.safetensors; pickled weights are not loaded, save the model as safetensors"
        )
    missing = [n for n in names if not (folder / n).is_file()]
    if missing:
        raise ModelRefused(f"{name}: the index names {', '.join(missing[:3])}, which the folder lacks")
    for each in names:
        with (folder / each).open("rb") as file:
            if (length := int.from_bytes(file.read(8), "little")) > LARGEST_HEADER:
                raise ModelRefused(
                    f"{name}: {each} is damaged, or no weights: it says that its header has {length} bytes"
                )
    return {n: _sha256(folder / n) for n in names}


def _other_files(folder: Path, code: bool) -> dict[str, str]:
    """The SHA-256 of each other file that decides on a score: configuration, tokenizer, and the model's code if it runs."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {k: v for k, v in config.items() if k not in ("transformers_version", "_name_or_path")}
    found = {"config.json": hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()}
    names = ["tokenizer.json", "tokenizer_config.json", *(sorted(p.name for p in folder.glob("*.py")) if code else ())]
    return found | {n: _sha256(folder / n) for n in names if (folder / n).is_file()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
