"""The library of the Hub, on connections that a slow or hostile server cannot stretch.

`huggingface_hub` decides what is asked. How, is decided here as for all services that this program asks (`reward.http`). Whoever
loads a model or a data set by its name calls `bounded` before.
"""

import os
from functools import cache

XET = "HF_HUB_DISABLE_XET"


@cache
def bounded() -> None:
    """Have the requests of `huggingface_hub` go by `reward.hub_transport` from now on, in all of this process.

    Its second way to fetch weights, by the program Xet, has connections of its own: it is used where HF_HUB_DISABLE_XET=0 asks
    for it.
    """
    os.environ.setdefault(XET, "1")
    import huggingface_hub
    from huggingface_hub import constants

    from reward import hub_transport

    constants.HF_HUB_DISABLE_XET = os.environ[XET].upper() in constants.ENV_VARS_TRUE_VALUES
    huggingface_hub.set_client_factory(hub_transport.client)
