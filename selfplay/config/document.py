"""Writes the reference of all settings: `python -m selfplay.config.document > docs/configuration.md`.

Names, types, defaults and explanations come from the schema. A test compares the output with the file, so the page always
describes the settings as they are.
"""

from __future__ import annotations

import functools
import inspect
import json
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from selfplay.config import Config

INTRODUCTION = """# Settings

This page is made from the schema, by `python -m selfplay.config.document > docs/configuration.md`. Do not edit it by hand.

A configuration is a YAML file with the sections below. A setting that has a default may be left out. An unknown key is an
error, and the error names the nearest key that exists. On the command line, `--set section.key=value` replaces one value.
"""
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}  # as JSON schema names them

Row = tuple[str, str, str, str]  # setting, type, default, meaning


def document() -> str:
    """The whole page, as Markdown."""
    seen: dict[Row, str] = {}
    parts = [INTRODUCTION, *nested("", Config, seen)]
    alone = [row(Config, name) for name, field in Config.model_fields.items() if not models(field)]
    return "\n".join([*parts, "## Outside of the sections\n", table(alone)])


def nested(path: str, model: type[BaseModel], seen: dict[Row, str]) -> Iterator[str]:
    """Every section inside the section `path`. Fields that hold the same kind of section share one heading."""
    alike: dict[tuple[type[BaseModel], ...], list[str]] = {}
    for name, field in model.model_fields.items():
        if forms := models(field):
            alike.setdefault(forms, []).append(name)
    for forms, names in alike.items():
        field = model.model_fields[names[0]]
        for form in forms:
            title = ", ".join(f"`{path}{name}`" for name in names)
            if len(forms) > 1 and (which := constant(form)):
                title += f" with `{which}`"
            explanation = "" if len(names) > 1 or len(forms) > 1 else field.description or ""
            yield from section(f"{path}{names[0]}", title, explanation, form, seen)


def section(
    path: str, title: str, explanation: str, model: type[BaseModel], seen: dict[Row, str]
) -> Iterator[str]:  # fmt: skip
    """One section, then those inside it. Rows that an earlier section already had are only named; `seen` says where."""
    rows = [row(model, name) for name in model.model_fields]
    new = [r for r in rows if r not in seen]
    lines = [f"{'#' * min(2 + path.count('.'), 4)} {title}", ""]
    own = inspect.getdoc(model) if "__doc__" in vars(model) and model.__doc__ else ""
    if words := " ".join(part for part in ("" if own and explanation in own else explanation, own) if part):
        lines += [cell(words), ""]
    if new:
        lines.append(table(new))
    for earlier in dict.fromkeys(seen[r] for r in rows if r in seen):
        names = ", ".join(f"`{r[0]}`" for r in rows if seen.get(r) == earlier)
        lines += [f"As in {earlier}: {names}.", ""]
    yield "\n".join(lines)
    if new:
        seen |= dict.fromkeys(new, title)
        yield from nested(f"{path}.", model, seen)


def models(field: FieldInfo) -> tuple[type[BaseModel], ...]:
    """The forms that a field's section can have; none for a field that is a plain value."""

    def inside(annotation: Any) -> Iterator[type[BaseModel]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield annotation
        for part in typing.get_args(annotation):
            yield from inside(part)

    return tuple(inside(field.annotation))


def constant(model: type[BaseModel]) -> str:
    """`rule: length` for a model with the field `rule: Literal["length"]`, which tells its form from the others."""
    for name, field in model.model_fields.items():
        values = typing.get_args(field.annotation)
        if typing.get_origin(field.annotation) is typing.Literal and len(values) == 1:
            return f"{name}: {values[0]}"
    return ""


@functools.cache
def json_schema(model: type[BaseModel]) -> dict[str, Any]:
    return model.model_json_schema()


def row(model: type[BaseModel], name: str) -> Row:
    schema, field = json_schema(model), model.model_fields[name]
    type_ = kind(schema["properties"][name], schema.get("$defs", {}))
    return name, type_, default(field), cell(field.description or "")


def kind(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """A type of JSON schema in words, such as «integer ≥ 1» or «list of strings»."""
    if "$ref" in schema:
        inner = definitions[schema["$ref"].rpartition("/")[2]]
        return "section" if inner.get("type") == "object" else kind(inner, definitions)
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(kind(option, definitions) for option in options))
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {several(kind(schema['items'], definitions))}"
    if schema.get("type") == "object":
        values = schema.get("additionalProperties", True)
        return "mapping" if values in (True, {}) else f"mapping of names to {several(kind(values, definitions))}"
    bounds = ", ".join(f"{sign} {schema[bound]:g}" for bound, sign in BOUNDS.items() if bound in schema)
    return f"{schema.get('format', schema.get('type', 'any value'))} {bounds}".strip()


def several(words: str) -> str:
    return f"{words}s" if words.isalpha() else f"({words})"


def default(field: FieldInfo) -> str:
    """The default as one writes it in YAML. A section has none: the table of the section shows its defaults."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_defaults=True)
        if not value:
            return ""
    said = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False).replace('"', "")
    return f"`{said}`"


def table(rows: list[Row]) -> str:
    head = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    return "\n".join([*head, *(f"| `{r[0]}` | {r[1]} | {r[2]} | {r[3]} |" for r in rows), ""])


def cell(text: str) -> str:
    """The text on one line, as a cell of a table wants it."""
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    print(document().rstrip())
