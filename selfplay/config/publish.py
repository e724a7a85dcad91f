"""The section `publish`: where the current policy goes after each promotion."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from reward.settings import Address
from selfplay.config.base import Section


class PublishConfig(Section):
    """Nothing is published by default. Each target is tried after a promotion and after `selfplay rollback`. One that fails
    fails no round: there is an alert, and it is tried again with the next policy and at the next start."""

    hub: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None = None
    """Repository `owner/name` on the Hub, made where it is missing. The token is in HF_TOKEN, and never in a file."""
    private: bool = True
    """Whether a repository that is made is private."""
    folder: Path | None = None
    """Folder that gets each policy as a folder of its own, and a link `current` to the newest. The one before stays."""
    vllm: list[Address] = []
    """Addresses of running `vllm serve`, which get the weights in place. They need VLLM_SERVER_DEV_MODE=1, and see this run
    folder, or `folder`, under the same path."""
    api_key_env: str | None = None
    """Environment variable with the key of the servers of `vllm`."""
    proxy_env: str | None = None
    """Environment variable with the address of the HTTP proxy before the servers of `vllm`. By default no proxy is
    used."""
    reload_seconds: Annotated[float, Field(gt=0)] = 600.0
    """Time that a server gets to read the weights."""
