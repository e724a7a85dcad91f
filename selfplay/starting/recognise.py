"""What a user names, and what the machine has: model, reward, prompts, GPUs. All raise InputError for what cannot be used."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reward import kinds
from reward.client import UNNAMED, RewardClient, RewardRefused, RewardUnavailable
from reward.http import HttpError, InvalidAddress, ask
from reward.settings import require_plain
from selfplay.checks import gpus, hub, models, sizes
from selfplay.checks.prompts import sample
from selfplay.config import Config, PolicyConfig
from selfplay.errors import ConfigError, InputError, SelfplayError
from selfplay.planning.memory import GIB
from selfplay.prompts import importer
from selfplay.prompts.files.sources import files_of
from selfplay.rounds.requirements import num_labels

SECONDS = 5.0  # for an answer of a server
NO_SETTINGS = ("rules", "judge", "model")  # kinds that say nothing by their name alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    name: str
    parameters: int | None
    context: int | None
    """Tokens that it reads."""
    said: str


def model(name: str) -> Model:
    """A folder with a checkpoint, or a model on the Hub."""
    found = next(models.whole("policy.model", name))
    if found.level == "error":
        raise InputError(found.text, "give a checkpoint folder, or the Hub id of an instruct model, as safetensors")
    config, said = sizes.settings(name), found.text
    text = config.get("text_config") or config
    limit = text.get("max_position_embeddings") or text.get("n_positions")
    if isinstance(limit, int):
        said += f"; it reads {limit:,} tokens"
    said = said.removeprefix(name).removeprefix(": ").removeprefix(" is ")
    return Model(
        name=name, parameters=sizes.parameters(name), context=limit if isinstance(limit, int) else None, said=said
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    section: dict[str, Any]
    """Settings of the section `reward`."""
    said: str


def reward(given: str) -> Reward:
    """The address of a server, a built-in kind, or a reward model in a folder or on the Hub."""
    if given.startswith(("http://", "https://")):
        return _server(given)
    if given in kinds.KINDS or ":" in given:
        if given in NO_SETTINGS:
            raise InputError(
                f"the reward {given!r} needs settings", "docs/rewards.md shows them: write them into the file"
            )
        try:
            kinds.read(given, {})
        except ValueError as error:
            raise InputError(f"the reward {given!r} cannot be used as it is: {error}", "docs/rewards.md") from None
        return Reward(section={"source": {"kind": given}}, said=f"{given}, a program that a child process runs")
    if Path(given).is_dir():
        if (labels := num_labels(Path(given))) not in (None, 1):
            raise InputError(
                f"{given} has {labels} labels", "a reward model has 1; `reward.heads` chooses among several"
            )
        return Reward(section={"model": given}, said=f"a reward model of {_size(sizes.parameters(given))}")
    if not sizes.on_the_hub(given):
        names = ", ".join(kind for kind in kinds.KINDS if kind not in NO_SETTINGS)
        raise InputError(f"{given}: no such folder", f"give a reward model, the URL of a server, or one of {names}")
    if (told := hub.ask(given)).absent:
        raise InputError(f"the Hub has no {given} for us ({told.absent})", "correct the name, or export HF_TOKEN")
    return Reward(section={"model": given}, said=f"a reward model on the Hub, of {_size(told.parameters)}")


def _server(url: str) -> Reward:
    try:
        require_plain(url)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    try:
        with RewardClient(url, deadline=SECONDS) as client:
            health = client.health()
        if health is not UNNAMED:
            return Reward(section={"url": [url]}, said=f"a reward server of {health.model}")
        answer = ask("GET", f"{url.rstrip('/')}/v1/models", seconds=SECONDS, limit=2**20)
        card = json.loads(answer.content)["data"][0]
    except (RewardUnavailable, RewardRefused, HttpError, InvalidAddress) as error:
        return Reward(section={"url": [url]}, said=f"a server that does not answer now ({type(error).__name__})")
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return Reward(section={"url": [url]}, said="a server that does not say what it is: taken for one of `/score`")
    section = {
        "url": [url],
        "dialect": "vllm-classify",
        "served_model": card["id"],
        "tokenizer": card.get("root") or card["id"],
    }
    return Reward(section=section, said=f"a vLLM server of {card['id']}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    gpus: tuple[gpus.Gpu, ...]
    cores: int
    memory: float  # bytes

    @property
    def said(self) -> str:
        host = f"{self.cores} cores, {self.memory / GIB:.0f} GiB of main memory"
        if not self.gpus:
            return f"no GPU; {host}"
        first = self.gpus[0]
        return f"{len(self.gpus)} × {first.name}, {first.total / GIB:.0f} GiB each; {host}"


def machine() -> Machine:
    """The GPUs that this process may use, as `selfplay check` sees them, and the rest of the machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(gpus=tuple(gpus.visible()), cores=len(os.sched_getaffinity(0)), memory=float(memory))


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    train: int
    heldout: int
    audit: int
    tokens: int | None
    """Longest prompt (tokens) of 99 in 100; None where it is not known."""
    said: tuple[str, ...]


def data(config: Config) -> Data | None:
    """The prompts of a configuration, read and split as a run would do it; None for a dataset on the Hub, which is not loaded."""
    settings = config.prompts
    if files_of(settings.source, settings.split, settings.config) is None:
        return None
    found = importer.survey(config)
    splits = found.splits
    lengths = sorted(_tokens(config))
    tokens = lengths[math.ceil(0.99 * len(lengths)) - 1] if lengths else None
    longest = "" if tokens is None else f"; 99 % of them up to {tokens:,} tokens"
    said = f"{splits['train']:,} to train on, {splits['heldout']:,} held out, {splits['audit']:,} to audit{longest}"
    return Data(
        train=splits["train"], heldout=splits["heldout"], audit=splits["audit"], tokens=tokens, said=(*found.recognised, said)
    )  # fmt: skip


def _tokens(config: Config) -> Iterator[int]:
    """How long some prompts are: by the policy's tokenizer where it is here, else a token for three characters."""
    conversations = sample(config)
    try:
        if not Path(config.policy.model).is_dir():
            raise InputError("the tokenizer is not here")
        from selfplay.prompts.lengths import in_tokens  # transformers takes seconds

        measure = in_tokens(PolicyConfig(model=config.policy.model))
    except SelfplayError:
        yield from (sum(len(m["content"]) for m in messages) // 3 + 8 * len(messages) for messages in conversations)
        return
    yield from (length for length in map(measure, conversations) if isinstance(length, int))


def _size(parameters: int | None) -> str:
    if parameters is None:
        return "unknown size"
    return f"{parameters / 1e9:.1f} B parameters" if parameters >= 1e9 else f"{parameters / 1e6:,.1f} M parameters"
