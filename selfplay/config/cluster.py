"""The section `cluster`: the children of a run on the nodes of a Ray cluster, and what each of them gets there."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from selfplay.config.base import Positive, Section


class RoleConfig(Section):
    cpus: Positive = 1
    """CPUs of each child, as Ray counts them."""
    gpus: Annotated[int, Field(ge=0)] | None = None
    """GPUs of each child. null: as many as it uses where the cluster has any (an engine `generate.engine.tensor_parallel`, a node
    of the trainer its share of the processes in `train.accelerate`, a reward model one), otherwise none."""
    spread: bool = False
    """Children of this role are put on different nodes as far as possible. false packs them together."""


class EngineRoleConfig(RoleConfig):
    nodes: Positive = 1
    """Nodes that each engine lies on. With more than one vLLM's own Ray executor spreads it: each node has a stage of its pipeline,
    split over `generate.engine.tensor_parallel` GPUs. GPUs only."""


class TrainerRoleConfig(RoleConfig):
    nodes: Positive = 1
    """Nodes that train together, each with a launcher of its own. More than one needs `train.accelerate`, whose `num_processes`
    counts the processes on all nodes; they are always on different nodes."""


class ClusterConfig(Section):
    """The controller and its ledger stay one process, and engines, reward models, judges and trainers are started by Ray. The run
    folder has to be on storage that all nodes have under the same path. See [cluster.md](cluster.md)."""

    address: str
    """`auto`: the cluster that this machine is a node of. `ray://host:10001` or `host:6379`: a cluster elsewhere, or this one by
    its address. `local`: a cluster of this machine alone, which is started and ended with the run."""
    wait: Annotated[float, Field(gt=0)] = 600.0
    """Seconds that a child may wait for room on a node."""
    autoscaling: bool = False
    """The cluster gets further nodes when something waits for them. `selfplay check` then takes a lack of room for a warning, and
    every role has to say how many GPUs it has, since none may be there yet."""
    engine: EngineRoleConfig = EngineRoleConfig()
    """Each engine of the generator."""
    reward: RoleConfig = RoleConfig()
    """Each reward model, those of suites included."""
    judge: RoleConfig = RoleConfig()
    """Each model of the judge."""
    trainer: TrainerRoleConfig = TrainerRoleConfig()
    """The trainer, on each of its nodes."""

    @model_validator(mode="after")
    def _gpus_are_said(self) -> ClusterConfig:
        roles = ("engine", "reward", "judge", "trainer")
        if self.autoscaling and (open_ := [name for name in roles if self.role(name).gpus is None]):
            raise ValueError(f"autoscaling: say how many GPUs each {open_[0]} has ({open_[0]}.gpus), or 0 for none")
        return self

    @model_validator(mode="after")
    def _address_is_one(self) -> ClusterConfig:
        if self.address in ("auto", "local"):
            return self
        host, colon, port = self.address.removeprefix("ray://").rpartition(":")
        if not (host and colon and port.isdigit()) or "/" in host:
            raise ValueError(f"address {self.address!r} is none of auto, local, ray://host:port and host:port")
        return self

    def role(self, name: str) -> RoleConfig:
        """The settings of a role. What scores for a suite is a reward model."""
        known: dict[str, RoleConfig] = {"engine": self.engine, "judge": self.judge, "trainer": self.trainer}
        return known.get(name, self.reward)
