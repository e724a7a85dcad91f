"""`selfplay doctor`: say what is wrong in a run folder, and mend what can be mended."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from selfplay.visible import say


def doctor(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, in which nobody works.")],
    yes: Annotated[bool, typer.Option("--yes", help="Mend what can be mended without a question.")] = False,
) -> None:
    """Look at every file of a run folder, and mend what can be made again.

    Nothing is changed before you have said yes. Exit codes: 0 nothing is wrong, or all was mended; 2 the folder cannot be looked
    at, or a runner is at work in it; 3 something is damaged that was not mended.
    """
    from rich.table import Column, Table
    from rich.text import Text

    from selfplay.doctor.look import look
    from selfplay.errors import InputError
    from selfplay.processes.places import take_own_umask
    from selfplay.reporting.console import TextConsole
    from selfplay.storage import lease
    from selfplay.storage.lock import RunLock

    if not any((run / name).exists() for name in ("ledger.sqlite", "pool", "rounds")):
        raise InputError(f"{run} is no run folder", "name the folder of a run, such as runs/tiny")
    take_own_umask()
    with RunLock(run, "lease" if lease.is_used(run) else "flock"):
        found = look(run)
        if not found:
            say(f"{run}: nothing is wrong")
            return
        table = Table("file", "what is wrong", Column("what can be done", overflow="fold"), box=None, padding=(0, 1))
        for each in found:
            name = each.path.relative_to(run) if each.path.is_relative_to(run) else each.path
            mend = each.mend if each.repair is None else f"{each.mend} (by doctor)"
            table.add_row(Text(str(name)), Text(each.what.replace(f"{run}/", "")), Text(mend))
        TextConsole().print(table)
        able = [each for each in found if each.repair is not None]
        if able and (yes or _asked(len(able))):
            for each in able:
                assert each.repair is not None
                each.repair()
            say(f"mended: {len(able)} of {len(found)}")
            found = look(run)  # what was found may have hidden something
        if found:
            raise typer.Exit(3)


def _asked(count: int) -> bool:
    """Whether a person wants what can be mended to be mended; no where nobody can be asked."""
    try:
        return typer.confirm(f"mend {count} of these?", default=False)
    except typer.Abort:
        return False
