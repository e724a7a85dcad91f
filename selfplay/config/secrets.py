"""Which environment variables hold secrets, as far as a configuration names them."""

from __future__ import annotations

from selfplay.config import Config, RewardSource

HUB = "HF_TOKEN"
"""All children that fetch models need it, although it may be the key of a judge as well."""


def named(config: Config) -> set[str]:
    """All that are not for every child: the token of the service, the address of the webhook, and the keys of rewards, judges,
    suites and of the servers that get new policies."""
    own = {config.service.token_env, config.service.webhook_env, config.publish.api_key_env or ""}
    return own.union(*map(of, config.all_sources().values())) - {"", HUB}


def of(source: RewardSource) -> set[str]:
    """Those that one source of scores needs. A setting of a kind that names a variable ends in `_env`."""
    served = source.served()
    given = {"api_key_env": source.api_key_env} if served is None else dict(served[1])
    return {str(value) for name, value in given.items() if name.endswith("_env") and name != "proxy_env" and value}
