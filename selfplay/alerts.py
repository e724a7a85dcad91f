"""Alerts to a webhook: kept until it has taken or refused them, over its outages and, in the ledger, over restarts."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from typing import Any

import httpx
import tenacity

from selfplay.store import Store

logger = logging.getLogger(__name__)

STATE = "alerts"  # name of the unsent ones in the ledger
MOST = 20  # unsent alerts that are kept, the newest
LONGEST_WAIT = 300.0  # seconds between two tries
PASSING = (408, 425, 429)  # client errors that the same alert may not meet again

Alert = dict[str, Any]


class Alerts:
    """Posts alerts as JSON, oldest first, each until it is taken or refused for good, by a client error that does not pass.

    One that was just taken at a kill is posted twice.

    url: the address, a secret that goes into no message, or None where there is none: alerts then stay unsent.
    stopping: ends the tries; what is unsent then waits in the ledger.
    """

    def __init__(self, url: Callable[[], str | None], stopping: threading.Event) -> None:
        self._url, self._stopping = url, stopping
        self._lock = threading.Lock()
        self._unsent: list[Alert] = []
        self._changed = False  # since the ledger was told
        self._sender: threading.Thread | None = None
        logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every URL

    def load(self, store: Store) -> None:
        """Go on with what an earlier service left unsent, before what came since."""
        old = store.state(STATE, [])
        with self._lock:
            self._put([*old, *self._unsent])

    def send(self, alert: Alert) -> None:
        """Post an alert in the background."""
        with self._lock:
            self._changed = True
            self._put([*self._unsent, alert])

    def keep(self, store: Store) -> None:
        """Write what is unsent down, where that changed."""
        with self._lock:
            unsent, changed = list(self._unsent), self._changed
            self._changed = False
        if not changed:
            return
        try:
            store.set_state(STATE, unsent)
        except BaseException:
            self._changed = True
            raise

    def _put(self, alerts: list[Alert]) -> None:
        """Have these sent; under the lock."""
        self._unsent = alerts[-MOST:]
        if self._sender is None and self._unsent and self._url():
            self._sender = threading.Thread(target=self._work, name="webhook", daemon=True)
            self._sender.start()

    def _work(self) -> None:
        tries = tenacity.Retrying(
            wait=tenacity.wait_random_exponential(max=LONGEST_WAIT),
            stop=tenacity.stop_when_event_set(self._stopping),
            sleep=tenacity.sleep_using_event(self._stopping),
        )
        while True:
            with self._lock:
                if not self._unsent:
                    self._sender = None
                    return
                alert = self._unsent[0]
            try:
                tries(self._post, alert)
            except tenacity.RetryError:
                return
            with self._lock:
                self._unsent = [other for other in self._unsent if other is not alert]
                self._changed = True

    def _post(self, alert: Alert) -> None:
        """Raises whatever kept it from being taken for now; returns when it is taken, or refused for good."""
        body, headers = json.dumps(alert), {"content-type": "application/json"}  # in ASCII, whatever characters it has
        try:
            answer = httpx.post(self._url() or "", content=body, headers=headers, timeout=10)
            if answer.is_client_error and answer.status_code not in PASSING:
                logger.error("the webhook refused an alert, which is dropped (%d)", answer.status_code)
                return
            answer.raise_for_status()
        except Exception as error:  # of the network, the URL, the certificates; its text may name the URL
            logger.warning("the webhook did not take an alert (%s)", type(error).__name__)
            raise
