"""Cores of a machine without a GPU: how many threads each role has, so that no two of them fight for one core.

Two processes with two threads each on two cores take seven times as long. So a role has the cores that nobody uses while it
works, and roles that do not fit side by side work one after the other.
"""

from __future__ import annotations

import os

from selfplay.config import Config


def usable() -> int:
    """Cores that this process and its children may use."""
    return len(os.sched_getaffinity(0))


def trainer_threads(config: Config) -> int:
    """Threads of the trainer. By default all cores, because then nothing works beside it (`fit_together`)."""
    return config.train.cpu_threads or (config.cluster.trainer.cpus if config.cluster else usable())


def engine_threads(config: Config) -> int:
    """Threads of each engine. Where the configuration leaves them open, the engines share the cores that reward models of ours
    leave, which score meanwhile."""
    settings = config.generate
    if config.cluster is not None:
        return settings.engine.cpu_threads or config.cluster.engine.cpus
    scorers = sum(bool(source.model) and not source.url for source in config.reward_sources().values())
    return settings.engine.cpu_threads or max(1, (usable() - scorers) // settings.engine_count)


def fit_together(config: Config) -> bool:
    """Whether trainer and engines have a core for each of their threads when they work side by side."""
    if config.cluster is not None:  # each has those that Ray gives it
        return True
    return trainer_threads(config) + config.generate.engine_count * engine_threads(config) <= usable()
