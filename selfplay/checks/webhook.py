"""Looks at the webhook of the alerts: does it answer, and does it take a test alert where one is asked for?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from reward.http import ask
from reward.proxies import proxy_of
from selfplay.checks.finding import Finding
from selfplay.config import Config
from selfplay.service.alerts import REFUSED, SECONDS, post, said

TEST = "a test by selfplay check: nothing is wrong"


def answers(config: Config, run_dir: Path) -> Iterator[Finding]:
    """Whether the address answers. It is asked with a HEAD, which no receiver takes for an alert; any status is an answer.

    The URL is a secret, and appears in no text.
    """
    name = config.service.webhook_env
    if not (url := os.environ.get(name)):
        yield Finding.ok("webhook", f"there is none: ${name} is not set, so alerts are posted nowhere")
        return
    try:
        status = ask("HEAD", url, seconds=SECONDS, limit=0, proxy=proxy_of(config.service.webhook_proxy_env)).status
    except Exception as error:  # the network, the URL or the certificates
        yield Finding.warning("webhook", f"the address in ${name} does not answer ({said(error)})")
        return
    text = f"the address in ${name} answers ({status} to a HEAD); --test-webhook tells whether it takes an alert"
    yield Finding.ok("webhook", text)


def takes(config: Config) -> Finding:
    """Post an alert that says it is a test."""
    name = config.service.webhook_env
    if not (url := os.environ.get(name)):
        return Finding.error("webhook", f"${name} is not set: there is nowhere to post to")
    alert = {"run": config.run.name, "kind": "test", "text": TEST, "time": datetime.now(UTC).isoformat()}
    try:
        status = post(url, alert, proxy_of(config.service.webhook_proxy_env))
    except Exception as error:  # as above
        return Finding.error("webhook", f"the address does not take a test alert ({said(error)})")
    if status in REFUSED:
        return Finding.error("webhook", f"the address refuses a test alert ({status})")
    return Finding.ok("webhook", f"the address took a test alert ({status})")
