"""A reward model small enough to build in each test run: random weights, its own tokenizer, its own chat template.

Only who builds one imports torch: tests of servers that have none are done before it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEXTS = [
    "Name three colours. Red, green and blue are three colours that most people know.",
    "What is the capital of France? The capital of France is Paris, a city on the Seine.",
    "user assistant system: please sort the numbers 3, 1 and 2. Sorted: 1, 2, 3.\n\nThank you, that is right!",
]
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
)
CONTROL = ["<|begin_of_text|>", "<|pad|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def tokenizer_with(template: str | None = HEADERS, *, plain_tokens: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE with Llama 3's turn tokens; `plain_tokens` are added without being special."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS * 20, trainers.BpeTrainer(vocab_size=420, special_tokens=CONTROL, initial_alphabet=alphabet)
    )
    backend.add_tokens([AddedToken(t, special=False, normalized=True) for t in plain_tokens])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=CONTROL[0],
        pad_token=CONTROL[1],
        eos_token=CONTROL[4],
        chat_template=template,
        model_max_length=256,
    )


def reward_model(
    folder: Path, *, seed: int = 0, labels: int = 1, template: str | None = HEADERS, **config: Any
) -> Path:
    """A LlamaForSequenceClassification in `folder`. `config` overrides its configuration."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = tokenizer_with(template)
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "num_labels": labels,
        "initializer_range": 0.3,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model = LlamaForSequenceClassification(LlamaConfig(**(settings | config)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def conversation(i: int, words: int) -> tuple[list[dict[str, str]], str]:
    """A deterministic conversation whose response has `words` words."""
    vocabulary = " ".join(TEXTS).split()
    response = " ".join(vocabulary[(7 * i + 3 * w) % len(vocabulary)] for w in range(words))
    return [{"role": "user", "content": f"Question {i}: what is the capital of France?"}], response


def bare_scores(folder: Path, items: Sequence[tuple[Any, ...]]) -> list[float]:
    """The same scores by transformers alone: one conversation at a time, no padding."""
    import torch
    from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    scores = []
    for messages, response, *_ in items:
        turns = [*messages, {"role": "assistant", "content": response}]
        ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        with torch.inference_mode():
            scores.append(model(input_ids=torch.tensor([ids])).logits.item())
    return scores


@contextmanager
def serving(
    folder: Path, *options: str, env: dict[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A real server process, and its line of readiness. It has ended when the block ends."""
    with process_of("--model", str(folder), *options, env=env) as found:
        yield found


@contextmanager
def serving_rules(path: Path) -> Iterator[str]:
    """The address of a server of the rules in a file."""
    with process_of("--rules", str(path)) as (_, line):
        yield str(line["url"])


@contextmanager
def process_of(
    *options: str, env: dict[str, str] | None = None
) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    with subprocess.Popen(
        [sys.executable, "-m", "reward.server", "--port", "0", *options],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
    ) as process:
        try:
            assert process.stdout is not None
            yield process, json.loads(process.stdout.readline())
        finally:
            process.kill()
