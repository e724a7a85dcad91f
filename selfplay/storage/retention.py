"""What a run deletes after a round: weights, the candidates of old rounds, and rows of the ledger.

What a later round still reads stays, whatever the settings say: `needed_policies`, and all that the last `needed_rounds`
rounds left. Manifests, prompts, pairs, verdicts and reports always stay.

Everything is done again after a kill, and nothing is looked for in rounds that are done already: the ledger keeps in its state
`retention` up to which round something was deleted.
"""

from __future__ import annotations

from pathlib import Path

from selfplay.config import RetentionConfig
from selfplay.storage import fences, folders
from selfplay.storage.folders import MANIFEST
from selfplay.storage.ledger import Store
from selfplay.storage.policies import Policies

STATE = "retention"
BEGUN = "deleting"  # a state of the ledger: the policies whose weights were deleted last, or are just now
CANDIDATES, PAIR_ROWS = "candidates", "pair_rows"  # in STATE: the newest round that lost them
FIRST = "first"  # in STATE: the first round whose candidates are just being deleted
SAMPLED = ("generate", "score")  # stages whose rows go with the candidates
ROUNDS_AT_A_TIME = 4  # whose rows of pairs go after one round: a ledger of millions takes several
FOLDERS_AT_A_TIME = 64  # rounds whose candidates go after one round
ROWS_AT_A_TIME = 10_000  # of events and orders
PAGES_AT_A_TIME = 4096  # of the ledger's file, 16 MB: a fraction of a second


def apply(
    *, run_dir: Path, settings: RetentionConfig, store: Store, closed: int, needed_policies: set[int], needed_rounds: int
) -> None:  # fmt: skip
    """Delete what the settings let go, after the round `closed`.

    needed_policies: current, its parent, the policies that later rounds refer to. needed_rounds: the newest rounds that the
    guard or the selection of pairs still compares with (`guard.history`, `pairs.history`). The ledger's file gives back
    free pages in small steps, and only where more than a quarter is free: what the next rounds fill again stays.
    """
    fences.check(run_dir)
    delete_weights(Policies(run_dir), settings, store, closed, needed_policies)
    let_go = closed - max(settings.candidates_rounds, needed_rounds) if settings.candidates_rounds is not None else 0
    delete_candidates(run_dir, store, let_go)
    if settings.pair_rows_rounds is not None:
        delete_pair_rows(store, closed - max(settings.pair_rows_rounds, needed_rounds))
    if settings.event_rows is not None:
        store.delete_events(keep=settings.event_rows, most=ROWS_AT_A_TIME)
    if settings.pair_rows_rounds is not None or settings.event_rows is not None:
        store.give_back_pages(PAGES_AT_A_TIME)


def delete_weights(policies: Policies, settings: RetentionConfig, store: Store, closed: int, needed: set[int]) -> None:
    """Delete the weights of policies that nothing needs any more, and record it. A policy has the number of its round."""
    there = store.policies_with_weights()
    rejected = {row["version"] for row in there if row["state"] in ("rejected", "cancelled")}
    kept = [row["version"] for row in there if row["version"] not in rejected]
    wanted = needed | {0} | set(settings.pinned) | {row["version"] for row in there if row["pinned"]}
    wanted |= set(kept[max(0, len(kept) - settings.last) :])
    wanted |= {version for version in kept if settings.every and version % settings.every == 0}
    wanted |= {version for version in rejected if version + settings.rejected_rounds > closed}
    # The settings may keep what a kill left half deleted; it is of no use, and the rest of it goes.
    begun = {version for version in store.state(BEGUN, []) if not policies.whole(version)}
    gone = [row["version"] for row in there if row["version"] not in wanted or row["version"] in begun]
    if not gone:
        return
    store.set_state(BEGUN, gone)
    for version in gone:
        for path in folders.inside(policies.folder(version)):
            if path.name != MANIFEST:
                folders.delete(path)
    store.weights_deleted(gone)


def delete_candidates(run_dir: Path, store: Store, last: int) -> None:
    """Delete the rows of candidates and scores of the rounds up to `last`, the oldest first, of some rounds only.

    What is JSON stays: manifests, and who scored. The ledger says that the rows are gone before the first file is deleted, so
    that no reader takes what a kill has left of a round for the whole. The next call deletes it, whatever `last` is then.
    """
    found = deleted(store)
    done: int = found.get(CANDIDATES, 0)
    first, last = found.get(FIRST, done + 1), max(done, min(last, done + FOLDERS_AT_A_TIME))
    if first > last:
        return
    store.set_state(STATE, {**found, CANDIDATES: last, FIRST: first})
    for index in range(first, last + 1):
        for stage in SAMPLED:
            for path in folders.inside(run_dir / "rounds" / f"{index:04d}" / stage):
                if path.suffix != ".json":
                    folders.delete(path)
    found.pop(FIRST, None)
    store.set_state(STATE, {**found, CANDIDATES: last})


def delete_pair_rows(store: Store, last: int) -> None:
    """Delete the rows of pairs of the rounds up to `last`, the oldest first, of some rounds only. The artifacts stay."""
    for index in store.rounds_with_pairs(last, ROUNDS_AT_A_TIME):
        store.record_pairs(index, ())
        _record(store, PAIR_ROWS, index)


def deleted(store: Store) -> dict[str, int]:
    """The newest round that lost something to retention, by what it lost."""
    found: dict[str, int] = store.state(STATE, {})
    return found


def lost_pair_rows(store: Store, index: int | None) -> str:
    """A sentence where lists of pairs lack those of a round (None: of any) since retention deleted them; else empty."""
    last = deleted(store).get(PAIR_ROWS, 0)
    if not last or (index is not None and index > last):
        return ""
    return (
        f"Retention has deleted the pairs of the rounds up to {last} from the lists (retention.pair_rows_rounds). The pairs"
        " themselves are kept in the folders of their rounds."
    )


def lost(store: Store, index: int) -> list[str]:
    """What retention has deleted of a round, as sentences for people."""
    sentences = []
    if index <= deleted(store).get(CANDIDATES, 0):
        sentences.append(
            "Retention has deleted the candidates of this round and their scores (retention.candidates_rounds). Its pairs"
            " and its verdict are kept."
        )
    if rows := lost_pair_rows(store, index):
        sentences.append(rows)
    return sentences


def _record(store: Store, what: str, index: int) -> None:
    """Note that retention has come to a round, where it has not come there before."""
    found = deleted(store)
    if index > found.get(what, 0):
        store.set_state(STATE, {**found, what: index})
