"""The command `selfplay init`: asks for what it is not told, writes the configuration, and says what `check` finds in it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import typer

from selfplay.checks.check import check
from selfplay.config import Config, load
from selfplay.errors import ConfigError, InputError
from selfplay.starting import recognise, sizing
from selfplay.starting.presets import FSDP2, PRESETS, ULTRAFEEDBACK, Settings, nearest
from selfplay.starting.writing import written
from selfplay.storage import folders
from selfplay.visible import say

QUESTIONS = {
    "model": "model to align (a folder, or the Hub id of an instruct model)",
    "prompts": "prompts (a file, a folder, a glob, or the id of a Hub dataset)",
    "reward": "reward (a reward model, the URL of a server, or one of instructions, math, code)",
}


def run_init(
    path: Path, given: dict[str, str | None], column: str | None, preset: str | None, yes: bool, force: bool
) -> None:
    """Write the configuration. `given`: the answers to QUESTIONS that are known.

    Raises InputError where something is missing or cannot be used; then nothing is written.
    """
    if preset is not None and preset not in PRESETS:
        raise InputError(f"there is no preset {preset!r}", "; ".join(f"{n}: {p.about}" for n, p in PRESETS.items()))
    if path.is_dir():
        raise InputError(f"{path} is a folder", "name a file, such as selfplay.yaml")
    if path.exists() and not force:
        raise InputError(f"{path} exists already, and nothing is written over it", "name another file, or add --force")
    answers = _answers(given, preset, may_ask=sys.stdin.isatty() and not yes)
    model, reward, machine = recognise.model(answers["model"]), recognise.reward(answers["reward"]), recognise.machine()
    for what, said in (("model", model.said), ("reward", reward.said), ("machine", machine.said)):
        say(f"{what:<8} {said}")
    chosen = preset or nearest(model.parameters)
    settings: Settings = {
        "run.name": (re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._") or "run", "its folder is runs/<name>"),
        "policy.model": (model.name, model.said),
        "policy.dtype": ("bfloat16", "precision that it serves in; it is trained in float32"),
        **_prompts(answers["prompts"], column, preset),
        **{f"reward.{key}": (value, reward.said if not i else "as the server says") for i, (key, value) in enumerate(reward.section.items())},
        **PRESETS[chosen].settings,
    }  # fmt: skip
    data = recognise.data(_config(settings))
    told = data.said if data is not None else ("a dataset on the Hub, which is loaded when the run starts",)
    for said in told:
        say(f"{'prompts':<8} {said}")
    settings["prompts.source"] = (settings["prompts.source"][0], told[-1])
    accelerate = path.with_name(f"{path.stem}-accelerate.yaml")
    if accelerate.exists() and not force and len(machine.gpus) > 1:
        raise InputError(f"{accelerate} exists already, and nothing is written over it", "name another file")
    settings = sizing.for_data(settings, model, data)
    settings = sizing.for_machine(settings, model, machine, accelerate)
    settings = sizing.for_disk(settings, len(machine.gpus))
    _write(path, _title(chosen, preset, machine), settings, accelerate, len(machine.gpus))
    say(f"\nwrote {path}, with numbers of the preset {chosen} for this machine")
    config = load(path)
    for finding in check(config, config.run_dir):
        if finding.level != "ok":
            say(f"{finding.level:<8} {finding.about}: {finding.text}")
    say(f"\nnext: selfplay check -c {path}\n      selfplay check --deep -c {path}\n      selfplay round -c {path}")


def _answers(given: dict[str, str | None], preset: str | None, may_ask: bool) -> dict[str, str]:
    known = PRESETS[preset] if preset is not None else None
    usual = {
        "model": known.model if known else None,
        "reward": known.reward if known else None,
        "prompts": known.prompts["source"] if known else None,
    }
    ask: Callable[[str], str | None] = lambda name: typer.prompt(QUESTIONS[name], default=usual[name])  # noqa: E731
    found = {name: given.get(name) or (ask(name) if may_ask else usual[name]) for name in QUESTIONS}
    if missing := [f"--{name}" for name, answer in found.items() if not answer]:
        raise InputError(f"{' and '.join(missing)} missing", "nobody can be asked here: give them, or a --preset")
    return {name: str(answer) for name, answer in found.items()}


def _prompts(source: str, column: str | None, preset: str | None) -> Settings:
    usual = PRESETS[preset].prompts if preset is not None else ULTRAFEEDBACK
    found = dict(usual) if source == usual["source"] else {"source": source}
    found |= {"columns.prompt": column} if column else {}
    why = {"split": "the part of the dataset that has prompts", "columns.prompt": "where a row has its prompt"}
    return {f"prompts.{key}": (value, why.get(key, "")) for key, value in found.items()}


def _config(settings: Settings) -> Config:
    try:
        return Config.model_validate(sizing.nested(settings))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _title(chosen: str, preset: str | None, machine: recognise.Machine) -> list[str]:
    why = "as asked" if preset else "by the size of the model"
    return [
        f"Self-play rounds, for {machine.said}.",
        f"The numbers began as the preset {chosen} ({why}). Every setting is in docs/configuration.md.",
    ]


def _write(path: Path, title: list[str], settings: Settings, accelerate: Path, gpus: int) -> None:
    text = written(title, settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    if "train.accelerate" in settings:
        with folders.whole(accelerate) as partial:
            partial.write_text(FSDP2.format(processes=gpus), encoding="utf-8")
    with folders.whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
