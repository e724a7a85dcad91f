"""The reference of a round: which policy it is, and where β stands against it."""

from __future__ import annotations

from selfplay.config import EveryN, TrainConfig
from selfplay.errors import CheckpointError
from selfplay.storage.ledger import Store
from selfplay.storage.policies import Policies
from selfplay.types import Policy


def began(settings: TrainConfig, index: int) -> int:
    """The round that the reference of round `index` began with (`train.reference`)."""
    rule = settings.reference
    every = rule.every if isinstance(rule, EveryN) else 1 if rule == "previous" else index
    return index - (index - 1) % every


def version(settings: TrainConfig, index: int, store: Store) -> int:
    """The version of the reference of round `index`: the initial policy, or the champion of the round it began with."""
    if settings.reference == "initial":
        return 0
    return int(store.round(began(settings, index))["champion"])


def policy(settings: TrainConfig, index: int, store: Store, policies: Policies) -> Policy:
    """The reference of round `index`. Raises CheckpointError where retention has deleted its weights."""
    number = version(settings, index, store)
    try:
        return policies.get(number)
    except CheckpointError as error:
        raise CheckpointError(
            f"the reference of round {index} is policy {number} (train.reference), and {error}",
            "it was not the reference when old policies were deleted: set train.reference to previous or initial",
        ) from error


def first_beta(settings: TrainConfig, index: int, champion: Policy) -> float:
    """β at the start of round `index`: where training against this very reference left it, or anew for a refreshed one."""
    goes_on = champion.beta is not None and champion.round >= began(settings, index)
    beta = champion.beta if goes_on and champion.beta is not None else settings.beta
    return min(max(beta, settings.beta_min), settings.beta_max)
