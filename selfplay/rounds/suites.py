"""The suites of a run: which are due in a round, what their files hold, and what earlier rounds know of the champion."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from selfplay.config import Config, SuiteConfig
from selfplay.errors import InputError
from selfplay.evaluation import harness, suite_files
from selfplay.evaluation.suites import Suite
from selfplay.prompts import draw, references
from selfplay.prompts import suites as files
from selfplay.rounds.frame import Frame
from selfplay.rounds.suite_engine import SuiteEngine
from selfplay.storage import folders, seals, tables
from selfplay.storage.manifests import require_whole
from selfplay.types import Prompt, SuiteAnswer

if TYPE_CHECKING:
    from selfplay.rounds.run import Run


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


@contextlib.contextmanager
def opened(run: Run, frame: Frame, settings: Sequence[SuiteConfig]) -> Iterator[list[Suite]]:
    """The suites with these settings, ready to be asked. Their rewards end with the block."""
    engine = SuiteEngine(frame=frame, serving=run.serving)
    try:
        yield [_suite(run, engine, each) for each in settings]
    finally:
        for scorer in run.suite_scorers:
            scorer.stop()
        run.suite_scorers.clear()


def _suite(run: Run, engine: SuiteEngine, settings: SuiteConfig) -> Suite:
    config = run.config
    max_tokens = settings.max_tokens or config.generate.max_tokens
    if settings.file is None:
        return harness.Task(
            settings=settings, engine=engine, run_dir=run.dir, tokenizer=run.tokenizer, max_tokens=max_tokens
        )
    rows = _rows(run, settings)
    if settings.reward is None:
        return suite_files.Choices(settings=settings, rows=rows, engine=engine)
    scorer = run.suite_scorer(settings)
    scorer.start()  # it imports while the engine answers
    return suite_files.Answered(
        settings=settings,
        rows=rows,
        engine=engine,
        scorer=scorer,
        max_tokens=max_tokens,
        max_missing=config.reward.max_missing,
        breathe=run.breathe,
    )


def _rows(run: Run, settings: SuiteConfig) -> suite_files.Rows:
    """The rows of a suite's file with token ids. They are made once for the run, and again where the file has changed."""
    assert settings.file is not None
    prompts = read(run.config, settings)
    content = hashlib.sha256(settings.file.read_bytes()).hexdigest()
    decides = [content, settings.prompts, run.config.run.seed, run.config.policy.model_dump(mode="json")]
    digest = hashlib.sha256(json.dumps(decides).encode()).hexdigest()
    kept = run.dir / "suites" / f"{digest[:16]}.parquet"
    if not seals.is_whole(kept):
        kept.parent.mkdir(exist_ok=True)
        if settings.prompts is not None:
            ids = draw.subset([prompt.prompt_id for prompt in prompts], settings.prompts, run.config.run.seed, "suite")
            prompts = [prompt for prompt in prompts if prompt.prompt_id in set(ids)]
        tables.write_rows(kept, _rendered(run, settings, prompts), Prompt)
        seals.seal(kept)
    found = tables.read_rows(kept, Prompt)
    choices = [prompt.meta["choice_ids"] for prompt in found] if files.CHOICES in found[0].meta else []
    return suite_files.Rows(prompts=found, choices=choices, digest=digest)


def _rendered(run: Run, settings: SuiteConfig, prompts: Sequence[Prompt]) -> list[Prompt]:
    ids = run.render([prompt.messages for prompt in prompts])
    if bad := [why for why in ids if isinstance(why, str)]:
        raise InputError(f"suite {settings.name}: a row {bad[0]}", f"mend {settings.file}")
    found = [
        dataclasses.replace(prompt, prompt_ids=own)
        for prompt, own in zip(prompts, ids, strict=True)
        if isinstance(own, list)
    ]
    if settings.reward is not None:
        return found
    texts = iter(run.encode([text for prompt in found for text in prompt.meta[files.CHOICES]]))
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
