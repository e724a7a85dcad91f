"""What systemd is told of the service: that it is up, that its server still answers, that it stops (sd_notify(3)).

Where systemd did not start it, $NOTIFY_SOCKET is not set and nothing is sent.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading

from reward.http import HttpError, ask


def tell(state: str) -> None:
    """Send «READY=1», «WATCHDOG=1», «STOPPING=1»."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, contextlib.suppress(OSError):
        sender.connect("\0" + address[1:] if address.startswith("@") else address)
        sender.sendall(state.encode())


def keep_watchdog(url: str) -> None:
    """While the server at `url` answers `/healthz`, say so three times in the unit's WatchdogSec; returns at once."""
    if not (period := int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6):
        return

    def beat() -> None:
        pause = threading.Event()
        while not pause.wait(period / 3):
            with contextlib.suppress(HttpError):
                if ask("GET", f"{url}/healthz", seconds=period / 3, limit=0).success:
                    tell("WATCHDOG=1")

    threading.Thread(target=beat, name="watchdog", daemon=True).start()
