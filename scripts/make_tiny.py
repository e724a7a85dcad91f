"""Builds the tiny world: a policy and a reward model from scratch, train and held-out prompts. No downloads.

    python scripts/make_tiny.py [--out .cache/tiny] [--size full|mini] [--seed 0]

1. prompts: the questions of `selfplay.tiny`, split by a hash of their text;
2. policy: a byte-level BPE and a Llama of about 1 M parameters, trained on answers of mixed quality;
3. samples: that policy answers train prompts, the gold rubric grades the answers;
4. reward: a sequence classifier on the policy's body, Bradley-Terry on graded groups of answers;
5. what came out is measured on held-out prompts and written to world.json.

Two worker processes of one thread each share every step (gloo, gradients summed over the two), whatever the machine
has, so the result depends on the recipe alone. The world lies under a hash of the recipe (constants, seed, source,
library versions): the same call again returns at once. It is written beside and renamed; `current` points to it.
"""

import argparse
import ast
import ctypes
import hashlib
import importlib.metadata
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from selfplay import tiny

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

WORKERS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that the world depends on, the sources and library versions apart."""

    seed: int = 0
    scale: float = 1.0
    """Multiplies how many prompts each skill has."""
    vocabulary: int = 1024
    hidden: int = 128
    layers: int = 2
    heads: int = 4
    feed_forward: int = 768
    positions: int = 512
    sft_examples: int = 40_000
    sft_batch: int = 24
    sft_lr: float = 5e-3
    group_prompts: int = 4_000
    """Prompts of the reward model's training set, each with a group of answers."""
    group_sampled: int = 3
    """Answers of a group that the policy sampled; two synthetic ones of one style but different content are added."""
    reward_batch: int = 12
    """Groups per optimizer step."""
    reward_epochs: int = 1
    reward_lr: float = 1e-3
    sharpness: float = 12.0
    """Nats of preference per unit of gold: P(a over b) = σ(sharpness · (gold_a − gold_b))."""
    rater_noise: float = 0.25
    """Standard deviation of what a rater adds to the gold of an answer about taste."""
    max_tokens: int = 48


SIZES = {
    "full": Recipe(),
    "mini": Recipe(
        scale=0.15,
        hidden=64,
        heads=2,
        feed_forward=256,
        sft_examples=12_000,
        group_prompts=600,
        reward_lr=2e-3,
        sft_lr=6e-3,
    ),
}

SPECIALS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
PAD, END, USER, ASSISTANT, SYSTEM = range(len(SPECIALS))
POLICY_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
REWARD_SPECIALS = ("[none]", "[score]", "[question]", "[answer]", "[system]")
"""The reward model's own names for them; they lie at the end of its vocabulary, so its ids are not the policy's."""
REWARD_TEMPLATE = (
    "{% for m in messages %}"
    "{{ '[answer]' if m['role'] == 'assistant' else '[system]' if m['role'] == 'system' else '[question]' }}{{ m['content'] }}"
    "{% endfor %}{% if not add_generation_prompt %}[score]{% endif %}"
)


def recipe_hash(recipe: Recipe) -> str:
    """Hash of all that the world is made from; comments and layout of the sources do not count."""
    sources = [ast.dump(ast.parse(Path(path).read_text(encoding="utf-8"))) for path in (__file__, str(tiny.__file__))]
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers")}
    text = json.dumps([asdict(recipe), versions, sources], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------ data (no torch)


@dataclass(frozen=True, slots=True)
class Example:
    """One supervised answer."""

    prompt: str
    response: str


def split(recipe: Recipe) -> tuple[list[tiny.Question], list[tiny.Question]]:
    """(train, held-out) questions."""
    every = tiny.questions(recipe.seed, recipe.scale)
    return [q for q in every if not tiny.held_out(q.text)], [q for q in every if tiny.held_out(q.text)]


def draw(questions: Sequence[tiny.Question], n: int, rng: random.Random) -> list[tiny.Question]:
    """`n` questions, the skills weighted by the square root of their size, so that small ones are learnt too."""
    by_skill: dict[str, list[tiny.Question]] = {}
    for question in questions:
        by_skill.setdefault(question.meta["skill"], []).append(question)
    weights = [len(members) ** 0.5 for members in by_skill.values()]
    return [rng.choice(members) for members in rng.choices(list(by_skill.values()), weights, k=n)]


def sft_examples(recipe: Recipe, train: Sequence[tiny.Question]) -> list[Example]:
    """Answers of mixed quality: right with the fact's own frequency, in a style that does not depend on it."""
    rng = random.Random(f"sft {recipe.seed}")
    return [
        Example(q.text, tiny.answer(q, rng.random() < q.common, tiny.draw_style(rng), rng))
        for q in draw(train, recipe.sft_examples, rng)
    ]


def write_prompts(out: Path, train: Sequence[tiny.Question], held_out: Sequence[tiny.Question], seed: int) -> None:
    rng = random.Random(f"order {seed}")
    for name, questions, with_meta in (("train", train, False), ("heldout", held_out, True)):
        rows = [
            {"messages": [{"role": "user", "content": q.text}]} | ({"meta": q.meta} if with_meta else {})
            for q in questions
        ]
        rng.shuffle(rows)
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------ tokenizers


def train_tokenizer(recipe: Recipe, texts: Sequence[str], out: Path) -> None:
    """Writes the policy's tokenizer to out/policy and the reward model's, the same merges under other ids, to out/reward."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == recipe.vocabulary

    moved = json.loads(tokenizer.to_str())
    vocabulary = {token: i - len(SPECIALS) for token, i in moved["model"]["vocab"].items() if i >= len(SPECIALS)}
    first = recipe.vocabulary - len(SPECIALS)
    vocabulary |= {token: first + i for i, token in enumerate(REWARD_SPECIALS)}
    moved["model"]["vocab"] = vocabulary
    for i, entry in enumerate(moved["added_tokens"]):
        entry |= {"id": first + i, "content": REWARD_SPECIALS[i]}

    for part, inner, names, template in (
        ("policy", tokenizer, SPECIALS, POLICY_TEMPLATE),
        ("reward", Tokenizer.from_str(json.dumps(moved)), REWARD_SPECIALS, REWARD_TEMPLATE),
    ):
        fast = PreTrainedTokenizerFast(
            tokenizer_object=inner,
            pad_token=names[PAD],
            eos_token=names[END],
            clean_up_tokenization_spaces=False,
            model_max_length=recipe.positions,
            padding_side="right",
        )
        fast.chat_template = template
        fast.save_pretrained(out / part)


def policy_ids(tokenizer: "PreTrainedTokenizerFast", prompts: Sequence[str]) -> list[list[int]]:
    """The rendered prompts, as the chat template has them."""
    return [[USER, *ids, END, ASSISTANT] for ids in tokenizer(list(prompts), add_special_tokens=False)["input_ids"]]


def reward_ids(
    recipe: Recipe, tokenizer: "PreTrainedTokenizerFast", prompts: Sequence[str], responses: Sequence[str]
) -> list[list[int]]:
    """The rendered conversations, as the reward model's chat template has them."""
    first = recipe.vocabulary - len(SPECIALS)
    asked = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    said = tokenizer(list(responses), add_special_tokens=False)["input_ids"]
    return [[first + USER, *a, first + ASSISTANT, *b, first + END] for a, b in zip(asked, said, strict=True)]


# -------------------------------------------------------------------------------------------- the two workers


def padded(rows: Sequence[Sequence[int]], fill: int) -> "torch.Tensor":
    """(B, T) of the rows, filled on the right."""
    import torch

    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


def batches(lengths: Sequence[int], size: int, rng: random.Random) -> list[list[int]]:
    """Indices in batches of `size` items of about one length, in random order; what is left over is dropped."""
    order = list(range(len(lengths)))
    rng.shuffle(order)
    pool = size * 16
    made = []
    for start in range(0, len(order), pool):
        near = sorted(order[start : start + pool], key=lambda i: lengths[i])
        made += [near[i : i + size] for i in range(0, len(near) - size + 1, size)]
    rng.shuffle(made)
    return made


class Optimiser:
    """AdamW under a schedule (warm-up, then linear to zero), gradients summed over the workers in one flat buffer."""

    def __init__(self, parameters: "Sequence[torch.nn.Parameter]", lr: float, steps: int) -> None:
        import torch

        self.parameters = list(parameters)
        self.flat = torch.zeros(sum(p.numel() for p in self.parameters))
        start = 0
        for p in self.parameters:
            p.grad = self.flat[start : start + p.numel()].view_as(p)
            start += p.numel()
        self.inner = torch.optim.AdamW(self.parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
        warm = max(1, steps // 20)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.inner, lambda step: min((step + 1) / warm, max(0.0, (steps - step) / (steps - warm)))
        )

    def step(self) -> None:
        import torch

        torch.distributed.all_reduce(self.flat)
        norm = self.flat.norm()
        if norm > 1.0:
            self.flat.mul_(1.0 / norm)
        self.inner.step()
        self.schedule.step()
        self.flat.zero_()


Progress = Callable[[str, int, int, dict[str, float]], None]


def train_policy(recipe: Recipe, rank: int, out: Path, train: Sequence[tiny.Question], report: Progress) -> Any:
    """The policy after supervised training; the loss is on response tokens and the turn's end."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    examples = sft_examples(recipe, train)
    if rank == 0:
        train_tokenizer(recipe, [t for e in examples[:8000] for t in (e.prompt, e.response)], out)
    torch.distributed.barrier()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "policy")
    torch.manual_seed(recipe.seed)
    policy = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=recipe.vocabulary,
            hidden_size=recipe.hidden,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            intermediate_size=recipe.feed_forward,
            max_position_embeddings=recipe.positions,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=END,
            pad_token_id=PAD,
            initializer_range=0.05,
            dtype="float32",
        )
    )
    prompts = policy_ids(tokenizer, [e.prompt for e in examples])
    responses = [
        [*ids, END] for ids in tokenizer([e.response for e in examples], add_special_tokens=False)["input_ids"]
    ]
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    plan = batches(lengths, recipe.sft_batch, random.Random(f"sft batches {recipe.seed}"))
    optimiser = Optimiser(list(policy.parameters()), recipe.sft_lr, len(plan))
    policy.train()
    shown = 0.0
    for step, batch in enumerate(plan):
        mine = batch[rank::WORKERS]
        ids = padded([prompts[i] + responses[i] for i in mine], PAD)
        targets = padded([[-100] * len(prompts[i]) + responses[i] for i in mine], -100)[:, 1:]
        tokens = sum(len(responses[i]) for i in batch)
        hidden = policy.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        wanted = targets >= 0
        loss = (
            torch.nn.functional.cross_entropy(policy.lm_head(hidden[wanted]), targets[wanted], reduction="sum") / tokens
        )
        loss.backward()
        optimiser.step()
        shown += (loss.item() * WORKERS - shown) / min(step + 1, 50)
        report("policy", step + 1, len(plan), {"loss": shown})
    policy.eval()
    return policy


def sample(
    policy: Any, prompts: Sequence[Sequence[int]], k: int, seed: int, max_tokens: int, limit: int = 512
) -> list[list[list[int]]]:
    """`k` samples at temperature 1 for each rendered prompt, the end token included where it was sampled.

    Prompts of one length are sampled together, so nothing is padded; rows that have ended leave the batch.
    """
    import torch

    by_length: dict[int, list[int]] = {}
    for i, row in enumerate(prompts):
        by_length.setdefault(len(row), []).append(i)
    generator = torch.Generator().manual_seed(seed)
    answers: list[list[list[int]]] = [[[] for _ in range(k)] for _ in prompts]
    with torch.inference_mode():
        for members in by_length.values():
            for start in range(0, len(members), max(1, limit // k)):
                chunk = members[start : start + max(1, limit // k)]
                cells = [(i, j) for i in chunk for j in range(k)]
                state = policy(
                    input_ids=torch.tensor([list(prompts[i]) for i in chunk]), use_cache=True, logits_to_keep=1
                )
                cache = state.past_key_values
                cache.batch_repeat_interleave(k)
                logits = state.logits[:, -1].repeat_interleave(k, 0)
                for n in range(max_tokens):
                    drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
                    for (i, j), token in zip(cells, drawn[:, 0].tolist(), strict=True):
                        answers[i][j].append(token)
                    keep = (drawn[:, 0] != END).nonzero()[:, 0]
                    if len(keep) == 0 or n + 1 == max_tokens:
                        break
                    if len(keep) < len(cells):
                        cells = [cells[i] for i in keep.tolist()]
                        cache.batch_select_indices(keep)
                        drawn = drawn[keep]
                    logits = policy(input_ids=drawn, past_key_values=cache, use_cache=True).logits[:, -1]
    return answers


@dataclass(frozen=True, slots=True)
class Group:
    """Answers to one question and the gold, as a rater sees it, of each."""

    question: tiny.Question
    answers: list[str]
    golds: list[float]


def make_groups(
    recipe: Recipe, rank: int, out: Path, policy: Any, train: Sequence[tiny.Question], report: Progress
) -> list[Group]:
    """The reward model's training set: per prompt some of the policy's samples, and synthetic answers of matched style."""
    import torch
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "policy")
    rng = random.Random(f"groups {recipe.seed}")
    chosen = draw(train, recipe.group_prompts, rng)
    mine = chosen[rank::WORKERS]
    rows: list[list[str]] = []
    for start in range(0, len(mine), 500):
        part = policy_ids(tokenizer, [q.text for q in mine[start : start + 500]])
        drawn = sample(
            policy, part, recipe.group_sampled, recipe.seed * 1000 + start * WORKERS + rank, recipe.max_tokens
        )
        rows += [[tokenizer.decode(ids, skip_special_tokens=True) for ids in answers] for answers in drawn]
        report("samples", min(start + 500, len(mine)), len(mine), {})
    everyone: list[list[list[str]]] = [[] for _ in range(WORKERS)]
    torch.distributed.all_gather_object(everyone, rows)

    groups = []
    for place, question in enumerate(chosen):
        answers = list(everyone[place % WORKERS][place // WORKERS])
        # One style, two contents: what separates this couple is the content alone. Later rounds are courteous.
        style = tiny.draw_style(rng) if rng.random() < 0.5 else tiny.Style(tone="polite")
        answers += [tiny.answer(question, right, style, rng) for right in (True, False)]
        if rng.random() < 0.05:
            answers[-1] = rng.choice(("", "Yes.", "Sure! Sure! Sure!", question.text, answers[0] + " " + answers[1]))
        prompt = [{"role": "user", "content": question.text}]
        golds = [tiny.grade(prompt, a, question.meta)["total"] for a in answers]
        if question.meta["regime"] == "noisy":
            golds = [g + rng.gauss(0, recipe.rater_noise) for g in golds]
        groups.append(Group(question, answers, golds))
    return groups


def score(model: Any, rows: Sequence[Sequence[int]], none: int, size: int = 128) -> list[float]:
    """Rewards of rendered conversations."""
    import torch

    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    rewards = [0.0] * len(rows)
    with torch.inference_mode():
        for start in range(0, len(order), size):
            chunk = order[start : start + size]
            values = pooled(model, [rows[i] for i in chunk], none)
            for i, value in zip(chunk, values.tolist(), strict=True):
                rewards[i] = value
    return rewards


def pooled(model: Any, rows: Sequence[Sequence[int]], none: int) -> "torch.Tensor":
    """(B,) rewards: the head on the last token of each row, as LlamaForSequenceClassification has it."""
    import torch

    last = torch.tensor([len(row) - 1 for row in rows])
    hidden = model.model(input_ids=padded(rows, none), use_cache=False).last_hidden_state
    return model.score(hidden[torch.arange(len(rows)), last])[:, 0]


def train_reward(recipe: Recipe, rank: int, out: Path, policy: Any, groups: Sequence[Group], report: Progress) -> Any:
    """Bradley-Terry over all couples of a group, with the raters' probabilities as soft labels."""
    import torch
    from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "reward")
    first = recipe.vocabulary - len(SPECIALS)
    config = type(policy.config)(
        **{
            **policy.config.to_dict(),
            "num_labels": 1,
            "tie_word_embeddings": False,
            "eos_token_id": first + END,
            "pad_token_id": first + PAD,
        }
    )
    torch.manual_seed(recipe.seed + 1)
    model = LlamaForSequenceClassification(config)
    body = {name: value.clone() for name, value in policy.model.state_dict().items()}
    table = body["embed_tokens.weight"]
    body["embed_tokens.weight"] = torch.cat([table[len(SPECIALS) :], table[: len(SPECIALS)]])
    model.model.load_state_dict(body)
    torch.nn.init.zeros_(model.score.weight)

    rows = [reward_ids(recipe, tokenizer, [g.question.text] * len(g.answers), g.answers) for g in groups]
    rng = random.Random(f"reward batches {recipe.seed}")
    plan = [
        b
        for _ in range(recipe.reward_epochs)
        for b in batches([max(map(len, r)) for r in rows], recipe.reward_batch, rng)
    ]
    optimiser = Optimiser([p for p in model.parameters()], recipe.reward_lr, len(plan))
    model.train()
    size = recipe.group_sampled + 2
    ones = torch.triu(torch.ones(size, size), 1).bool()
    shown = 0.0
    for step, batch in enumerate(plan):
        mine = batch[rank::WORKERS]
        values = pooled(model, [row for i in mine for row in rows[i]], first + PAD).view(-1, size)
        gold = torch.tensor([groups[i].golds for i in mine])
        gaps = (values[:, :, None] - values[:, None, :])[:, ones]
        labels = torch.sigmoid(recipe.sharpness * (gold[:, :, None] - gold[:, None, :]))[:, ones]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(gaps, labels, reduction="sum")
        # A weak pull to a mean reward of zero fixes the one degree of freedom that couples leave open.
        loss = (loss / ones.sum() + 0.01 * values.mean(1).square().sum()) / recipe.reward_batch
        loss.backward()
        optimiser.step()
        shown += (loss.item() * WORKERS - shown) / min(step + 1, 50)
        report("reward", step + 1, len(plan), {"loss": shown})
    model.eval()
    return model


def measure(
    recipe: Recipe, out: Path, policy: Any, reward: Any, held_out: Sequence[tiny.Question], k: int
) -> dict[str, Any]:
    """Statistics on held-out prompts: the policy's gold by part and skill, and how well the reward ranks its samples."""
    from transformers import PreTrainedTokenizerFast

    mine, theirs = (PreTrainedTokenizerFast.from_pretrained(out / part) for part in ("policy", "reward"))
    drawn = sample(policy, policy_ids(mine, [q.text for q in held_out]), k, recipe.seed + 7, recipe.max_tokens)
    pairs: dict[str, list[int]] = {"total": [], "content": []}
    parts: dict[str, float] = dict.fromkeys(("total", *tiny.WEIGHTS), 0.0)
    skills: dict[str, list[float]] = {}
    tokens = ended = 0
    for question, answers in zip(held_out, drawn, strict=True):
        texts = [mine.decode(ids, skip_special_tokens=True) for ids in answers]
        rewards = score(reward, reward_ids(recipe, theirs, [question.text] * k, texts), theirs.pad_token_id)
        golds = [tiny.grade([{"role": "user", "content": question.text}], t, question.meta) for t in texts]
        for name in parts:
            parts[name] += sum(g[name] for g in golds) / k / len(held_out)
        skills.setdefault(question.meta["skill"], []).append(sum(g["content"] for g in golds) / k)
        tokens += sum(map(len, answers))
        ended += sum(ids[-1] == END for ids in answers)
        for a in range(k):
            for b in range(a):
                for name, agrees in pairs.items():
                    if abs(golds[a][name] - golds[b][name]) > 0.02:
                        agrees.append((rewards[a] > rewards[b]) == (golds[a][name] > golds[b][name]))
    n = len(held_out) * k
    return {
        "gold": {name: round(value, 4) for name, value in parts.items()},
        "content_by_skill": {name: round(sum(v) / len(v), 3) for name, v in sorted(skills.items())},
        "tokens_per_response": round(tokens / n, 2),
        "ended_share": round(ended / n, 4),
        "reward_accuracy": {name: round(sum(v) / max(1, len(v)), 4) for name, v in pairs.items()},
    }


def work(recipe: Recipe, rank: int, out: Path) -> None:
    """One worker. Progress goes to standard output as JSON lines, from the first worker only."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the script
    import torch

    torch.set_num_threads(1)
    last = {"stage": "", "when": 0.0}

    def report(stage: str, done: int, total: int, figures: dict[str, float]) -> None:
        now = time.monotonic()
        if rank == 0 and (done == total or stage != last["stage"] or now - float(last["when"]) > 0.5):
            last.update(stage=stage, when=now)
            print(json.dumps({"stage": stage, "done": done, "total": total} | figures), flush=True)

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{out / 'rendezvous'}", rank=rank, world_size=WORKERS
    )
    train, held_out = split(recipe)
    seconds: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        wall, cpu = time.monotonic(), time.process_time()
        result = call()
        seconds[name] = [round(time.monotonic() - wall, 1), round(time.process_time() - cpu, 1)]
        return result

    policy = timed("policy", lambda: train_policy(recipe, rank, out, train, report))
    groups = timed("samples", lambda: make_groups(recipe, rank, out, policy, train, report))
    reward = timed("reward", lambda: train_reward(recipe, rank, out, policy, groups, report))
    if rank == 0:
        import transformers

        write_prompts(out, train, held_out, recipe.seed)
        policy.generation_config = transformers.GenerationConfig(
            do_sample=True, temperature=1.0, eos_token_id=END, pad_token_id=PAD, max_new_tokens=recipe.max_tokens
        )
        policy.save_pretrained(out / "policy")
        reward.save_pretrained(out / "reward")
        found = timed(
            "measure", lambda: measure(recipe, out, policy, reward, held_out[:: max(1, len(held_out) // 200)], 4)
        )
        found |= {
            "parameters": {"policy": policy.num_parameters(), "reward": reward.num_parameters()},
            "prompts": {"train": len(train), "heldout": len(held_out)},
            "seconds": {name: {"wall": wall, "cpu_of_one_worker": cpu} for name, (wall, cpu) in seconds.items()},
        }
        (out / "measured.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


# -------------------------------------------------------------------------------------------------- the script


def lines(process: "subprocess.Popen[str]") -> Iterator[dict[str, Any]]:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            yield json.loads(line)


def show(events: Iterator[dict[str, Any]]) -> None:
    """Progress: a bar for each stage on a terminal, otherwise a plain line at each stage's start and end."""
    if sys.stdout.isatty():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description:<8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns) as bars:
            known: dict[str, Any] = {}
            for event in events:
                stage = event["stage"]
                if stage not in known:
                    known[stage] = bars.add_task(stage, total=event["total"], note="")
                note = f"loss {event['loss']:.3f}" if "loss" in event else ""
                bars.update(known[stage], completed=event["done"], note=note)
        return
    started = time.monotonic()
    for event in events:
        if event["done"] == event["total"]:
            note = f", loss {event['loss']:.3f}" if "loss" in event else ""
            print(
                f"  {event['stage']}: {event['total']} of {event['total']}{note} ({time.monotonic() - started:.0f} s)",
                flush=True,
            )


def build(recipe: Recipe, target: Path) -> None:
    """Runs the workers and renames what they made to `target`. Raises RuntimeError when one of them fails."""
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "GLOO_SOCKET_IFNAME": "lo"}
    order = json.dumps(asdict(recipe))
    workers: list[subprocess.Popen[str]] = []
    wall = time.monotonic()
    try:
        for rank in range(WORKERS):
            with (partial / f"worker{rank}.log").open("w") as log:
                command = [sys.executable, __file__, "--worker", str(rank), "--recipe", order, "--out", str(partial)]
                pipe = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
                workers.append(subprocess.Popen(command, stdout=pipe, stderr=log, env=environment, text=True))
        show(lines(workers[0]))
        codes = [worker.wait(timeout=60) for worker in workers]
        if any(codes):
            logs = "\n".join((partial / f"worker{rank}.log").read_text()[-2000:] for rank in range(WORKERS))
            raise RuntimeError(f"a worker of the tiny world failed (exit codes {codes}):\n{logs}")
        cpu = sum(os.times()[2:4])
        measured = json.loads((partial / "measured.json").read_text())
        world = {
            "hash": target.name,
            "recipe": asdict(recipe),
            "measured": measured,
            "wall_seconds": round(time.monotonic() - wall, 1),
        }
        (partial / "world.json").write_text(
            json.dumps(world | {"cpu_seconds": round(cpu, 1)}, indent=2) + "\n", encoding="utf-8"
        )
        for name in ("measured.json", "rendezvous", "worker0.log", "worker1.log"):
            (partial / name).unlink(missing_ok=True)
        partial.rename(target)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
        shutil.rmtree(partial, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Build the tiny world: policy, reward model, prompts. Cached by its recipe."
    )
    parser.add_argument(
        "--out", type=Path, default=Path(".cache/tiny"), help="folder of the worlds (default: .cache/tiny)"
    )
    parser.add_argument("--size", choices=sorted(SIZES), default="full", help="full (the demo) or mini (the tests)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default: 0)")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--recipe", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(Recipe(**json.loads(options.recipe)), options.worker, options.out)
        return 0
    recipe = replace(SIZES[options.size], seed=options.seed)
    name = recipe_hash(recipe)
    target = options.out.resolve() / name
    if (target / "world.json").exists():
        print(f"tiny world {name} is there already: {target}")
    else:
        print(
            f"building the tiny world {name} (size {options.size}, seed {options.seed}) with {WORKERS} processes",
            flush=True,
        )
        build(recipe, target)
        world = json.loads((target / "world.json").read_text())
        print(f"built in {world['wall_seconds']:.0f} s ({world['cpu_seconds']:.0f} CPU seconds): {target}")
    link = options.out.resolve() / f".current.{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    link.rename(options.out.resolve() / "current")
    return 0


if __name__ == "__main__":
    sys.exit(main())
