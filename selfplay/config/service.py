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
    """Address of API and page. Any address but a loopback address demands a token."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8470
    """Port of API and page. 0 takes a free one."""
    hosts: list[str] = []
    """Further names by which the page is reached, such as that of a reverse proxy. Addresses and localhost always
    work."""
    proxies: list[Annotated[str, AfterValidator(_network)]] = []
    """Addresses or networks of reverse proxies. Only what these say of a client is believed (X-Forwarded-For,
    X-Forwarded-Proto). They may have more than a fourth of the connections, as clients of this machine may."""
    connections: Annotated[int, Field(ge=32)] = 256
    """Connections to API and page at a time. There are fewer if the limit of descriptors leaves less. If all are taken
    and another one comes, the one that has said nothing for longest is closed."""
    token_env: str = "SELFPLAY_TOKEN"
    """Environment variable with the bearer token. The token itself never stands in a configuration."""
    token_file: Path | None = None
    """File with the bearer token, instead of the variable."""
    drain_seconds: Annotated[float, Field(gt=0)] = 60.0
    """Time that a shard, or the save of the trainer, gets to finish on SIGTERM. After that it is cut off."""
    retries: Annotated[int, Field(ge=0)] = 2
    """Times a failed stage is tried again, with back-off, before the service pauses itself."""
    retry_seconds: Annotated[float, Field(ge=0)] = 30.0
    """Seconds before the first retry. Each further one waits twice as long."""
    stall_hours: Annotated[float, Field(gt=0)] = 6.0
    """Hours without any progress of a stage and without a word of its processes. After that the processes are ended,
    and what they did is tried again. It is never less than the `silence` of engine and trainer, which end a process
    that hangs much sooner. A download is silent, so give more for a model or a data set that takes longer."""
    pause_after_rejected: Positive = 3
    """The service pauses itself after so many rounds in a row that changed no policy. Such a round was rejected by the
    gate, or skipped because no pair was left to train on."""
    webhook_env: str = "SELFPLAY_WEBHOOK"
    """Environment variable with the URL to which alerts are posted as JSON. If it is not set, none are."""
    webhook_proxy_env: str | None = None
    """Environment variable with the address of the HTTP proxy before the webhook, such as HTTPS_PROXY. By default no
    proxy is used."""
