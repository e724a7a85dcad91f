"""The section `service`: the address of API and page, and how the service meets failures."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from selfplay.config.base import Positive, Section


def _network(text: str) -> str:
    try:
        ipaddress.ip_network(text)
    except ValueError:
        raise ValueError(f"{text!r} is neither an IP address nor a network, such as 10.0.0.0/8") from None
    return text


class ServiceConfig(Section):
    host: str = "127.0.0.1"
    """Address of API and page; any but a loopback address demands a token."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8470
    """Port of API and page; 0 takes a free one."""
    hosts: list[str] = []
    """Further names that the page is reached by, such as that of a reverse proxy; addresses and localhost always are."""
    proxies: list[Annotated[str, AfterValidator(_network)]] = []
    """Addresses or networks of reverse proxies. What they say of the client is believed (X-Forwarded-For, X-Forwarded-Proto),
    of nobody else; and they may have more than a fourth of the connections, as clients of this machine may."""
    connections: Annotated[int, Field(ge=32)] = 256
    """Connections to API and page at a time; fewer where the limit of descriptors leaves less. When all are taken, the one
    that says nothing for longest goes when another comes."""
    token_env: str = "SELFPLAY_TOKEN"
    """Environment variable with the bearer token. The token itself never stands in a configuration."""
    token_file: Path | None = None
    """File with the bearer token, instead of the variable."""
    drain_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Time that a shard, or the save of the trainer, gets to finish on SIGTERM; then it is cut."""
    retries: Annotated[int, Field(ge=0)] = 2
    """Times a failed stage is tried again, with back-off, before the service pauses itself."""
    retry_seconds: Annotated[float, Field(ge=0)] = 30.0
    """Seconds before the first retry; each further one waits twice as long."""
    stall_hours: Annotated[float, Field(gt=0)] = 6.0
    """Hours in which neither a stage gets on nor a process of the service says a word, after which these are ended and what
    they did is tried again; never less than the `silence` of engine and trainer, which end one that hangs much sooner. A
    download is silent: more where a model or a data set takes longer."""
    pause_after_rejected: Positive = 3
    """Rounds in a row that changed no policy, after which the service pauses itself: rejected by the gate, or skipped because no
    pair was left to train on."""
    webhook_env: str = "SELFPLAY_WEBHOOK"
    """Environment variable with the URL that alerts are posted to as JSON; unset: none."""
    webhook_proxy_env: str | None = None
    """Environment variable with the address of the HTTP proxy before the webhook, such as HTTPS_PROXY; by default none is
    used."""
