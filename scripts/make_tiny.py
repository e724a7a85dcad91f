"""Builds the tiny world: a policy and a reward model from scratch, train and held-out prompts. No downloads.

    python scripts/make_tiny.py [--out .cache/tiny] [--size full|mini] [--seed 0]

1. prompts: the questions of `selfplay.worlds.tiny`, split by a hash of their text;
2. policy: a byte-level BPE and a Llama of about 1 M parameters, trained on answers of mixed quality;
3. samples: that policy answers train prompts, the gold rubric grades the answers;
4. reward: a sequence classifier on the policy's body, Bradley-Terry on graded groups of answers;
5. judge: another one for the gate, of fewer groups, drawn and answered under other seeds and graded by other raters;
6. what came out is measured on held-out prompts and written to world.json.

Two worker processes of one thread each (one for the miniature) share every step (gloo, gradients summed over the two),
whatever the machine has, so the result depends on the recipe alone. The world lies under a hash of the recipe (constants, seed, source,
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
from typing import TYPE_CHECKING, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from selfplay.worlds import tiny

if TYPE_CHECKING:
    import torch
    from tiny_llama import Llama
    from tokenizers import Tokenizer

SOURCES = (Path(__file__), Path(__file__).with_name("tiny_llama.py"), Path(tiny.__file__))


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that the world depends on, the sources and library versions apart."""

    seed: int = 0
    workers: int = 2
    """Processes that share each step: part of the recipe, since sums over them round differently."""
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
    group_prompts: int = 5_000
    """Prompts of the reward model's training set, each with a group of answers."""
    group_sampled: int = 2
    """Answers of a group that the policy sampled, one more at a higher temperature; a hostile one and two synthetic ones
    of one style but different content are added."""
    heat: float = 1.4
    """Temperature of that one: a policy under optimisation strays from what it samples at 1."""
    judge_prompts: int = 4_000
    """The same for the judge, whose groups are its own."""
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
        workers=1,
        scale=0.15,
        hidden=64,
        heads=2,
        feed_forward=256,
        sft_examples=12_000,
        sft_lr=8e-3,
        group_prompts=900,
        judge_prompts=600,
        reward_lr=2e-3,
    ),
}

SPECIALS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
PAD, END, USER, ASSISTANT, SYSTEM = range(len(SPECIALS))
POLICY_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
Judge = Literal["reward", "judge"]
"""The model that trains and the one that judges at the gate: all that is random in one has nothing to do with the other."""
REWARD_SPECIALS = ("[none]", "[score]", "[question]", "[answer]", "[system]")
"""The reward model's own names for them; they lie at the end of its vocabulary, so its ids are not the policy's."""
REWARD_TEMPLATE = (
    "{% for m in messages %}"
    "{{ '[answer]' if m['role'] == 'assistant' else '[system]' if m['role'] == 'system' else '[question]' }}{{ m['content'] }}"
    "{% endfor %}{% if not add_generation_prompt %}[score]{% endif %}"
)


JUDGES: tuple[Judge, ...] = ("reward", "judge")


def recipe_hash(recipe: Recipe) -> str:
    """Hash of all that the world is made from; comments and layout of the sources do not count."""
    sources = [ast.dump(ast.parse(path.read_text(encoding="utf-8"))) for path in SOURCES]
    versions = {name: importlib.metadata.version(name) for name in ("torch", "tokenizers")}
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
    """Writes the policy's tokenizer to out/policy and that of reward model and judge, the same merges under other ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

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
    assert tokenizer.get_vocab_size() <= recipe.vocabulary

    moved = json.loads(tokenizer.to_str())
    vocabulary = {token: i - len(SPECIALS) for token, i in moved["model"]["vocab"].items() if i >= len(SPECIALS)}
    first = reward_first(recipe)
    vocabulary |= {token: first + i for i, token in enumerate(REWARD_SPECIALS)}
    moved["model"]["vocab"] = vocabulary
    for i, entry in enumerate(moved["added_tokens"]):
        entry |= {"id": first + i, "content": REWARD_SPECIALS[i]}

    for part, names, content, template in (
        ("policy", SPECIALS, json.loads(tokenizer.to_str()), POLICY_TEMPLATE),
        *((part, REWARD_SPECIALS, moved, REWARD_TEMPLATE) for part in JUDGES),
    ):
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": names[PAD],
            "eos_token": names[END],
            "model_max_length": recipe.positions,
            "padding_side": "right",
            "clean_up_tokenization_spaces": False,
        }
        (out / part).mkdir(exist_ok=True)
        (out / part / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
        (out / part / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        (out / part / "chat_template.jinja").write_text(template, encoding="utf-8")


def reward_first(recipe: Recipe) -> int:
    """The id of the first special token of the reward model: they close its vocabulary, the policy's open its own."""
    return recipe.vocabulary - len(SPECIALS)


def encode(tokenizer: "Tokenizer", texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def policy_ids(tokenizer: "Tokenizer", prompts: Sequence[str]) -> list[list[int]]:
    """The rendered prompts, as the policy's chat template has them."""
    return [[USER, *ids, END, ASSISTANT] for ids in encode(tokenizer, prompts)]


def reward_ids(
    recipe: Recipe, tokenizer: "Tokenizer", prompts: Sequence[str], responses: Sequence[str]
) -> list[list[int]]:
    """The rendered conversations, as the reward model's chat template has them."""
    first = reward_first(recipe)
    asked, said = encode(tokenizer, prompts), encode(tokenizer, responses)
    return [[first + USER, *a, first + ASSISTANT, *b, first + END] for a, b in zip(asked, said, strict=True)]


# -------------------------------------------------------------------------------------------- the two workers


Progress = Callable[[str, int, int, dict[str, float]], None]


def train_policy(recipe: Recipe, rank: int, out: Path, train: Sequence[tiny.Question], report: Progress) -> "Llama":
    """The policy after supervised training; the loss is on response tokens and the turn's end."""
    import torch
    from tiny_llama import Llama, Optimiser, batches, response_loss
    from tokenizers import Tokenizer

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


@dataclass(frozen=True, slots=True)
class Group:
    """Answers to one question and the gold, as a rater sees it, of each."""

    question: tiny.Question
    answers: list[str]
    golds: list[float]


def make_groups(
    recipe: Recipe, part: Judge, rank: int, out: Path, policy: "Llama", train: Sequence[tiny.Question], report: Progress
) -> list[Group]:
    """The training set of `part`: per prompt some of the policy's samples, and synthetic answers of matched style."""
    import torch
    from tiny_llama import sample
    from tokenizers import Tokenizer

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
        # One style, two contents: what separates this couple is the content alone. Later rounds are courteous.
        style = tiny.draw_style(rng) if rng.random() < 0.5 else tiny.Style(tone="polite")
        answers += [tiny.answer(question, right, style, rng) for right in (True, False)]
        answers.append(tiny.hostile(question, rng))
        prompt = [{"role": "user", "content": question.text}]
        golds = [tiny.grade(prompt, a, question.meta)["total"] for a in answers]
        if question.meta["regime"] == "noisy":
            golds = [g + rng.gauss(0, recipe.rater_noise) for g in golds]
        groups.append(Group(question, answers, golds))
    return groups


def train_reward(
    recipe: Recipe, part: Judge, rank: int, out: Path, policy: "Llama", groups: Sequence[Group], report: Progress
) -> tuple["Llama", "torch.Tensor"]:
    """The model of `part` and its head: Bradley-Terry over all couples of a group, the raters' probabilities as soft labels."""
    import torch
    from tiny_llama import Llama, Optimiser, batches, rewards
    from tokenizers import Tokenizer

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


def measure(
    recipe: Recipe,
    out: Path,
    policy: "Llama",
    judges: "dict[Judge, tuple[Llama, torch.Tensor]]",
    held_out: Sequence[tiny.Question],
    k: int,
) -> dict[str, Any]:
    """Statistics on held-out prompts: the policy's gold by part and skill, and how well reward and judge rank its samples."""
    from tiny_llama import all_rewards, sample
    from tokenizers import Tokenizer

    mine, theirs = (Tokenizer.from_file(str(out / part / "tokenizer.json")) for part in ("policy", "reward"))
    drawn = sample(policy, policy_ids(mine, [q.text for q in held_out]), k, END, recipe.max_tokens, recipe.seed + 7)
    pairs: dict[Judge, dict[str, list[int]]] = {part: {"total": [], "content": []} for part in judges}
    parts: dict[str, float] = dict.fromkeys(("total", *tiny.WEIGHTS), 0.0)
    skills: dict[str, list[float]] = {}
    tokens = ended = 0
    texts = [mine.decode_batch(answers, skip_special_tokens=True) for answers in drawn]
    asked = [q.text for q in held_out for _ in range(k)]
    said = reward_ids(recipe, theirs, asked, [t for some in texts for t in some])
    scored = {part: all_rewards(model, head, said) for part, (model, head) in judges.items()}
    for place, (question, answers) in enumerate(zip(held_out, drawn, strict=True)):
        found = {part: values[place * k : place * k + k] for part, values in scored.items()}
        golds = [tiny.grade([{"role": "user", "content": question.text}], t, question.meta) for t in texts[place]]
        for name in parts:
            parts[name] += sum(g[name] for g in golds) / k / len(held_out)
        skills.setdefault(question.meta["skill"], []).append(sum(g["content"] for g in golds) / k)
        tokens += sum(map(len, answers))
        ended += sum(ids[-1] == END for ids in answers)
        for a in range(k):
            for b in range(a):
                for part, by_name in pairs.items():
                    for name, agrees in by_name.items():
                        if abs(golds[a][name] - golds[b][name]) > 0.02:
                            agrees.append((found[part][a] > found[part][b]) == (golds[a][name] > golds[b][name]))
    n = len(held_out) * k
    return {
        "gold": {name: round(value, 4) for name, value in parts.items()},
        "content_by_skill": {name: round(sum(v) / len(v), 3) for name, v in sorted(skills.items())},
        "tokens_per_response": round(tokens / n, 2),
        "ended_share": round(ended / n, 4),
        **{
            f"{part}_accuracy": {name: round(sum(v) / max(1, len(v)), 4) for name, v in by_name.items()}
            for part, by_name in pairs.items()
        },
    }


def work(recipe: Recipe, rank: int, out: Path, parent: int) -> None:
    """One worker. Progress goes to standard output as JSON lines, from the first worker only."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the script
    if os.getppid() != parent:
        sys.exit("the script ended before its worker began")
    import torch
    from tiny_llama import export

    torch.set_num_threads(1)
    last: dict[str, Any] = {"stage": "", "when": 0.0}

    def report(stage: str, done: int, total: int, figures: dict[str, float]) -> None:
        now = time.monotonic()
        if rank == 0 and (done == total or stage != last["stage"] or now - last["when"] > 0.5):
            last.update(stage=stage, when=now)
            print(json.dumps({"stage": stage, "done": done, "total": total} | figures), flush=True)

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{out / 'rendezvous'}", rank=rank, world_size=recipe.workers
    )
    train, held_out = split(recipe)
    seconds: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        wall, cpu = time.monotonic(), time.process_time()
        result = call()
        seconds[name] = [round(time.monotonic() - wall, 1), round(time.process_time() - cpu, 1)]
        return result

    policy = timed("policy", lambda: train_policy(recipe, rank, out, train, report))

    def trained(part: Judge) -> "tuple[Llama, torch.Tensor]":
        groups = timed(f"samples for {part}", lambda: make_groups(recipe, part, rank, out, policy, train, report))
        found: tuple[Llama, torch.Tensor] = timed(
            part, lambda: train_reward(recipe, part, rank, out, policy, groups, report)
        )
        return found

    judges = {part: trained(part) for part in JUDGES}
    if rank == 0:
        first = reward_first(recipe)
        write_prompts(out, train, held_out, recipe.seed)
        export(policy, None, out / "policy", END, PAD)
        for part, (model, head) in judges.items():
            export(model, head, out / part, first + END, first + PAD)
        sampling = {
            "do_sample": True,
            "temperature": 1.0,
            "eos_token_id": END,
            "pad_token_id": PAD,
            "max_new_tokens": recipe.max_tokens,
        }
        (out / "policy" / "generation_config.json").write_text(json.dumps(sampling, indent=2) + "\n", encoding="utf-8")
        found = timed(
            "measure", lambda: measure(recipe, out, policy, judges, held_out[:: max(1, len(held_out) // 200)], 4)
        )
        found |= {
            "parameters": sum(p.numel() for p in policy.parameters()),
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
            TextColumn("{task.description:<18}"),
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


def read_world(folder: Path) -> dict[str, Any] | None:
    """What a whole world says of itself; None where there is none, or a power cut left one that is not whole."""
    try:
        world: dict[str, Any] = json.loads((folder / "world.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return world


def build(recipe: Recipe, target: Path) -> None:
    """Runs the workers and renames what they made to `target`. Raises RuntimeError when one of them fails."""
    from selfplay.storage.folders import sync, sync_tree

    partial = target.with_name(f".{target.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "GLOO_SOCKET_IFNAME": "lo"}
    order = json.dumps(asdict(recipe))
    workers: list[subprocess.Popen[str]] = []
    wall = time.monotonic()
    try:
        for rank in range(recipe.workers):
            with (partial / f"worker{rank}.log").open("w") as log:
                command = [sys.executable, __file__, "--worker", str(rank), "--recipe", order, "--out", str(partial)]
                command += ["--parent", str(os.getpid())]
                pipe = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
                workers.append(subprocess.Popen(command, stdout=pipe, stderr=log, env=environment, text=True))
        show(lines(workers[0]))
        codes = [ended(worker) for worker in workers]
        if any(codes):
            logs = "\n".join((partial / f"worker{rank}.log").read_text()[-2000:] for rank in range(recipe.workers))
            raise RuntimeError(f"a worker failed (exit codes {codes}):\n{logs}")
        world = {
            "hash": target.name,
            "recipe": asdict(recipe),
            "measured": json.loads((partial / "measured.json").read_text()),
            "wall_seconds": round(time.monotonic() - wall, 1),
            "cpu_seconds": round(sum(os.times()[2:4]), 1),
        }
        (partial / "world.json").write_text(json.dumps(world, indent=2) + "\n", encoding="utf-8")
        for left in (partial / "measured.json", partial / "rendezvous", *partial.glob("worker*.log")):
            left.unlink(missing_ok=True)
        sync_tree(partial)
        # Somebody else may have built the same world meanwhile: then theirs stays.
        if read_world(target) is None:
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            sync(target.parent)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
        shutil.rmtree(partial, ignore_errors=True)


def ended(worker: "subprocess.Popen[str]") -> int | None:
    """The exit code, or None of a worker that hangs once the other one's output has ended."""
    try:
        return worker.wait(timeout=30)
    except subprocess.TimeoutExpired:
        return None


def sweep(out: Path) -> None:
    """Removes what builds that were killed have left."""
    for left in out.glob(".*.*"):
        owner = left.name.rpartition(".")[2]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            if left.is_symlink():
                left.unlink(missing_ok=True)
            else:
                shutil.rmtree(left, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Build the tiny world: policy, reward model, prompts. Cached by a hash of its recipe."
    )
    parser.add_argument("--out", type=Path, default=Path(".cache/tiny"), help="folder of worlds (default: .cache/tiny)")
    parser.add_argument("--size", choices=sorted(SIZES), default="full", help="full (the demo) or mini (the tests)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default: 0)")
    for hidden in ("--worker", "--recipe", "--parent"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(Recipe(**json.loads(options.recipe)), int(options.worker), options.out, int(options.parent))
        return 0
    recipe = replace(SIZES[options.size], seed=options.seed)
    name = recipe_hash(recipe)
    out = options.out.resolve()
    target = out / name
    try:
        if read_world(target) is not None:
            print(f"tiny world {name} is there already: {target}")
        else:
            sweep(out)
            print(
                f"building tiny world {name} (size {options.size}, seed {options.seed}, worker processes: {recipe.workers})",
                flush=True,
            )
            build(recipe, target)
            world = read_world(target)
            assert world is not None
            print(f"built in {world['wall_seconds']:.0f} s ({world['cpu_seconds']:.0f} CPU seconds): {target}")
        link = out / f".current.{os.getpid()}"
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        link.rename(out / "current")
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind, the same command starts again", file=sys.stderr)
        return 130
    except (OSError, RuntimeError) as error:
        print(f"make_tiny: the tiny world could not be built in {out}: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
