"""Functions of the user that a setting names as `module:function`."""

from __future__ import annotations

import importlib
from typing import Any

from selfplay.errors import InputError


def load_function(key: str, name: str | None) -> Any:
    """The function `module:function` that the setting `key` names; raises InputError when it cannot be imported."""
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{key}: {name} cannot be imported: {error}") from None
