"""`selfplay serve`: the daemon, its signals, and the HTTP server of API and page beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from selfplay.errors import SelfplayError
from selfplay.processes.places import take_own_umask
from selfplay.reporting.terminal import Display
from selfplay.rounds.command import leave
from selfplay.service import systemd
from selfplay.service.daemon import Daemon
from selfplay.service.stop import handle_signals
from selfplay.storage import tables
from selfplay.visible import filter_stderr
from selfplay.web.access import read_token
from selfplay.web.api import create_app
from selfplay.web.server import serve_in_thread


def serve(config: Path, overrides: Sequence[str] = (), run_dir: Path | None = None) -> int:
    """Serve a run folder until SIGTERM or SIGINT; returns the exit code, 0 after a clean stop, else that of the error."""
    filter_stderr()
    take_own_umask()
    display = Display()
    tables.leave_pandas_out()
    try:
        daemon = Daemon(config, list(overrides), run_dir, display)
        settings = daemon.config.service
        token = read_token(settings)
        server, port = serve_in_thread(
            create_app(daemon.run_dir, daemon.config, lambda: dict(daemon.progress), token), settings
        )
        display.note(f"page and API: http://{settings.host}:{port}")
        here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
        systemd.keep_watchdog(f"http://[{here}]:{port}" if ":" in here else f"http://{here}:{port}")
        systemd.tell("READY=1")
        daemon.end_with(lambda: leave(0))  # all that is finished is on disk, and no child is left
        handle_signals(daemon.stop, daemon.reload)
        try:
            daemon.serve()
        finally:
            systemd.tell("STOPPING=1")
            server.stop()
        return 0
    except SelfplayError as error:
        display.error(error)
        return error.exit_code
