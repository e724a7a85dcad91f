"""Which files a source is: a file, a folder, a glob, or a copy of a Hub dataset with its card."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from selfplay.errors import InputError
from selfplay.prompts.files import kinds

HINT = "relative paths start at the working directory"
ABOUT = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "package.json", "config.json"}
"""Files of a folder that are about its data."""
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test", "valid": "validation",
          "validation": "validation", "val": "validation", "dev": "validation"}  # fmt: skip
"""Words in the names of files, and the splits that they mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """The files of a source."""

    paths: tuple[Path, ...]
    left: int = 0
    """Files of other splits, which are not read."""


def files_of(source: str, split: str = "train", config: str | None = None) -> Files | None:
    """The files that a source names, or None for the id of a Hub dataset. Raises InputError where none are there."""
    path = Path(source).expanduser()
    if path.is_dir():
        return _of_folder(path, split, config)
    if path.exists():
        return Files(paths=(path,))
    if re.search(r"[*?\[]", source):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        found = [file for file in found if file.is_file()]
        if not found:
            raise InputError(f"{source}: no file has such a name", HINT)
        return Files(paths=tuple(found))
    if (
        kinds.is_data(path)
        or path.suffix.lower() in kinds.PACKED
        or source.startswith((".", "/", "~"))
        or source.count("/") > 1
    ):
        raise InputError(f"{source}: no such file", HINT)
    return None


def local_files(source: str, split: str = "train", config: str | None = None) -> Files:
    """The files that a source names. Raises InputError where they are not there, or it is the id of a Hub dataset."""
    found = files_of(source, split, config)
    if found is None:
        hint = "name a file, a folder or a glob; a Hub dataset is loaded when a run starts"
        raise InputError(f"{source}: no such file", hint)
    return found


def is_local(source: str) -> bool:
    """Whether `source` names files; it is taken for a Hub dataset otherwise. Raises InputError for a file that is missing."""
    return Path(source).expanduser().is_dir() or files_of(source) is not None


def _of_folder(folder: Path, split: str, config: str | None) -> Files:
    if (card := _card(folder)) and (named := _of_card(folder, card, split, config)) is not None:
        return named
    if config is not None:
        inside = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        if config not in inside:
            there = ", ".join(inside) or "none"
            raise InputError(
                f"{folder} has no configuration {config!r}", f"folders inside of it: {there} (prompts.config)"
            )
        folder = folder / config
    found = [path for path in sorted(folder.rglob("*")) if _has_rows(path, folder)]
    found = [path for path in found if kinds.suffix(path) != ".txt"] or found
    if not found:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise InputError(
            f"{folder} has no files of prompts; it holds {there}",
            "name a folder with files such as *.jsonl or *.parquet",
        )
    splits = {path: _split(path.relative_to(folder)) for path in found}
    mine = SPLITS.get(split, split)
    if mine in splits.values() and len(set(splits.values())) > 1:
        kept = tuple(path for path in found if splits[path] in (mine, None))
        return Files(paths=kept, left=len(found) - len(kept))
    return Files(paths=tuple(found))


def _has_rows(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    about = (
        path.name in ABOUT
        or path.name.startswith("cache-")
        or path.name.lower().startswith(("readme", "license", "requirements"))
    )
    return kinds.is_data(path) and not hidden and not about and path.is_file()


def _split(path: Path) -> str | None:
    words = re.split(r"[^a-z]+", str(path.with_suffix("")).lower())
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def _card(folder: Path) -> list[dict[str, Any]]:
    """The configurations that the card of a Hub dataset names."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
        found = yaml.safe_load(front.group(1)) if front else {}
    except (OSError, ValueError, yaml.YAMLError):
        return []
    configs = found.get("configs") if isinstance(found, dict) else None
    return [one for one in configs if isinstance(one, dict)] if isinstance(configs, list) else []


def _of_card(folder: Path, card: list[dict[str, Any]], split: str, config: str | None) -> Files | None:
    """The files of a configuration and split; None where the card names none."""
    one = configuration(str(folder), card, config)
    base = folder / str(one.get("data_dir") or "")
    by_split = files_by_split(one)
    if not by_split:
        return None if not one.get("data_dir") else _of_folder(base, split, None)
    require_split(str(folder), split, by_split)
    found = sorted({path for pattern in by_split[split] for path in base.glob(pattern) if path.is_file()})
    if not found:
        raise InputError(
            f"{folder}: no file is there of those that its card names ({', '.join(by_split[split])})",
            "fetch the whole dataset",
        )
    return Files(paths=tuple(found))


def configuration(where: str, card: list[dict[str, Any]], config: str | None) -> dict[str, Any]:
    """The configuration of a dataset that `datasets` would load, of those that its card names. Raises InputError for none."""
    by_name = {str(one.get("config_name", "default")): one for one in card}
    usual = [name for name, one in by_name.items() if one.get("default") or name == "default"]
    name = config or (usual[0] if usual else next(iter(by_name)) if len(by_name) == 1 else None)
    if name not in by_name:
        said = f"no configuration {config!r}" if config else "several configurations"
        raise InputError(f"{where} has {said}: {', '.join(by_name)}", "name one of them in prompts.config")
    return by_name[name]


def files_by_split(one: dict[str, Any]) -> dict[str, list[str]]:
    """Split → patterns of its files, of a configuration; empty where it names none."""
    found = dict[str, list[str]]()
    for split, pattern in _patterns(one.get("data_files")):
        found.setdefault(split, []).append(pattern)
    return found


def require_split(where: str, split: str, splits: Iterable[str]) -> None:
    """Raise InputError where a dataset has no such split."""
    if split not in splits:
        raise InputError(
            f"{where} has no split {split!r}; it has {', '.join(splits)}", "name one of them in prompts.split"
        )


def _patterns(given: Any, split: str = "train") -> Iterator[tuple[str, str]]:
    """(split, pattern) of what a card calls `data_files`."""
    if isinstance(given, str):
        yield split, given
    elif isinstance(given, dict) and "path" in given:
        yield from _patterns(given["path"], str(given.get("split", split)))
    elif isinstance(given, dict):
        for of_split, patterns in given.items():
            yield from _patterns(patterns, str(of_split))
    elif isinstance(given, list):
        for one in given:
            yield from _patterns(one, split)
