"""The command `selfplay export`: pairs or a policy into a folder, or a policy to the Hub."""

from __future__ import annotations

from pathlib import Path

from selfplay.errors import InputError
from selfplay.publishing import hub, scratch
from selfplay.reporting.export import export_pairs, export_policy
from selfplay.storage.ledger import Store
from selfplay.visible import say


def run_export(run_dir: Path, what: str, out: Path | None, version: int | None, push: str | None, public: bool) -> None:
    """Export, and print what was done. Raises InputError for what does not go together, PublishError."""
    if what not in ("pairs", "policy"):
        raise InputError(f"cannot export {what!r}", "export `pairs`, or a `policy`")
    if out is None and push is None:
        raise InputError("where to?", "name a folder to make, or a repository with --push")
    if what == "pairs":
        if push is not None or out is None:
            raise InputError("--push is for a policy", "name a folder for the pairs")
        say(f"{export_pairs(run_dir, out)} pairs in {out}")
        return
    chosen = version if version is not None else _serving(run_dir)
    if chosen is None:
        raise InputError(f"{run_dir} has no policy yet", "the first round imports one")
    if push is None:
        assert out is not None, "one of the two is given"
        export_policy(run_dir, chosen, out)
        say(f"policy {chosen} in {out}")
        return
    hub.require_token()  # before gigabytes are copied
    with scratch.folder(run_dir) as room:
        folder = out or room / "model"
        export_policy(run_dir, chosen, folder)
        commit = hub.upload(folder, push, f"Policy {chosen} of a run of selfplay", private=not public)
    say(f"policy {chosen} is at {commit}" + (f", and in {out}" if out else ""))


def _serving(run_dir: Path) -> int | None:
    store = Store(run_dir)
    try:
        return store.serving()
    finally:
        store.close()
