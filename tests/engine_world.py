"""Tiny random policies with manifests, for the tests of the generator: two layers, 291 tokens, no training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from selfplay.config import Config
from selfplay.generation.generator import Ask, Generator, Shard
from selfplay.storage import checkpoints, folders, policies, tables
from selfplay.types import Candidate, Policy, Prompt

EOS, VOCAB = 2, 280
CANARIES = [[1, *((11 * i + 7 * j) % 250 + 3 for j in range(12 + i))] for i in range(6)]


def config(run_dir: Path, **engine: object) -> Config:
    return Config.model_validate(
        {
            "run": {"name": run_dir.name, "dir": str(run_dir.parent)},
            "policy": {"model": "unused", "dtype": "float32"},
            "prompts": {"source": "unused", "max_tokens": 64},
            "generate": {"candidates": 4, "max_tokens": 48, "engine": {"cpu_kv_cache_gib": 0.125, **engine}},
            "reward": {"url": ["http://unused"]},
        }
    )


def tokenizer() -> PreTrainedTokenizerFast:
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog"] * 20,
        trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def logps(model: Any, token_ids: list[int], start: int = 1) -> float:
    """Summed nats of tokens start … T−1, by transformers."""
    ids = torch.tensor(token_ids)
    with torch.no_grad():
        steps = model(ids[None]).logits[0].double().log_softmax(-1)
    return float(steps[start - 1 : -1].gather(1, ids[start:, None]).sum())


def write_policy(root: Path, version: int, seed: int, *, nudge: float = 0.0, **shape: object) -> Policy:
    """A policy folder with its manifest. `nudge` is added to one weight of the seed's model: another file, the same answers."""
    path = root / f"{version:04d}"
    torch.manual_seed(seed)
    settings: dict[str, object] = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 512, "initializer_range": 0.1, "tie_word_embeddings": True,
    }  # fmt: skip
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCAB, bos_token_id=1, eos_token_id=EOS, pad_token_id=0, **{**settings, **shape})
    )
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] += nudge
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=EOS, pad_token_id=0)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    write_manifest(path, version, [logps(model, ids) for ids in CANARIES])
    return Policy(version=version, path=str(path), parent=None, round=version, beta=None, reference=None)


def write_experts(path: Path, seed: int) -> Path:
    """A checkpoint with a mixture of four experts in each layer."""
    torch.manual_seed(seed)
    shape = MixtralConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=512,
        initializer_range=0.1, bos_token_id=1, eos_token_id=EOS, pad_token_id=0, sliding_window=None,
    )  # fmt: skip
    MixtralForCausalLM(shape).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def write_manifest(path: Path, version: int, canary_logps: list[float]) -> None:
    (path / folders.MANIFEST).unlink(missing_ok=True)
    manifest = policies.Manifest(
        version=version, parent=None, round=version, beta=None, reference=None, reference_sha256=None, fingerprint="",
        packages={}, update={}, files=checkpoints.hashed(path),
        canaries={"token_ids": CANARIES, "logps": canary_logps},
    )  # fmt: skip
    folders.write_json(path / folders.MANIFEST, dataclasses.asdict(manifest))


def prompts(count: int) -> list[Prompt]:
    ids = ([1, *((7 * i + 3 * j) % 250 + 3 for j in range(10 + i % 50))] for i in range(count))
    return [Prompt(prompt_id=f"p{i}", messages=[], prompt_ids=each, split="train") for i, each in enumerate(ids)]


def seed(prompt_id: str) -> int:
    """The sampling seed of a prompt; seeds use all 64 bits."""
    return (int(prompt_id[1:]) * 0x9E3779B97F4A7C15) % 2**64


def sample(generator: Generator, rows: list[Prompt], folder: Path, **settings: Any) -> list[Candidate]:
    """What the generator answers, read from the file that it writes."""
    asked, out = folder / "asked.parquet", folder / "answers.parquet"
    tables.write_rows(asked, rows, Prompt)
    shard, told = Shard(start=0, seeds=[seed(row.prompt_id) for row in rows], file=out), []
    how = {name: settings.pop(name) for name in ("candidates", "max_tokens") if name in settings}
    ask = Ask(prompts=asked, shards=[shard], **how)
    generator.sample([ask], on_shard=lambda shard, sampled: told.append(sampled), **settings)
    answers = tables.read_rows(out, Candidate)
    (sampled,) = told
    assert (sampled.rows, sampled.tokens) == (len(answers), sum(c.n_tokens for c in answers))
    return answers
