"""Alerts to a webhook: kept until it has taken or refused them, over its outages and, in the ledger, over restarts."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable
from typing import Any, Self

import tenacity

from reward.http import ask
from reward.proxies import proxy_of
from selfplay.config.service import ServiceConfig
from selfplay.storage.ledger import Store
from selfplay.visible import visible

logger = logging.getLogger(__name__)

STATE = "alerts"  # name of the unsent ones in the ledger
TROUBLE = "webhook"  # and of what is wrong with the webhook
MOST = 20  # unsent alerts that are kept, the newest
LONGEST_WAIT = 300.0  # seconds between two tries
SECONDS = 10.0  # for one post
REFUSED = (400, 413, 415, 422)  # what is wrong with this alert; other errors are about the address, or pass

Alert = dict[str, Any]


class NotTaken(Exception):
    """The webhook answers with a status that is no success."""

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status


class Alerts:
    """Posts alerts as JSON, oldest first, each until it is taken or refused for what is in it.

    One that was just taken at a kill is posted twice. What is wrong with the webhook is in the ledger, for people to see.

    url: the address, a secret that goes into no message, or None where there is none: alerts then stay unsent.
    stopping: ends the tries; what is unsent then waits in the ledger.
    proxy: the name of the environment variable with the address of a proxy before the webhook, or None.
    """

    def __init__(
        self,
        url: Callable[[], str | None],
        stopping: threading.Event,
        proxy: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._url, self._stopping, self._proxy = url, stopping, proxy
        self._lock = threading.Lock()
        self._unsent: list[Alert] = []
        self._changed = False  # since the ledger was told
        self._trouble = self._told = ""  # what is wrong with the webhook, and what of it is in the ledger
        self._sender: threading.Thread | None = None

    @classmethod
    def of(cls, settings: Callable[[], ServiceConfig], stopping: threading.Event) -> Self:
        """Alerts to the webhook of a configuration, which may change."""
        return cls(lambda: os.environ.get(settings().webhook_env), stopping, lambda: settings().webhook_proxy_env)

    def load(self, store: Store) -> None:
        """Go on with what an earlier service left unsent, before what came since."""
        old = store.state(STATE, [])
        self._told = store.state(TROUBLE, "")
        with self._lock:
            self._trouble = self._trouble or (self._told if self._url() else "")
            self._put([*old, *self._unsent])

    def send(self, alert: Alert) -> None:
        """Post an alert in the background."""
        with self._lock:
            self._changed = True
            self._put([*self._unsent, alert])

    def keep(self, store: Store) -> None:
        """Write down what is unsent and what is wrong, where that changed."""
        with self._lock:
            unsent, changed, trouble = list(self._unsent), self._changed, self._trouble
            self._changed = False
        if not changed and trouble == self._told:
            return
        try:
            store.set_state(STATE, unsent)
            if trouble != self._told:
                store.set_state(TROUBLE, trouble)
                if not (trouble and self._told):  # an outage that shows in one way after another is one event
                    store.event(TROUBLE, trouble or "the webhook takes alerts")
                self._told = trouble
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
        try:
            status = post(self._url() or "", alert, proxy_of(self._proxy()))
        except Exception as error:
            self._trouble = f"the webhook does not take alerts ({said(error)})"
            logger.warning(self._trouble)
            raise
        self._trouble = "" if status not in REFUSED else f"the webhook refused an alert, which is dropped ({status})"
        if self._trouble:
            logger.error(self._trouble)


def post(url: str, alert: Alert, proxy: str | None = None) -> int:
    """Post one alert; the status of the answer, of success or one of REFUSED. Raises whatever kept it from being taken."""
    shown = {name: visible(value) if isinstance(value, str) else value for name, value in alert.items()}
    body, headers = json.dumps(shown), {"content-type": "application/json"}  # in ASCII, whatever characters it has
    answer = ask("POST", url, body=body.encode(), headers=headers, seconds=SECONDS, limit=0, proxy=proxy)
    if not answer.success and answer.status not in REFUSED:
        raise NotTaken(answer.status)
    return answer.status


def said(error: Exception) -> str:
    """What an exception of the network, the URL or the certificates is, without its text, which may name the URL."""
    return str(error.status) if isinstance(error, NotTaken) else type(error).__name__
