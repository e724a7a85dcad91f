"""Models made from a configuration, with random weights, and everything else that a run needs. Nothing is downloaded.

The weights are drawn so that the model behaves like a trained one where it matters here. Each branch adds little to the
residual stream, and the output layer is scaled until the next token has an entropy of `ENTROPY`, as a trained model's has at
temperature 1. Random networks still amplify rounding more than trained ones do, so noise that is measured on them is an upper
end.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import random
from functools import cache
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from torch import Tensor

from gpu_kit.sizes import Shape, Sizes
from selfplay.models import weights
from selfplay.storage import checkpoints, folders, policies
from selfplay.types import Policy
from selfplay.worlds.tiny.builder.tokenizer import END, PAD, POLICY_TEMPLATE, SPECIALS

ENTROPY = 1.0  # nats of the next token, in the mean
BRANCH, INNER, STREAM = 0.3, 0.6, 0.1  # spreads of what leaves a branch, of what is inside it, and of the embeddings
UPDATE = 0.01  # of a policy against the one before, in spreads of each matrix
DTYPE = torch.bfloat16
POSITIONS = 4096


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def release() -> None:
    """Give back what this process no longer uses of the GPU: an engine beside it counts on that."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def policy_folder(sizes: Sizes, work: Path) -> Path:
    """The checkpoint of policy 0 in bfloat16; made once for all parts."""
    folder = work / "model"
    if not folder.exists():
        with folders.folder(folder) as partial:
            write(language_model(sizes.model), sizes.model.vocabulary, partial)
        release()
    return folder


def updated_folder(sizes: Sizes, work: Path) -> Path:
    """A checkpoint that differs from policy 0 by a small random change of every matrix."""
    folder = work / "updated"
    if not folder.exists():
        model = weights.load(policy_folder(sizes, work), DTYPE).to(device())
        _change(model)
        with folders.folder(folder) as partial:
            write(model, sizes.model.vocabulary, partial)
        del model
        release()
    return folder


@torch.no_grad()
def _change(model: Any) -> None:
    generator = torch.Generator(device()).manual_seed(1)
    for matrix in (p for p in model.parameters() if p.dim() == 2):
        change = torch.randn(matrix.shape, generator=generator, device=matrix.device, dtype=matrix.dtype)
        matrix += UPDATE * matrix.std() * change


def reward_folder(sizes: Sizes, work: Path) -> Path:
    """A sequence classifier with random weights and one label."""
    from transformers import LlamaForSequenceClassification

    folder = work / "reward"
    if not folder.exists():
        torch.manual_seed(2)
        with torch.device(device()):
            model = LlamaForSequenceClassification(llama(sizes.reward, num_labels=1))
        _scale(model)
        with folders.folder(folder) as partial:
            write(model.to(DTYPE), sizes.reward.vocabulary, partial)
        del model
        release()
    return folder


def llama(shape: Shape, **more: Any) -> Any:
    """The configuration of a Llama of this shape."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=POSITIONS, tie_word_embeddings=False, bos_token_id=None, eos_token_id=END,
        pad_token_id=PAD, **more,
    )  # fmt: skip


def language_model(shape: Shape, dtype: torch.dtype = DTYPE) -> Any:
    """A language model of this shape on the device, with weights as the module says."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device()):
        model = LlamaForCausalLM(llama(shape)).eval()
    _scale(model)
    ids = torch.randint(len(SPECIALS), shape.vocabulary, (4, 64), device=model.device)
    with torch.no_grad():
        logits = model(input_ids=ids).logits.flatten(0, 1)
        low, high = 0.0, 100.0
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if entropy(middle * logits) > ENTROPY else (low, middle)
        model.lm_head.weight *= high
    return model.to(dtype)


@torch.no_grad()
def entropy(logits: Tensor) -> float:
    """Mean entropy (nats) of the distributions that logits (N, V) say."""
    logps = logits.float().log_softmax(-1)
    return float(-(logps.exp() * logps).sum(-1).mean())


@torch.no_grad()
def _scale(model: Any) -> None:
    leaving, into = ("o_proj", "down_proj"), ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    for name, matrix in model.named_parameters():
        if matrix.dim() == 2:
            layer = name.split(".")[-2]
            gain = BRANCH if layer in leaving else INNER if layer in into else 1.0
            matrix.normal_(0.0, STREAM if layer == "embed_tokens" else gain * matrix.shape[1] ** -0.5)


def write(model: Any, vocabulary: int, folder: Path) -> None:
    """A checkpoint folder with a tokenizer of so many tokens and a chat template."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(eos_token_id=END, pad_token_id=PAD)
    model.save_pretrained(folder)
    tokenizer(vocabulary).save_pretrained(folder)


@cache
def tokenizer(vocabulary: int) -> Any:
    """A byte-level BPE whose tokens are the bytes, then «aa», «ab», … up to words of four letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    simple = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    letters = ascii_lowercase
    couples = [a + b for a, b in product(letters, letters)]
    longer = [(a, b) for more in (letters, couples) for a, b in product(couples, more)]
    merges = list(islice([*((a, b) for a, b in product(letters, letters)), *longer], vocabulary - len(simple)))
    words = {word: i for i, word in enumerate([*simple, *(a + b for a, b in merges)])}
    assert len(words) == vocabulary, f"{len(words)} words can be made, not {vocabulary}"
    bpe = Tokenizer(models.BPE(vocab=words, merges=merges))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.add_special_tokens(list(SPECIALS))
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=SPECIALS[PAD], eos_token=SPECIALS[END], model_max_length=POSITIONS
    )
    made.chat_template = POLICY_TEMPLATE
    return made


def stop_tokens(sizes: Sizes) -> list[int]:
    """Tokens that end an answer. A random model never says its end token, and would always go on to the limit."""
    first, last = len(SPECIALS), sizes.model.vocabulary
    return [END, *range(first, last, sizes.stop_share)]


def sequences(sizes: Sizes, count: int, longest: int, seed: int) -> list[list[int]]:
    """So many sequences of random tokens, each of a half to the whole of `longest` tokens."""
    rng, first = random.Random(seed), len(SPECIALS)
    lengths = [rng.randint(max(longest // 2, 1), longest) for _ in range(count)]
    return [[rng.randrange(first, sizes.model.vocabulary) for _ in range(length)] for length in lengths]


def write_prompts(path: Path, count: int, words: int, seed: int) -> None:
    """A JSONL file of so many different prompts of so many words."""
    rng = random.Random(seed)
    lines = (
        {"prompt": " ".join("".join(rng.choices(ascii_lowercase, k=4)) for _ in range(words))} for _ in range(count)
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def policy(run_dir: Path, version: int, checkpoint: Path, canary_ids: list[list[int]]) -> Policy:
    """A policy of a run, whose weights stay where they are. Its canaries are scored as the trainer does it."""
    model = weights.load(checkpoint, DTYPE).to(device()).eval()
    manifest = policies.Manifest(
        version=version, parent=None, round=version, beta=None, reference=None, reference_sha256=None, fingerprint="",
        packages={}, update={}, files=checkpoints.hashed(checkpoint), source=str(checkpoint),
        canaries={"token_ids": canary_ids, "logps": weights.sequence_logps(model, canary_ids)},
    )  # fmt: skip
    del model
    release()
    folder = run_dir / "policies" / f"{version:04d}"
    folder.mkdir(parents=True, exist_ok=True)
    folders.write_json(folder / folders.MANIFEST, dataclasses.asdict(manifest))
    return Policy(version=version, path=str(checkpoint), parent=None, round=version, beta=None, reference=None)
