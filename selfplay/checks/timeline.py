"""When each GPU will work in a round, as an estimate: from the configuration, the shapes of the models and the GPUs of this machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from selfplay.checks import gpus, sizes
from selfplay.checks.finding import Finding
from selfplay.checks.machine import MASTERS, SAVE, policy_bytes
from selfplay.checks.shown import Shown, shown
from selfplay.config import Config
from selfplay.errors import SelfplayError
from selfplay.planning import devices, gantt, seconds
from selfplay.planning.devices import Device
from selfplay.planning.gantt import Span
from selfplay.planning.shapes import Shape

PROMPT, ANSWER = 0.2, 0.44  # mean length of prompts and answers, as shares of the longest that are let through
WIDTH = 48  # characters of a GPU's line
LOW = 0.5  # share of a round below which a GPU counts as idle

Sampling = Callable[[int], float]  # answers → seconds


@dataclass(slots=True, kw_only=True)
class Timeline:
    """The spans of a round, lane by lane. `now` is where the next stage begins."""

    device: Device
    count: int  # GPUs
    lengths: tuple[float, float] = (0.0, 0.0)  # mean tokens of a prompt and of an answer
    now: float = 0.0
    spans: list[Span] = field(default_factory=list)

    def work(self, what: str, used: Sequence[int], took: float, start: float | None = None, busy: float = 1.0) -> float:
        """Have some GPUs work from `start` on, by default from now; returns when they are done."""
        begin = self.now if start is None else start
        self.spans += [Span(lane=lane(i), what=what, start=begin, seconds=took, busy=busy) for i in used]
        return begin + took

    def then(self, what: str, used: Sequence[int], took: float) -> None:
        """The same, and nothing else meanwhile."""
        self.now = self.work(what, used, took)

    def busy(self, gpu: int) -> float:
        """Share of the round in which a GPU works."""
        return gantt.busy(self.spans, lane(gpu), self.now)

    @property
    def share(self) -> float:
        """Share of all GPU-seconds of the round in which a GPU works."""
        return sum(self.busy(i) for i in range(self.count)) / self.count


def lane(gpu: int) -> str:
    return f"GPU {gpu}"


def tokens(config: Config, seen: Shown | None = None) -> tuple[float, float]:
    """The mean length of a prompt and of an answer that is counted with. Answers are as long as those that the run showed."""
    longest = config.generate.max_tokens
    return PROMPT * config.prompts.max_tokens, ANSWER * longest if seen is None else min(seen.length, longest)


def trained_pairs(config: Config) -> int:
    """Pairs that a round trains on, at most, with those of earlier rounds."""
    kept = max(1, int(config.pairs.keep * config.pairs.easiest * config.prompts.per_round))
    own = kept if config.depth.method == "none" else round(kept * config.depth.pairs_per_prompt)
    return own + round(config.train.replay * own)


def timeline(config: Config, there: Sequence[gpus.Gpu], seen: Shown | None = None) -> Timeline | None:
    """The plan of a round; None without a GPU, or where the size of the policy is not known."""
    policy = sizes.shape(config.policy.model, config.policy.revision)
    if not there or policy is None:
        return None
    plan = Timeline(device=devices.device(there[0].name), count=len(there))
    use, evaluate = gpus.roles(config, len(there)), config.evaluate
    engines = tuple(i for group in use.engines for i in group)
    if not engines or not use.trainer:  # `placement` names GPUs that are not there
        return None
    prompt, answer = plan.lengths = tokens(config, seen)
    asked = config.prompts.per_round * config.generate.candidates

    def sampling(answers: int) -> float:
        engine = config.generate.engine
        return seconds.sampling(
            policy, plan.device, answers=answers, prompt=prompt, answer=answer, engines=len(use.engines),
            parallel=engine.tensor_parallel, most=engine.max_num_seqs,
        )  # fmt: skip

    beside = not config.placement.colocated  # the champion answers beside the trainer
    sampled = sampling(asked + (0 if beside else evaluate.prompts))
    plan.work("generate", engines, sampled)
    reward = {key: use.scorers[key] for key in config.reward_sources() if key in use.scorers}
    apart = not config.placement.shared and not {i for used in reward.values() for i in used} & set(engines)
    began, plan.now = plan.now, plan.now + sampled
    if config.placement.shared:
        plan.now += seconds.WAKE
    _score(plan, config, reward, "score", asked * (prompt + answer), began=began if apart else None)
    if beside:
        plan.work("evaluate", engines, sampling(evaluate.prompts))
    _train(plan, config, policy, use, prompt + answer)
    _evaluate(plan, config, policy, use, sampling)
    return plan


def _score(
    plan: Timeline, config: Config, scorers: dict[str, tuple[int, ...]], what: str, count: float, began: float | None = None
) -> None:  # fmt: skip
    """Score so many tokens; from `began` on, while they are sampled, where that is given. What is no model of ours takes no time.

    Models on the same GPU score one after the other.
    """
    sources = config.reward_sources() | config.judge_sources()
    shapes = {key: shape for key in scorers if (shape := sizes.shape(sources[key].model)) is not None}
    took = {
        key: seconds.scoring(shape, plan.device, tokens=count, gpus=len(scorers[key])) for key, shape in shapes.items()
    }
    everyone = {i for key in took for i in scorers[key]}
    longest = max((sum(took[key] for key in took if i in scorers[key]) for i in everyone), default=0.0)
    slower = (
        1.0 if began is None or not longest else max(1.0, (plan.now - began) / longest)
    )  # samples come as they come
    free = dict.fromkeys(everyone, plan.now if began is None else began)
    for key, shape in shapes.items():
        start = max(free[i] for i in scorers[key])
        if config.placement.shared:
            start += _loading(shape, gpus.DTYPE_BYTES[sources[key].dtype], len(scorers[key]))
        ends = plan.work(what, scorers[key], took[key] * slower, start=start, busy=1 / slower)
        free |= dict.fromkeys(scorers[key], ends)
    plan.now = max([plan.now, *free.values()])


def _loading(shape: Shape, width: int, copies: int) -> float:
    """Seconds until a server has loaded a model to so many GPUs: once from the disk, and then from main memory."""
    size = shape.parameters * width
    return seconds.IMPORTS + size / seconds.DISK + (copies - 1) * size / seconds.COPY


def _train(plan: Timeline, config: Config, policy: Shape, use: gpus.Roles, length: float) -> None:
    """Gradient depth and training."""
    settings, count, used = config.train, policy.parameters, use.trainer
    if config.placement.colocated:
        plan.now += seconds.WAKE
    pairs = trained_pairs(config)
    if config.depth.method == "gradient":
        plan.now += seconds.IMPORTS + count * gpus.DTYPE_BYTES[config.policy.dtype] / seconds.DISK
        kept = 2 * max(1, int(config.pairs.keep * config.prompts.per_round)) * length
        plan.then("depth", used, seconds.features(policy, plan.device, tokens=kept, gpus=len(used)))
    lora = settings.lora is not None
    own_reference = not lora or settings.reference != "previous"
    plan.now += seconds.IMPORTS + count * MASTERS * (2 if own_reference else 1) / seconds.DISK
    agreement = 2 * min(pairs, settings.agreement_pairs) * length
    plan.then("train", used, seconds.scoring(policy, plan.device, tokens=agreement, gpus=len(used)))
    took = seconds.training(
        policy, plan.device, tokens=2 * pairs * settings.epochs * length, gpus=len(used), lora=lora,
        checkpointing=settings.gradient_checkpointing,
    )  # fmt: skip
    plan.then("train", used, took)
    steps = math.ceil(pairs / settings.batch_pairs) * settings.epochs
    saves = 0 if lora else steps // settings.save_steps
    plan.now += saves * SAVE * count / seconds.DISK
    # The models of before and after are loaded and compared, the new one is written, and hashed when it is made and adopted.
    plan.now += (4 * MASTERS * count + policy_bytes(config, count)) / seconds.DISK
    plan.now += 2 * policy_bytes(config, count) / seconds.HASH


def _evaluate(plan: Timeline, config: Config, policy: Shape, use: gpus.Roles, sampling: Sampling) -> None:
    """The candidate answers, the champion and the initial policy weigh its answers, the judge scores both, the winner serves."""
    evaluate, (prompt, answer) = config.evaluate, plan.lengths
    engines = tuple(i for group in use.engines for i in group)
    audited = evaluate.audit_prompts / evaluate.audit_every if evaluate.audit_every else 0.0
    plan.now += seconds.SWAP
    plan.then("evaluate", engines, sampling(round(evaluate.prompts + audited)))
    for _ in ("current", "initial"):
        plan.now += seconds.SWAP
        weighed = evaluate.prompts * (prompt + answer)
        plan.then("evaluate", engines, seconds.scoring(policy, plan.device, tokens=weighed, gpus=len(engines)))
    judges = {key: use.scorers[key] for key in config.judge_sources() or config.reward_sources() if key in use.scorers}
    if config.placement.shared:
        plan.now += seconds.WAKE
    _score(plan, config, judges, "evaluate", 2 * (evaluate.prompts + audited) * (prompt + answer))
    plan.now += seconds.SWAP


def rows(config: Config, seen: Shown | None = None) -> Iterator[tuple[str, str]]:
    """The plan in words: how long a round takes, a line a GPU, and what was counted with."""
    there = gpus.visible()
    plan = timeline(config, there, seen)
    if plan is None:
        return
    prompt, answer = plan.lengths
    yield "time", f"about {plan.now / 60:.0f} min, of which the GPUs work {plan.share:.0%} (an estimate)"
    for i in range(plan.count):
        yield lane(i), f"{gantt.line(plan.spans, lane(i), plan.now, WIDTH)} {plan.busy(i):.0%}"
    yield "", "g sample · s score · d depth · t train · e evaluate"
    yield (
        "counted with",
        f"prompts of {prompt:.0f} and answers of {answer:.0f} tokens{f' as {seen.where} had' if seen else ''}; {plan.device.name}: {plan.device.flops / 1e12:.0f} TFLOP/s, "
        f"{plan.device.bandwidth / 1e12:g} TB/s; of them sampling reaches {seconds.DECODE:.0%} and {seconds.READ:.0%}, scoring "
        f"{seconds.SCORE:.0%}, depth {seconds.DEPTH:.0%}, training {seconds.TRAIN:.0%}; disks of {seconds.DISK / 1e9:g} GB/s; rewards "
        "that are no model of ours answer at once",
    )


def idle(config: Config, run_dir: Path) -> Iterator[Finding]:
    """A warning where GPUs do nothing for most of a round."""
    if config.cluster is not None:  # it reckons with the GPUs of this machine
        return
    try:
        plan = timeline(config, gpus.visible(), shown(run_dir))
    except (SelfplayError, ValueError):  # the looks at models, processes and GPUs say what is wrong
        return
    if plan is None:
        return
    unused = [i for i in range(plan.count) if not plan.busy(i)]
    seldom = [i for i in range(plan.count) if 0 < plan.busy(i) < LOW]
    if unused:
        yield Finding.warning("utilisation", f"no role uses {_named(unused)}")
    if seldom:
        share = sum(map(plan.busy, seldom)) / len(seldom)
        hint = "" if config.placement.shared else ": `placement: shared` lets every role use every GPU by turns"
        yield Finding.warning("utilisation", f"{_named(seldom)} would work {share:.0%} of a round (an estimate){hint}")
    if not unused and not seldom:
        yield Finding.ok("utilisation", f"the GPUs would work {plan.share:.0%} of a round (an estimate)")


def _named(indices: Sequence[int]) -> str:
    return f"GPU{'s' if len(indices) > 1 else ''} {', '.join(map(str, indices))}"
