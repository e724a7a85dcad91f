"""Who else on this machine can read what the run keeps: the token, and the prompts and answers in the run folder."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

from selfplay.checks.finding import Finding
from selfplay.config import Config

OTHERS, NOT_THE_OWNER = 0o007, 0o077


def owners_alone(config: Config, run_dir: Path) -> Iterator[Finding]:
    """Whether file and folder are closed to other accounts. A group may read the token: the service is often its member."""
    token, found = config.service.token_file, False
    for path, closed, what in ((token, OTHERS, "chmod 600"), (run_dir, NOT_THE_OWNER, "chmod 700")):
        if path is not None and path.exists() and (mode := stat.S_IMODE(path.stat().st_mode)) & closed:
            found = True
            text = f"other accounts of this machine can read {path} (mode {mode:03o}): {what} {path}"
            yield Finding.warning("permissions", text)
    if not found:
        yield Finding.ok("permissions", "the run folder and the token are for their owner alone")
