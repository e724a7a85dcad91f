"""Reading a configuration: a YAML file, overrides `a.b=c`, and errors that name the key."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from selfplay.config.schema import Config
from selfplay.errors import ConfigError

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Of plain data alone. The one in C, which most builds of PyYAML have, takes an eighth of the time."""


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, apply overrides `a.b=c` (values are YAML) and validate. Raises ConfigError."""
    path = Path(path)
    try:
        data = _parsed(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = "name a configuration with --config; `selfplay init` writes one, configs/tiny.yaml is an example"
        raise ConfigError(f"{path}: no such file", hint) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: not a mapping of sections", "see configs/tiny.yaml for the form")
    for override in overrides:
        _override(data, override)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{path}: " + "; ".join(_describe(e) for e in error.errors())) from None


def _parsed(text: str) -> Any:
    loader = LOADER(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: not of the form a.b=c", "such as --set train.beta=0.1")
    *parents, last = key.split(".")
    for name in parents:
        below = data.setdefault(name, {})
        if below is None:
            below = data[name] = {}
        if not isinstance(below, dict):
            raise ConfigError(f"--set {override}: {name} is a value, not a section")
        data = below
    try:
        data[last] = _parsed(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML: {error}") from None


def _describe(error: Any) -> str:
    """One validation error as «path: what»; an unknown key gets the nearest valid name."""
    loc = [str(part) for part in error["loc"]]
    where = ".".join(loc) or "configuration"
    if error["type"] == "extra_forbidden":
        names = _fields(Config, loc[:-1])
        near = difflib.get_close_matches(loc[-1], names, n=1, cutoff=0.5)
        return f"{where}: unknown key" + (
            f", did you mean {'.'.join([*loc[:-1], near[0]])}?" if near else f"; known: {', '.join(names)}"
        )
    if error["type"] == "missing":
        return f"{where}: required"
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" + (f" (got {error['input']!r})" if error["type"] != "value_error" else "")


def _fields(section: type[BaseModel], loc: list[str]) -> list[str]:
    for part in loc:
        if part not in section.model_fields:
            continue  # the name of a union member, which pydantic puts into the path
        annotation = section.model_fields[part].annotation
        members = (
            typing.get_args(annotation)
            if typing.get_origin(annotation) in (typing.Union, types.UnionType)
            else (annotation,)
        )
        section = next((m for m in members if isinstance(m, type) and issubclass(m, BaseModel)), section)
    return list(section.model_fields)
