"""Everything in a run folder, looked at: every file is read and hashed."""

from __future__ import annotations

from pathlib import Path

from selfplay.doctor import beside, ledger, policies, stages
from selfplay.doctor.finding import Finding
from selfplay.storage import hashes


def look(run_dir: Path) -> list[Finding]:
    """What is damaged, gone or left over in a run folder that nobody works in."""
    hashes.forget()
    store, broken = ledger.opened(run_dir)
    found = [] if broken is None else [broken]
    open_round = None
    try:
        if store is not None:
            found += ledger.look(run_dir, store)
            is_open = store.unfinished()
            open_round = store.last_round() + 1 if is_open is None else is_open["round"]
        found += policies.look(run_dir, store)
        found += stages.look(run_dir, store)
        found += beside.look(run_dir, store, open_round)
    finally:
        if store is not None:
            store.close()  # what mends with it opens it again
    return found
