"""Orders to the importer, a child of its own: the controller loads neither tokenizers nor models."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selfplay.config.secrets import HUB
from selfplay.errors import InputError, SelfplayError
from selfplay.processes.child import PATIENT, Child, ChildDied, ChildError
from selfplay.processes.children import owning
from selfplay.processes.logs import last_line

Tell = Callable[[str, str], None]  # kind and text of an event


def ask_importer(
    run_dir: Path,
    order: str,
    on_event: Tell,
    *,
    meanwhile: Callable[[], None] = lambda: None,
    on_progress: Callable[[dict[str, Any]], None] = lambda event: None,
    **fields: Any,
) -> Any:
    """Give one order to an importer and wait for its result. An importer that dies is started once more.

    meanwhile: work that needs no answer, while the importer imports its libraries. Raises InputError, SelfplayError.
    """
    log = run_dir / "logs" / "importer.log"
    for start in range(2):
        child = Child(
            "importer",
            [sys.executable, "-m", "selfplay.prompts.importer"],
            run_dir=run_dir,
            log=log,
            env=owning(*HUB),
            silence=PATIENT,
        )
        child.start()
        try:
            meanwhile()
            return child.order(order, on_progress, **fields)
        except ChildError as error:
            raise InputError(str(error), error.hint) from error
        except ChildDied as error:
            if start:
                raise SelfplayError(f"{error}: {last_line(log)}", f"its log is {log}") from error
            on_event("warning", f"{error}; starting it again")
        finally:
            child.stop()
    raise AssertionError("every start returns or raises")
