"""One self-play round, from prompts to the swap: durable stages, called in order.

A stage that has its folder is never run again; one that has not leaves no trace (`rounds/frame.py`). `generate` and `score`
keep finished shards, `train` its checkpoints. `rounds/steps.py` says what each stage is given.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any, Literal

from selfplay.errors import CheckpointError
from selfplay.pairs.selection import advice, why_none
from selfplay.pairs.writing import read_ranked
from selfplay.publishing.publish import publish
from selfplay.rounds import reference
from selfplay.rounds.frame import GIVE_UP
from selfplay.rounds.run import Run
from selfplay.rounds.stages import (
    DEPTH,
    EVALUATE,
    EVOLVE,
    GENERATE,
    GUARD,
    PAIRS,
    PROMOTE,
    PROMPTS,
    SCORE,
    SUITE,
    TRAIN,
)
from selfplay.rounds.steps import Steps
from selfplay.storage import agreement, closed, folders, policies, retention
from selfplay.storage.reader import CANCEL
from selfplay.storage.references import References
from selfplay.types import Policy, RoundReport

Outcome = Literal["promoted", "rejected", "skipped", "cancelled"]


def run_round(run: Run) -> RoundReport:
    """Complete the unfinished round of a run, or do the next one. Raises StageFailed; what was finished is kept.

    A round that was to be given up when all ended is given up, however far it had come.
    """
    is_open = run.store.unfinished()
    if is_open is not None and run.store.state(CANCEL) == is_open["round"]:
        return cancel_round(run)
    steps = begin(run)
    do, config = steps.frame.do, run.config
    if steps.adopted and not steps.frame.done(TRAIN):
        raise CheckpointError(
            f"{steps.frame.dir / 'train'} is gone, but the policy that was trained there is "
            f"{run.policies.folder(steps.index)}: trained again it would be another one",
            GIVE_UP,
        )
    run.warm_up()
    steps.expect_training()  # the trainer pays for its imports while the engine samples
    with contextlib.ExitStack() as at_the_end:
        at_the_end.callback(run.stop_early)
        at_the_end.enter_context(run.trainer.for_a_round())
        do(PROMPTS, steps.prompts, total=config.prompts.per_round)
        run.draws.record(steps.index)
        steps.expect_training()  # anew where it has ended with an order of that stage
        do(GENERATE, steps.generate, total=steps.drawn)
        do(SCORE, steps.score, total=steps.drawn * config.generate.candidates)
        do(GUARD, steps.guard)
        do(PAIRS, steps.pairs)
        pairs = read_ranked(steps.frame.path("pairs/pairs.parquet"))
        run.store.record_pairs(steps.index, pairs)
        if not any(pair.kept_because for pair in pairs):
            found, cut_off = steps.frame.metrics(PAIRS), steps.frame.metrics(GENERATE)["cut_off_share"]
            why = [f"no pair was left to train on{why_none(found)}", advice(found, cut_off)]
            return close(steps, "skipped", [text for text in why if text])
        if steps.evolves:
            do(EVOLVE, steps.evolve)
            steps.join_rewrites()
        do(DEPTH, steps.depth)
        do(TRAIN, steps.train)
        run.policies.adopt(steps.index, steps.frame.path("train/policy"))
        record_candidate(steps)
        do(EVALUATE, steps.evaluate)
        if steps.does_suites:
            do(SUITE, steps.suites)
        do(PROMOTE, steps.promote)
    promoted, reasons = steps.decided
    ended = close(steps, "promoted" if promoted else "rejected", reasons)
    publish_current(run)
    return ended


def begin(run: Run) -> Steps:
    """The unfinished round, which goes on with the configuration of now; else a new one."""
    config, fingerprint = run.config.model_dump(mode="json"), run.config.fingerprint()
    row = run.store.unfinished()
    if row is None:
        steps = Steps(run, run.next_round, run.current.version)
        run.store.open_round(steps.index, steps.champion, run.draws.cursor(steps.index), fingerprint, config)
        return steps
    run.display.note(f"round {row['round']} is unfinished: going on with it")
    if row["fingerprint"] != fingerprint:
        text = f"round {row['round']} goes on with a changed configuration; finished stages are kept"
        run.event("config", text)
        run.store.change_config(row["round"], fingerprint, config)
    return Steps(run, row["round"], row["champion"])


def close(steps: Steps, outcome: Outcome, reasons: Sequence[str]) -> RoundReport:
    """Record how a round ended, and delete what nothing needs any more."""
    run, store, index = steps.run, steps.run.store, steps.index
    current = run.current
    if steps.adopted:
        store.record_policy(index, outcome)
    for scratch in steps.frame.dir.iterdir() if steps.frame.dir.is_dir() else ():
        if scratch.name.endswith((".shards", ".work", ".partial")):  # the last where a killed one was given up
            folders.delete(scratch)
    needed = {
        current.version,
        current.parent,
        steps.champion,
        reference.version(run.config.train, index, store),
    }
    retention.apply(
        run_dir=run.dir,
        settings=run.config.retention,
        store=store,
        closed=index,
        needed_policies={version for version in needed if version is not None},
        needed_rounds=max(run.config.guard.history, run.config.pairs.history),
    )
    reference.forget(References(run.dir), run.config.train, index, given_up=outcome == "cancelled")
    closed.write(steps.frame.dir, store, index, state=outcome, policy=current.version, reasons=list(reasons))
    told = "; ".join(reasons) or f"policy {current.version} is current"
    store.close_round(index, outcome, current.version, list(reasons), told)
    ended = report(store, index)
    run.track(ended)
    return ended


def cancel_round(run: Run) -> RoundReport:
    """Give up the open round: nothing of it is used, and the policy that served before it serves on, or again.

    The ledger says so first: killed after it has made the champion current again, a promoted round is not to close as promoted.
    """
    assert run.store.unfinished() is not None, "there is a round to give up"
    steps = begin(run)
    run.store.set_state(CANCEL, steps.index)
    steps.frame.record_finished()
    if steps.adopted:  # it may have been adopted a moment before all ended
        record_candidate(steps)
    champion = run.policy(steps.champion)
    if run.store.serving() != champion.version:  # it was cut off after its promotion
        _show(run, champion)
        agreement.set_current(run.store, run.policies, champion.version)
    elif run.serving.loaded:
        run.serving.serve(champion, trial=False)
    return close(steps, "cancelled", ["given up on request"])


def roll_back(run: Run, version: int) -> str:
    """Make an earlier policy the current one, once the engine was shown to serve it; between rounds. Returns what was done.

    The one that serves may be what is wrong: nothing asks whether its files are whole.
    """
    assert run.store.unfinished() is None, "a round's policies are not changed under it"
    before, wanted = run.store.serving(), run.policy(version)
    policies.verify(run.policies.folder(version))
    began = time.monotonic()
    _show(run, wanted)
    agreement.set_current(run.store, run.policies, version)
    publish_current(run)
    return f"policy {version} is current instead of {before}, shown to serve within {time.monotonic() - began:.2f} s"


def _show(run: Run, policy: Policy) -> None:
    """Have the engine serve a policy, and show that it does, whatever policy is current."""
    if run.serving.loaded:
        run.generator.swap(policy)
    else:
        run.generator.load(policy)


def publish_current(run: Run, retry: bool = False) -> None:
    """Have the targets of `publish` get the current policy. `retry`: also those that failed with it before."""
    publish(run.config, run.dir, run.store, run.display, run.alert, retry)


def record_candidate(steps: Steps) -> None:
    """Enter the trained policy in the ledger."""
    store, index = steps.run.store, steps.index
    manifest = policies.read(steps.run.policies.folder(index))
    if not any(p["version"] == index for p in store.policies()):
        store.record_policy(
            index, "candidate", round=index, parent=manifest.parent, reference=manifest.reference, beta=manifest.beta
        )


def report(store: Any, index: int) -> RoundReport:
    """The report of a finished round, from the ledger."""
    row = store.round(index)
    return RoundReport(
        round=index,
        outcome=row["state"],
        policy=row["policy"],
        metrics=store.metrics(index),
        seconds=store.seconds(index),
        reasons=row["reasons"],
    )
