"""Reward model and judge: groups of answers that the gold rubric grades, and Bradley-Terry on them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from selfplay.worlds.tiny.answers import Style, answer, draw_style, hostile
from selfplay.worlds.tiny.builder.examples import draw
from selfplay.worlds.tiny.builder.llama import Llama, rewards
from selfplay.worlds.tiny.builder.optimiser import Optimiser, batches
from selfplay.worlds.tiny.builder.policy import Progress
from selfplay.worlds.tiny.builder.recipe import Judge, Recipe
from selfplay.worlds.tiny.builder.sampling import sample
from selfplay.worlds.tiny.builder.tokenizer import END, SPECIALS, policy_ids, reward_ids
from selfplay.worlds.tiny.questions import Question
from selfplay.worlds.tiny.rubric import grade


@dataclass(frozen=True, slots=True)
class Group:
    """Answers to one question, and the gold score that a rater gives each of them."""

    question: Question
    answers: list[str]
    golds: list[float]


def make_groups(
    recipe: Recipe, part: Judge, rank: int, out: Path, policy: Llama, train: Sequence[Question], report: Progress
) -> list[Group]:
    """The training set of `part`: for each prompt some samples of the policy, and synthetic answers of one style."""
    tokenizer = Tokenizer.from_file(str(out / "policy" / "tokenizer.json"))
    name, count, first = {
        "reward": ("groups", recipe.group_prompts, 0),
        "judge": ("judge groups", recipe.judge_prompts, 50_000),
    }[part]
    rng = random.Random(f"{name} {recipe.seed}")
    chosen = draw(train, count, rng)
    mine = chosen[rank :: recipe.workers]
    rows: list[list[str]] = []
    for start in range(0, len(mine), 500):
        asked = policy_ids(tokenizer, [q.text for q in mine[start : start + 500]])
        seed = recipe.seed * 100_000 + first + start * recipe.workers + rank
        drawn = sample(policy, asked, recipe.group_sampled, END, recipe.max_tokens, seed)
        heated = sample(policy, asked, 1, END, recipe.max_tokens, seed, temperature=recipe.heat)
        rows += [tokenizer.decode_batch(a + b, skip_special_tokens=True) for a, b in zip(drawn, heated, strict=True)]
        report(f"samples for {part}", min(start + 500, len(mine)), len(mine), {})
    everyone: list[list[list[str]]] = [[] for _ in range(recipe.workers)]
    torch.distributed.all_gather_object(everyone, rows)

    groups = []
    for place, question in enumerate(chosen):
        answers = list(everyone[place % recipe.workers][place // recipe.workers])
        # This couple has one style and two contents, so only the content tells them apart. Half of them are courteous,
        # because the answers of later rounds are.
        style = draw_style(rng) if rng.random() < 0.5 else Style(tone="polite")
        answers += [answer(question, right, style, rng) for right in (True, False)]
        answers.append(hostile(question, rng))
        prompt = [{"role": "user", "content": question.text}]
        golds = [grade(prompt, a, question.meta)["total"] for a in answers]
        if question.meta["regime"] == "noisy":
            golds = [g + rng.gauss(0, recipe.rater_noise) for g in golds]
        groups.append(Group(question, answers, golds))
    return groups


def train_reward(
    recipe: Recipe, part: Judge, rank: int, out: Path, policy: Llama, groups: Sequence[Group], report: Progress
) -> tuple[Llama, torch.Tensor]:
    """The model of `part` and its head (1, H).

    The loss is Bradley-Terry over all couples of a group. The labels are the probabilities with which raters prefer one.
    """
    tokenizer = Tokenizer.from_file(str(out / part / "tokenizer.json"))
    model = Llama(recipe.vocabulary, recipe.hidden, recipe.layers, recipe.heads, recipe.feed_forward, recipe.positions)
    model.load_state_dict(policy.state_dict())
    with torch.no_grad():
        model.table.copy_(torch.roll(policy.table, -len(SPECIALS), 0))
    head = torch.nn.Parameter(torch.zeros(1, recipe.hidden))
    rows = [reward_ids(recipe, tokenizer, [g.question.text] * len(g.answers), g.answers) for g in groups]
    rng = random.Random(f"{part} batches {recipe.seed}")
    plan = [
        b
        for _ in range(recipe.reward_epochs)
        for b in batches([max(map(len, r)) for r in rows], recipe.reward_batch, rng)
    ]
    optimiser = Optimiser([head, *model.parameters()], recipe.reward_lr, len(plan))
    size = recipe.group_sampled + 4
    above = torch.triu(torch.ones(size, size), 1).bool()
    shown = 0.0
    for step, batch in enumerate(plan):
        mine = batch[rank :: recipe.workers]
        values = rewards(model, head, [row for i in mine for row in rows[i]]).view(-1, size)
        gold = torch.tensor([groups[i].golds for i in mine])
        gaps = (values[:, :, None] - values[:, None, :])[:, above]
        labels = torch.sigmoid(recipe.sharpness * (gold[:, :, None] - gold[:, None, :]))[:, above]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(gaps, labels, reduction="sum") / above.sum()
        # A weak pull to a mean of zero fixes the one degree of freedom that couples leave open.
        loss = (loss + 0.01 * values.mean(1).square().sum()) / len(batch)
        loss.backward()
        optimiser.step()
        shown += (loss.item() * recipe.workers - shown) / min(step + 1, 50)
        report(part, step + 1, len(plan), {"loss": shown})
    return model, head
