"""Tasks of lm-evaluation-harness, as a suite: the harness asks and grades in a child of its own, the engines of the run answer.

The child (`harness_job.py`) writes what the harness asks to files, and tells where they are. The answers come from the policies
that are compared, side by side where there are several engines, so there is no second copy of a model.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfplay.config import SuiteConfig
from selfplay.config.secrets import HUB
from selfplay.errors import ConfigError, InputError, SelfplayError
from selfplay.evaluation.suite_files import Engine
from selfplay.generation.generator import Sampling
from selfplay.processes.child import PATIENT, Child, ChildDied, ChildError
from selfplay.processes.children import owning
from selfplay.processes.logs import last_line
from selfplay.progress import Line
from selfplay.storage import tables
from selfplay.types import Policy, SuiteAnswer

MODULE = "selfplay.evaluation.harness_job"
LOG = "harness.log"


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task, or a group of tasks, of the harness."""

    settings: SuiteConfig
    engine: Engine
    run_dir: Path
    tokenizer: dict[str, Any]
    """What the child loads the policy's tokenizer by: `policy` (its folder), `trust_remote_code` and `template`."""
    max_tokens: int

    @property
    def size(self) -> None:
        return None

    def identity(self) -> str | None:
        version = importlib.metadata.version("lm_eval")
        own = [path for path in sorted(self._include.rglob("*")) if path.is_file()] if self._include else []
        content = [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in own]
        return json.dumps([version, self.settings.model_dump(mode="json"), self.max_tokens, content], sort_keys=True)

    @property
    def _include(self) -> Path | None:
        return self.settings.include_path

    def play(self, policies: Sequence[Policy], line: Line) -> list[list[SuiteAnswer]]:
        """Raises InputError for a task that there is not, that needs a download which fails, or that has no such metric."""
        log = self.run_dir / "logs" / LOG
        child = Child(
            "harness", [sys.executable, "-m", MODULE], run_dir=self.run_dir, log=log, env={"OMP_NUM_THREADS": "1", **owning(*HUB)},
            silence=PATIENT,
        )  # fmt: skip
        folder = self.engine.folder(self.settings.name, self.identity())
        child.start()
        try:
            written = child.order(
                "evaluate",
                lambda event: self._answer(child, event, policies, line),
                suite=self.settings.model_dump(mode="json"),
                tokenizer=self.tokenizer,
                context=self.engine.room(),
                max_tokens=self.max_tokens,
                folder=str(folder),
                policies=[policy.version for policy in policies],
            )
        except ChildError as error:
            raise InputError(f"suite {self.settings.name}: {error}", error.hint) from error
        except ChildDied as error:
            raise SelfplayError(
                f"suite {self.settings.name}: {error}: {last_line(log)}", f"its log is {log}"
            ) from error
        finally:
            child.stop()
        return [tables.read_rows(Path(file), SuiteAnswer) for file in written]

    def _answer(self, child: Child, event: dict[str, Any], policies: Sequence[Policy], line: Line) -> None:
        """Have the engines answer what the harness asks."""
        asked = Path(event["asked"])
        line.update(total=tables.count_rows(asked) * len(policies), done=0)
        if event["kind"] == "sample":
            sampling = Sampling(**event["sampling"] | {"stop": tuple(event["sampling"]["stop"])})
            files = self.engine.sample(asked, policies, sampling, event["max_tokens"], line)
        else:
            files = self.engine.logps(asked, Path(event["said"]), policies, line)
        child.send("answers", files=[[str(file) for file in of_policy] for of_policy in files])


def require_harness(settings: SuiteConfig) -> None:
    """Raise ConfigError where the harness is not installed or its folder of tasks is not there."""
    where = f"evaluate.suites {settings.name}"
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            f"{where}: lm-evaluation-harness is not installed", 'pip install "selfplay[eval]", or take the suite out'
        )
    if settings.include_path is not None and not settings.include_path.is_dir():
        raise ConfigError(
            f"{where}: include_path {settings.include_path} is no folder",
            "relative paths start at the working directory",
        )
