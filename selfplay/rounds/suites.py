"""The suites of a run: which are due in a round, what their files hold, and what earlier rounds know of the champion."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfplay.config import Config, SuiteConfig
from selfplay.errors import InputError
from selfplay.evaluation import harness, suite_files
from selfplay.evaluation.suites import Suite
from selfplay.generation.serving import Serving
from selfplay.prompts import draw, references
from selfplay.prompts import suites as files
from selfplay.rewards.scorer import Scorer
from selfplay.rounds.frame import Frame
from selfplay.rounds.suite_engine import SuiteEngine
from selfplay.storage import folders, seals, tables
from selfplay.storage.manifests import require_whole
from selfplay.types import Message, Prompt, SuiteAnswer


def require_suites(config: Config) -> None:
    """Raise InputError or ConfigError where a suite cannot be asked, as far as that is known without a model."""
    for suite in config.evaluate.suites:
        if suite.file is None:
            harness.require_harness(suite)
        else:
            read(config, suite)


def read(config: Config, suite: SuiteConfig) -> list[Prompt]:
    """The rows of a suite's file, without token ids. Raises InputError, and ConfigError where they need other settings.

    A row that the suite's reward could check no answer by is an error, as an instruction id is that it does not know.
    """
    assert suite.file is not None
    rows = files.read(suite.file)
    suite_files.require_kind(suite, rows)
    kinds = [kind for source in config.suite_sources(suite).values() if (kind := references.reader(source)) is not None]
    for number, row in enumerate(rows, 1):
        if (why := references.unreadable(row.reference, kinds)) is not None:
            raise InputError(
                f"suite {suite.name}: {suite.file}, row {number}: {why}", "mend the row, or name another reward"
            )
    return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What the suites of a round are asked with."""

    frame: Frame
    serving: Serving
    run_dir: Path
    tokenizer: dict[str, Any]
    """What a child loads the policy's tokenizer by (`evaluation.harness.Task`)."""
    render: Callable[[Sequence[list[Message]]], list[list[int] | str]]
    """Token ids of each conversation by the policy's chat template, or why it has none."""
    encode: Callable[[Sequence[str]], list[list[int]]]
    """Token ids of each text, as a part of an answer."""
    scorer: Callable[[SuiteConfig], AbstractContextManager[Scorer]]
    """The reward of a suite. It ends with the block."""


@contextlib.contextmanager
def opened(settings: Sequence[SuiteConfig], services: Services) -> Iterator[list[Suite]]:
    """The suites with these settings, ready to be asked. Their rewards end with the block."""
    with contextlib.ExitStack() as rewards:
        yield [_suite(each, services, rewards) for each in settings]


def _suite(settings: SuiteConfig, services: Services, rewards: contextlib.ExitStack) -> Suite:
    config = services.frame.config
    engine = SuiteEngine(frame=services.frame, serving=services.serving)
    max_tokens = settings.max_tokens or config.generate.max_tokens
    if settings.file is None:
        return harness.Task(
            settings=settings,
            engine=engine,
            run_dir=services.run_dir,
            tokenizer=services.tokenizer,
            max_tokens=max_tokens,
        )
    rows = _rows(settings, services)
    if settings.reward is None:
        return suite_files.Choices(settings=settings, rows=rows, engine=engine)
    scorer = rewards.enter_context(services.scorer(settings))
    scorer.start()  # it imports while the engine answers
    return suite_files.Answered(
        settings=settings,
        rows=rows,
        engine=engine,
        scorer=scorer,
        max_tokens=max_tokens,
        max_missing=config.reward.max_missing,
        breathe=services.frame.breathe,
    )


def _rows(settings: SuiteConfig, services: Services) -> suite_files.Rows:
    """The rows of a suite's file with token ids. They are made once for the run, and again where the file has changed."""
    assert settings.file is not None
    config = services.frame.config
    prompts = read(config, settings)
    content = hashlib.sha256(settings.file.read_bytes()).hexdigest()
    decides = [content, settings.prompts, config.run.seed, config.policy.model_dump(mode="json")]
    digest = hashlib.sha256(json.dumps(decides).encode()).hexdigest()
    kept = services.run_dir / "suites" / f"{digest[:16]}.parquet"
    if not seals.is_whole(kept):
        kept.parent.mkdir(exist_ok=True)
        if settings.prompts is not None:
            ids = draw.subset([prompt.prompt_id for prompt in prompts], settings.prompts, config.run.seed, "suite")
            prompts = [prompt for prompt in prompts if prompt.prompt_id in set(ids)]
        tables.write_rows(kept, _rendered(settings, prompts, services), Prompt)
        seals.seal(kept)
    found = tables.read_rows(kept, Prompt)
    choices = [prompt.meta["choice_ids"] for prompt in found] if files.CHOICES in found[0].meta else []
    return suite_files.Rows(prompts=found, choices=choices, digest=digest)


def _rendered(settings: SuiteConfig, prompts: Sequence[Prompt], services: Services) -> list[Prompt]:
    ids = services.render([prompt.messages for prompt in prompts])
    if bad := [why for why in ids if isinstance(why, str)]:
        raise InputError(f"suite {settings.name}: a row {bad[0]}", f"mend {settings.file}")
    found = [
        dataclasses.replace(prompt, prompt_ids=own)
        for prompt, own in zip(prompts, ids, strict=True)
        if isinstance(own, list)
    ]
    if settings.reward is not None:
        return found
    texts = iter(services.encode([text for prompt in found for text in prompt.meta[files.CHOICES]]))
    return [
        dataclasses.replace(
            prompt, meta=prompt.meta | {"choice_ids": [next(texts) for _ in prompt.meta[files.CHOICES]]}
        )
        for prompt in found
    ]


def known(
    artifact: Callable[[int, str], Path], index: int, champion: int
) -> Callable[[str, str], list[SuiteAnswer] | None]:
    """What earlier rounds have of the champion's answers: of the round that trained it, or of a later one that it stayed in."""

    def answers(name: str, identity: str) -> list[SuiteAnswer] | None:
        for before in range(index - 1, max(champion, 1) - 1, -1):
            said = artifact(before, "suite/suites.json")
            if not said.is_file() or folders.read_json(require_whole(said)).get(name) != identity:
                continue
            side = "candidate" if before == champion else "champion"
            kept = artifact(before, f"suite/{name}/{side}.parquet")
            if not kept.is_file():  # it was damaged, and a person has put it aside: they answer anew
                continue
            rows = tables.read_rows(require_whole(kept), SuiteAnswer)
            if {row.policy for row in rows} == {champion}:
                return rows
        return None

    return answers


def due(config: Config, index: int) -> list[SuiteConfig]:
    """The suites that round `index` asks."""
    return [suite for suite in config.evaluate.suites if index % suite.every == 0]
