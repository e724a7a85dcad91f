"""The policy: supervised training on answers of mixed quality."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer

from selfplay.worlds.tiny.builder.examples import sft_examples
from selfplay.worlds.tiny.builder.llama import Llama, response_loss
from selfplay.worlds.tiny.builder.optimiser import Optimiser, batches
from selfplay.worlds.tiny.builder.recipe import Recipe
from selfplay.worlds.tiny.builder.tokenizer import END, encode, policy_ids, train_tokenizer
from selfplay.worlds.tiny.questions import Question

Progress = Callable[[str, int, int, dict[str, float]], None]
"""Told of a stage: its name, the steps done, the steps in all, and figures such as the loss."""


def train_policy(recipe: Recipe, rank: int, out: Path, train: Sequence[Question], report: Progress) -> Llama:
    """The policy after supervised training. The loss is on the tokens of the response and on the end of the turn."""
    examples = sft_examples(recipe, train)
    if rank == 0:
        train_tokenizer(recipe, [t for e in examples[:8000] for t in (e.prompt, e.response)], out)
    torch.distributed.barrier()
    tokenizer = Tokenizer.from_file(str(out / "policy" / "tokenizer.json"))
    torch.manual_seed(recipe.seed)
    policy = Llama(recipe.vocabulary, recipe.hidden, recipe.layers, recipe.heads, recipe.feed_forward, recipe.positions)
    prompts = policy_ids(tokenizer, [e.prompt for e in examples])
    responses = [[*ids, END] for ids in encode(tokenizer, [e.response for e in examples])]
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    plan = batches(lengths, recipe.sft_batch, random.Random(f"sft batches {recipe.seed}"))
    optimiser = Optimiser(list(policy.parameters()), recipe.sft_lr, len(plan))
    shown = 0.0
    for step, batch in enumerate(plan):
        mine = batch[rank :: recipe.workers]
        tokens = sum(len(responses[i]) for i in batch)
        loss = response_loss(policy, [prompts[i] for i in mine], [responses[i] for i in mine]) / tokens
        loss.backward()
        optimiser.step()
        shown += (loss.item() * recipe.workers - shown) / min(step + 1, 50)
        report("policy", step + 1, len(plan), {"loss": shown})
    return policy
