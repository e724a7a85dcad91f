"""The whole configuration, and the rules that tie its sections together."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from selfplay import kinds
from selfplay.config.base import Section
from selfplay.config.cluster import ClusterConfig
from selfplay.config.evaluate import EvaluateConfig
from selfplay.config.generate import GenerateConfig
from selfplay.config.guard import GuardConfig
from selfplay.config.pairs import DepthConfig, PairsConfig
from selfplay.config.placement import PlacementConfig
from selfplay.config.policy import PolicyConfig, SwapConfig
from selfplay.config.prompts import BreadthConfig, EvolveConfig, PromptsConfig
from selfplay.config.publish import PublishConfig
from selfplay.config.retention import RetentionConfig
from selfplay.config.reward import WHICH, JudgeConfig, RewardConfig, RewardSource
from selfplay.config.run import RunConfig
from selfplay.config.schedule import ScheduleConfig
from selfplay.config.service import ServiceConfig
from selfplay.config.suites import SuiteConfig
from selfplay.config.train import Ema, EveryN, TrainConfig

Tracker = Annotated[
    str,
    AfterValidator(kinds.one_of(kinds.TRACKERS, "none")),
    Field(json_schema_extra={"enum": [*kinds.TRACKERS, "none"]}),
]


FIXED = (
    "source", "config", "split", "format", "filter", "heldout", "heldout_fraction", "audit", "audit_fraction", "max_tokens",
)  # fmt: skip
"""Settings of `prompts` that decide on the pool, and so on all that comes of it."""


class Config(Section):
    run: RunConfig = RunConfig()
    """Name, folder and seed."""
    policy: PolicyConfig
    """The model that is aligned."""
    prompts: PromptsConfig
    """Where prompts come from."""
    breadth: BreadthConfig = BreadthConfig()
    """Fewer prompts that stand for many."""
    generate: GenerateConfig = GenerateConfig()
    """Sampling of candidates."""
    reward: RewardConfig
    """The external reward."""
    guard: GuardConfig = GuardConfig()
    """When the reward is taken to go wrong."""
    pairs: PairsConfig = PairsConfig()
    """From scored candidates to preference pairs."""
    evolve: EvolveConfig = EvolveConfig()
    """New prompts from those worth most."""
    depth: DepthConfig = DepthConfig()
    """Further pairs for the kept prompts."""
    train: TrainConfig = TrainConfig()
    """ε-DPO."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Evaluation and gate."""
    swap: SwapConfig = SwapConfig()
    """Verification of new weights in the engine."""
    placement: PlacementConfig = PlacementConfig()
    """Which GPUs do what."""
    publish: PublishConfig = PublishConfig()
    """Where the current policy goes after each promotion: the Hub, a folder, running servers."""
    cluster: ClusterConfig | None = None
    """Further machines; null for this one alone."""
    retention: RetentionConfig = RetentionConfig()
    """Which weights, artifacts and rows of the ledger stay on disk."""
    track: Tracker = "tensorboard"
    """Where round and trainer metrics go beside the ledger."""
    schedule: ScheduleConfig = ScheduleConfig()
    """When rounds start (`selfplay serve`)."""
    service: ServiceConfig = ServiceConfig()
    """The long-running service (`selfplay serve`)."""

    @model_validator(mode="after")
    def _lengths_fit(self) -> Config:
        longest = self.prompts.max_tokens + self.generate.max_tokens
        if longest > self.train.max_length:
            raise ValueError(
                f"prompts.max_tokens + generate.max_tokens = {longest} is more than train.max_length = "
                f"{self.train.max_length}: training never truncates; lower the first two or raise the last"
            )
        context = self.generate.engine.max_model_len
        if context is not None and longest + 1 > context:
            raise ValueError(
                f"prompts.max_tokens + generate.max_tokens + 1 = {longest + 1} is more than generate.engine.max_model_len = {context}"
            )
        needed = self.prompts.max_tokens + self.longest_answer + 1
        if context is not None and needed > context:
            raise ValueError(
                f"prompts.max_tokens + the largest max_tokens of evaluate.suites + 1 = {needed} is more than "
                f"generate.engine.max_model_len = {context}"
            )
        return self

    @model_validator(mode="after")
    def _implicit_has_a_reference(self) -> Config:
        compares = kinds.resolve(kinds.IMPLICIT_REWARDS, self.pairs.implicit).NEEDS_REFERENCE
        if compares and (self.train.reference == "previous" or self.train.reference == EveryN(every=1)):
            raise ValueError(
                f"pairs.implicit = {self.pairs.implicit} with train.reference = previous: the reference is the policy that "
                "samples, so every implicit reward is 0; set train.reference to initial or {every: n}, or pairs.implicit to "
                "simpo"
            )
        if compares and isinstance(self.train.reference, Ema):
            raise ValueError(
                f"pairs.implicit = {self.pairs.implicit} with train.reference = {{ema: …}}: a moving average is never in the "
                "engine, which would have to score the candidates; set pairs.implicit to simpo"
            )
        return self

    @model_validator(mode="after")
    def _rewards_fit(self) -> Config:
        if self.pairs.max_disagreement is not None and self.reward.ensemble is None:
            raise ValueError("pairs.max_disagreement goes with reward.ensemble: a single reward cannot disagree")
        trained_on = list(self.reward_sources().values())
        if same := [key for key, s in self.judge_sources().items() if any(_is_same(s, t) for t in trained_on)]:
            raise ValueError(f"{same[0]} is a reward that trains: a judge is another one; leave evaluate.judge out")
        if self.reward.shaping.cut_off_penalty and self.pairs.cut_off == "drop":
            raise ValueError(
                "reward.shaping.cut_off_penalty goes with pairs.cut_off: reject; otherwise nothing reads it"
            )
        return self

    @model_validator(mode="after")
    def _ahead_is_possible(self) -> Config:
        if self.schedule.ahead and self.placement.colocated:
            raise ValueError(
                "schedule.ahead goes without placement.colocated: there the engine sleeps while the trainer works"
            )
        if self.schedule.ahead and self.breadth.method == "clusters":
            raise ValueError(
                "schedule.ahead goes without breadth.method = clusters: the trainer, which trains then, would have to embed "
                "the prompts of the next round"
            )
        return self

    @model_validator(mode="after")
    def _cluster_fits(self) -> Config:
        if self.cluster is None:
            return self
        if self.placement != PlacementConfig() or isinstance(self.generate.engines, list):
            raise ValueError(
                "placement and the GPUs in generate.engines are numbers on one machine: with cluster, say in cluster.engine, "
                "cluster.reward, cluster.judge and cluster.trainer how many GPUs each has"
            )
        if self.cluster.trainer.nodes > 1 and self.train.accelerate is None:
            raise ValueError("cluster.trainer.nodes is more than 1: name the processes on them in train.accelerate")
        if self.cluster.engine.nodes > 1 and self.cluster.engine.gpus:
            raise ValueError(
                "cluster.engine.nodes is more than 1: leave cluster.engine.gpus out, since vLLM's own workers take the GPUs, "
                "generate.engine.tensor_parallel on each node"
            )
        if self.cluster.engine.gpus and self.cluster.engine.gpus < self.generate.engine.tensor_parallel:
            raise ValueError(
                f"cluster.engine.gpus = {self.cluster.engine.gpus} is less than generate.engine.tensor_parallel = "
                f"{self.generate.engine.tensor_parallel}: an engine lies on one node, unless cluster.engine.nodes says otherwise"
            )
        silence = min(self.generate.engine.silence, self.train.silence)
        if self.cluster.wait >= silence:
            raise ValueError(
                f"cluster.wait = {self.cluster.wait:g} is not less than generate.engine.silence and train.silence, of which "
                f"the shorter is {silence:g}: a child that waits for room would be taken for one that hangs"
            )
        return self

    @property
    def engine_nodes(self) -> int:
        """Nodes that each engine lies on."""
        return 1 if self.cluster is None else self.cluster.engine.nodes

    @property
    def run_dir(self) -> Path:
        return self.run.dir / self.run.name

    def reward_sources(self) -> dict[str, RewardSource]:
        """What scores for training, by the key of the configuration that names it."""
        return _sources("reward", self.reward, self.reward)

    def judge_sources(self) -> dict[str, RewardSource]:
        """What judges at the gate, in the same way; empty where that is the reward that trains."""
        judge = self.evaluate.judge
        return {} if judge is None else _sources("evaluate.judge", judge, self.reward)

    def suite_sources(self, suite: SuiteConfig) -> dict[str, RewardSource]:
        """What scores the answers of a suite, in the same way; empty where nothing has to."""
        return (
            {} if suite.reward is None else _sources(f"evaluate.suites.{suite.name}.reward", suite.reward, self.reward)
        )

    def all_sources(self) -> dict[str, RewardSource]:
        """Everything that scores: the reward, the judge and the rewards of the suites."""
        suites = [self.suite_sources(suite) for suite in self.evaluate.suites]
        return {k: s for some in (self.reward_sources(), self.judge_sources(), *suites) for k, s in some.items()}

    @property
    def longest_answer(self) -> int:
        """The most tokens that the engine samples for one answer, of a round or of a suite."""
        return max([self.generate.max_tokens, *(suite.max_tokens or 0 for suite in self.evaluate.suites)])

    def fixed(self) -> dict[str, Any]:
        """What cannot change within a run folder: policy, data split, seed."""
        return {
            "policy.model": self.policy.model,
            "policy.revision": self.policy.revision,
            "policy.dtype": self.policy.dtype,
            # Absent values are null: what a run began with before there was a setting is still the same.
            "policy.chat_template_kwargs": self.policy.chat_template_kwargs or None,
            "policy.template_date": self.policy.template_date and self.policy.template_date.isoformat(),
            **{f"prompts.{name}": getattr(self.prompts, name) for name in FIXED},
            "prompts.column": self.prompts.columns.prompt,
            "prompts.columns": self.prompts.columns.model_dump(exclude={"prompt"}, exclude_defaults=True) or None,
            "prompts.benchmarks": self.prompts.benchmarks or None,
            "run.seed": self.run.seed,
        }

    def fingerprint(self) -> str:
        """SHA-256 of the resolved configuration."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def _is_same(a: RewardSource, b: RewardSource) -> bool:
    """Whether two sources are one reward, in whatever precision or place."""
    if a.url or b.url:
        return (
            not {u.rstrip("/") for u in a.url}.isdisjoint(u.rstrip("/") for u in b.url)
            and a.served_model == b.served_model
        )
    differ = {"dtype", "trust_remote_code", "chat_template_kwargs"}
    return {k: v for k, v in a.which().items() if k not in differ} == {
        k: v for k, v in b.which().items() if k not in differ
    }


def _sources(key: str, section: RewardConfig | JudgeConfig, defaults: RewardConfig) -> dict[str, RewardSource]:
    """One source, or those of an ensemble; what they leave out is as in `section`, then as in `defaults`."""
    shared = set(RewardSource.model_fields) - WHICH
    inherited = defaults.model_dump(include=shared) | section.model_dump(include=shared, exclude_unset=True)
    where = set(RewardSource.model_fields)
    if section.ensemble is None:
        return {key: RewardSource.model_validate(inherited | section.model_dump(include=WHICH)).plain()}
    return {
        f"{key}.ensemble.members.{i}": RewardSource.model_validate(
            inherited | member.model_dump(include=where, exclude_unset=True)
        ).plain()
        for i, member in enumerate(section.ensemble.members)
    }
