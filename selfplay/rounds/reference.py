"""The reference of a round: which policy it is, or which average of policies, and where β stands against it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from selfplay.config import Ema, EveryN, TrainConfig
from selfplay.errors import CheckpointError
from selfplay.rounds.run import Run
from selfplay.storage import folders, hashes, policies, seals
from selfplay.storage.ledger import Store
from selfplay.storage.policies import Policies
from selfplay.storage.references import MODEL, References
from selfplay.training.jobs import BlendJob
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


def of_round(run: Run, index: int, meanwhile: Callable[[], object] = lambda: None) -> Reference:
    """The reference of round `index`, whose files were checked; a moving average is made where it is not there yet.

    meanwhile: work for the engine before it makes room for the trainer, which makes the average.
    """
    settings, references = run.config.train, References(run.dir)
    if not isinstance(settings.reference, Ema):
        return _policy(run, policy(settings, index, run.store, run.policies).version)
    if references.folder(index).is_dir():
        return references.get(index)
    champion, before = version(settings, index, run.store), references.before(index)
    if before is None and champion == 0:  # an average of the initial policy with itself
        return _policy(run, 0)
    last = _policy(run, 0) if before is None else references.get(before)
    towards, share = _policy(run, champion), settings.reference.ema
    with folders.folder(references.folder(index)) as out:
        job = BlendJob(
            before=Path(last.path), policy=Path(towards.path), share=share, initial=Path(run.policy(0).path),
            out=out / MODEL, trust_remote_code=run.config.policy.trust_remote_code,
        )  # fmt: skip
        found = run.trainer.order("blend", job, meanwhile=meanwhile, last=False)
        made_of = {"round": index, "policy": champion, "share": share, "before": before, **found}
        seals.write_json(out / folders.MANIFEST, {**made_of, "files": hashes.hash_files(out / MODEL)})
    made = references.get(index)
    was = "policy 0" if before is None else f"the reference of round {before}"
    run.store.event(
        "reference",
        f"the reference is {share:g} of policy {champion} and {1 - share:g} of {was}: {made.sha256[:12]}, "
        f"{found['distance']:.2e} of its norm from that policy",
        index,
    )
    return made


def _policy(run: Run, number: int) -> Reference:
    """A policy of the run as a reference, its files checked."""
    manifest = policies.verify(run.policies.folder(number))
    return Reference(version=number, path=run.policy(number).path, sha256=policies.weights_sha256(manifest))


def forget(run: Run, index: int, given_up: bool) -> None:
    """After round `index`: delete the averages that no later round moves on from. One that was given up leaves none."""
    references = References(run.dir)
    if given_up:
        references.delete(index)
    elif isinstance(run.config.train.reference, Ema):
        references.delete_weights(before=references.before(index + 1))
    else:  # an average that begins again later begins with the initial policy
        references.delete_weights()


def first_beta(settings: TrainConfig, index: int, champion: Policy) -> float:
    """β at the start of round `index`: where training against this very reference left it, or anew for a refreshed one."""
    goes_on = champion.beta is not None and champion.round >= began(settings, index)
    beta = champion.beta if goes_on and champion.beta is not None else settings.beta
    return min(max(beta, settings.beta_min), settings.beta_max)
