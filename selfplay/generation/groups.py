"""Which GPUs each engine of the pool has."""

from __future__ import annotations

from selfplay.config import Config
from selfplay.errors import ConfigError
from selfplay.processes import cores
from selfplay.processes.gpus import count as count_gpus

Group = tuple[int, ...] | None  # None: whatever is visible


def groups(config: Config, gpus: int | None = None) -> list[Group]:
    """The GPUs of each engine, by their numbers among those that this process may use.

    gpus: how many there are; by default as many as can be told without their driver. Raises ConfigError where there are too few
    GPUs, or too few cores on a machine without one.
    """
    settings, given = config.generate, config.placement.generator
    count, size = settings.engine_count, settings.engine.tensor_parallel
    if config.cluster is not None:  # the nodes give each engine its own
        return [None] * count
    there = count_gpus() if gpus is None else gpus
    if isinstance(settings.engines, list):
        _require_named(settings.engines, given, there)
        return [tuple(group) for group in settings.engines]
    if count == 1:
        return [None if given is None else tuple(given)]
    if not there and given is None:
        _require_cores(count, cores.engine_threads(config))
        return [None] * count
    free = list(range(there)) if given is None else given
    if count * size > len(free):
        raise ConfigError(
            f"generate.engines: {count} engines of {size} GPUs each need {count * size} GPUs, the generator has {len(free)}",
            "lower generate.engines or generate.engine.tensor_parallel, or give placement.generator more GPUs",
        )
    return [tuple(free[i * size : (i + 1) * size]) for i in range(count)]


def shares_gpus(config: Config, gpus: int | None = None) -> bool:
    """Whether an engine has a GPU on which a reward model or a judge of ours may be as well."""
    if config.cluster is not None:  # no GPU has two of its children
        return False
    if config.placement.shared:  # then a reward model has left the GPUs before an engine loads
        return False
    there = range(count_gpus() if gpus is None else gpus)
    sources = config.all_sources().values()
    if not there or all(source.url for source in sources):
        return False
    engines = {gpu for group in groups(config, len(there)) for gpu in (there if group is None else group)}
    rewards = there if config.placement.reward is None else config.placement.reward
    return not engines.isdisjoint(rewards)


def _require_named(wanted: list[list[int]], given: list[int] | None, there: int) -> None:
    named = [gpu for group in wanted for gpu in group]
    if given is not None and (other := [gpu for gpu in named if gpu not in given]):
        raise ConfigError(
            f"generate.engines names GPU {other[0]}, which is not among those of placement.generator, {given}",
            "name the GPUs of the engines in one of the two places only",
        )
    if absent := [gpu for gpu in named if gpu >= there]:
        raise ConfigError(
            f"generate.engines names GPU {absent[0]}; there are {there}",
            "numbers begin at 0, and count the GPUs that are visible here",
        )


def _require_cores(count: int, threads: int) -> None:
    there = cores.usable()
    if count * threads > there:
        raise ConfigError(
            f"generate.engines: {count} engines of {threads} threads each need {count * threads} cores, this process may use "
            f"{there}",
            "lower generate.engines or generate.engine.cpu_threads",
        )
