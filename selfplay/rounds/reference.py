"""The reference of a round: which policy it is, or which average of policies, and where β stands against it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from selfplay.config import Config, Ema, EveryN, TrainConfig
from selfplay.errors import CheckpointError
from selfplay.storage import folders, hashes, seals
from selfplay.storage.ledger import Store
from selfplay.storage.policies import Policies, weights_sha256
from selfplay.storage.references import MODEL, References
from selfplay.training.jobs import BlendJob
from selfplay.training.service import Trainer
from selfplay.types import Policy, Reference


def began(settings: TrainConfig, index: int) -> int:
    """The round that the reference of round `index` began with (`train.reference`); a moving average begins anew in each."""
    rule = settings.reference
    every = rule.every if isinstance(rule, EveryN) else index if rule == "initial" else 1
    return index - (index - 1) % every


def version(settings: TrainConfig, index: int, store: Store) -> int:
    """The version of the reference of round `index`: the initial policy, or the champion of the round it began with.

    For a moving average that is the policy that it moves to.
    """
    if settings.reference == "initial":
        return 0
    return int(store.round(began(settings, index))["champion"])


def policy(settings: TrainConfig, index: int, store: Store, policies: Policies) -> Policy:
    """The reference of round `index`, where it is a policy. Raises CheckpointError where retention has deleted its weights."""
    number = version(settings, index, store)
    try:
        return policies.get(number)
    except CheckpointError as error:
        raise CheckpointError(
            f"the reference of round {index} is policy {number} (train.reference), and {error}",
            "it was not the reference when old policies were deleted: set train.reference to previous or initial",
        ) from error


def of_round(
    index: int,
    *,
    config: Config,
    store: Store,
    policies: Policies,
    references: References,
    trainer: Trainer,
    meanwhile: Callable[[], object] = lambda: None,
) -> Reference:
    """The reference of round `index`, whose files were checked; a moving average is made where it is not there yet.

    meanwhile: work for the engine before it makes room for the trainer, which makes the average.
    """
    settings = config.train
    if not isinstance(settings.reference, Ema):
        return _policy(policies, policy(settings, index, store, policies).version)
    if references.folder(index).is_dir():
        return references.get(index)
    champion, before = version(settings, index, store), references.before(index)
    if before is None and champion == 0:  # an average of the initial policy with itself
        return _policy(policies, 0)
    last = _policy(policies, 0) if before is None else references.get(before)
    towards, share = _policy(policies, champion), settings.reference.ema
    with folders.folder(references.folder(index)) as out:
        job = BlendJob(
            before=Path(last.path), policy=Path(towards.path), share=share,
            initial=Path(policies.tokenizing(0).path), out=out / MODEL, trust_remote_code=config.policy.trust_remote_code,
        )  # fmt: skip
        found = trainer.order("blend", job, meanwhile=meanwhile, last=False)
        made_of = {"round": index, "policy": champion, "share": share, "before": before, **found}
        seals.write_json(out / folders.MANIFEST, {**made_of, "files": hashes.hash_files(out / MODEL)})
    made = references.get(index)
    was = "policy 0" if before is None else f"the reference of round {before}"
    store.event(
        "reference",
        f"the reference is {share:g} of policy {champion} and {1 - share:g} of {was}: {made.sha256[:12]}, "
        f"{found['distance']:.2e} of its norm from that policy",
        index,
    )
    return made


def _policy(policies: Policies, number: int) -> Reference:
    """A policy of the run as a reference, its files checked."""
    found, manifest = policies.verified(number)
    return Reference(version=number, path=found.path, sha256=weights_sha256(manifest))


def forget(references: References, settings: TrainConfig, index: int, given_up: bool) -> None:
    """After round `index`: delete the averages that no later round moves on from. One that was given up leaves none."""
    if given_up:
        references.delete(index)
    elif isinstance(settings.reference, Ema):
        references.delete_weights(before=references.before(index + 1))
    else:  # an average that begins again later begins with the initial policy
        references.delete_weights()


def first_beta(settings: TrainConfig, index: int, champion: Policy) -> float:
    """β at the start of round `index`: where training against this very reference left it, or anew for a refreshed one."""
    goes_on = champion.beta is not None and champion.round >= began(settings, index)
    beta = champion.beta if goes_on and champion.beta is not None else settings.beta
    return min(max(beta, settings.beta_min), settings.beta_max)
