"""The section `service`: the address of API and page, and how the service meets failures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from selfplay.config.base import Positive, Section


class ServiceConfig(Section):
    host: str = "127.0.0.1"
    """Address of API and page; any but a loopback address demands a token."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8470
    """Port of API and page; 0 takes a free one."""
    hosts: list[str] = []
    """Further names that the page is reached by, such as that of a reverse proxy; addresses and localhost always are."""
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
