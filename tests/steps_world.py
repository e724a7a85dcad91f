"""A run whose rounds are done stage by stage: a real ledger, real files and real rewards, without generator and trainer."""

import io
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

from mini import TINY
from rich.console import Console

from selfplay.config import load
from selfplay.reporting.terminal import Display
from selfplay.rounds.run import Run
from selfplay.rounds.steps import Steps
from selfplay.storage import folders, tables
from selfplay.storage.ledger import Store
from selfplay.types import Candidate, Policy, Prompt

LINE = SimpleNamespace(update=lambda **shown: None)


class Opened(Run):
    """A run of which nothing is open but its ledger, its reward and its judge."""

    def __init__(self, run_dir: Path, *settings: str) -> None:
        self.said = io.StringIO()
        run_dir.mkdir(exist_ok=True)
        super().__init__(load(TINY, settings), run_dir, Display(Console(file=self.said, width=10_000)))
        self.store = Store(run_dir)
        self._open_scorers(self.config)
        self.prompts = SimpleNamespace(ids=lambda split: [], read=lambda ids: [])
        self.serving = self.draws = None

    def policy(self, version: int) -> Policy:
        return Policy(version=version, path=str(self.dir / "policy"), parent=None, round=0, beta=None, reference=None)

    def steps(self, index: int = 1) -> Steps:
        return Steps(self, index, 0)

    @property
    def warned(self) -> list[str]:
        return [line for line in self.said.getvalue().splitlines() if line.startswith("warning: ")]

    def events(self, index: int) -> list[str]:
        return [event["text"] for event in self.store.events(index)]


def write_sampled(steps: Steps, prompts: Iterable[Prompt], candidates: Iterable[Candidate]) -> None:
    """What the stages `prompts` and `generate` leave behind."""
    for name, rows, kind in (
        ("prompts/prompts.parquet", prompts, Prompt),
        ("generate/candidates.parquet", candidates, Candidate),
    ):
        path = steps.frame.path(name)
        folders.make(path.parent)
        tables.write_rows(path, list(rows), kind)
