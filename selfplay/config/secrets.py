"""Which environment variables hold secrets, as far as a configuration names them."""

from __future__ import annotations

from pathlib import Path

from reward.settings import ModelSettings
from selfplay.config import Config, RewardSource

HUB = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""The key of the Hub: its library reads either. They are for the children that fetch from there."""


def named(config: Config) -> set[str]:
    """All that are not for every child: the token of the service, the address of the webhook, the keys of rewards, judges,
    suites and of the servers that get new policies, and that of the Hub."""
    own = {config.service.token_env, config.service.webhook_env, config.publish.api_key_env or ""}
    return own.union(HUB, *map(of, config.all_sources().values())) - {""}


def of(source: RewardSource) -> set[str]:
    """Those that one source of scores needs. A setting of a kind that names a variable ends in `_env`. A model by its name is
    fetched."""
    served = source.served()
    given = {"api_key_env": source.api_key_env} if served is None else dict(served[1])
    found = {str(value) for name, value in given.items() if name.endswith("_env") and name != "proxy_env" and value}
    return found.union(to_load(served[1].model)) if served and isinstance(served[1], ModelSettings) else found


def to_load(model: str) -> tuple[str, ...]:
    """Those that a child needs which loads this model: a folder, or a name on the Hub."""
    return () if Path(model).expanduser().is_dir() else HUB
