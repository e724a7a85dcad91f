"""Looks at the targets of `publish`: a token, a folder of one's own, servers that take weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from selfplay.checks.finding import Finding
from selfplay.config import Config
from selfplay.errors import InputError, PublishError
from selfplay.publishing import folder, hub
from selfplay.publishing.publish import server


def targets(config: Config, run_dir: Path) -> Iterator[Finding]:
    """Whether each could be published to. A server that does not answer now is a warning: it fails no round."""
    settings = config.publish
    if settings.hub is not None:
        try:
            hub.require_token()
            yield Finding.ok(
                "publish.hub", f"{settings.hub}; whether the token may write there, the first upload will show"
            )
        except InputError as error:
            yield Finding.error("publish.hub", f"{error}; {error.hint}")
    if settings.folder is not None:
        root = settings.folder.resolve()
        there = next(path for path in [root, *root.parents] if path.exists())
        try:
            folder.listed(root, config.run.name)
            if not there.is_dir() or not os.access(there, os.W_OK):
                raise InputError(f"publish.folder: user {os.getuid()} cannot write to {there}", "name another folder")
            yield Finding.ok("publish.folder", str(root))
        except InputError as error:
            yield Finding.error("publish.folder", f"{error}; {error.hint}")
    for url in settings.vllm:
        try:
            server(config, url).open()
            yield Finding.ok("publish.vllm", f"{url} takes weights in place")
        except PublishError as error:
            yield Finding.warning("publish.vllm", f"{error}; {error.hint}")
