"""A run as API and page show it: read from the ledger, the artifacts and what the service says of itself right now."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import shutil
import sqlite3
from collections.abc import Callable, Iterable
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from selfplay.config import Config
from selfplay.errors import InputError
from selfplay.prompts import pool
from selfplay.reporting import answers
from selfplay.service import alerts, orders
from selfplay.storage import figures, lease, paging, retention, tables
from selfplay.storage.ledger import RESTARTS, LedgerError, Store
from selfplay.types import Pair, Prompt
from selfplay.web import api_models as m

VERSION = version("selfplay")
MAX_PENDING = 100  # orders that may wait at a time
SUMMARY = (
    "evaluate/reward", "evaluate/reward_champion", "evaluate/win_rate", "evaluate/win_rate_low", "evaluate/win_rate_high",
    "evaluate/length_ratio", "evaluate/kl_current", "pairs/base", "pairs/kept", "depth/pairs", "score/reward_mean", "train/beta",
)  # fmt: skip


class View:
    """Reads one run; leaves orders for it. Safe to use from several threads.

    progress: what the service does now: state, why, since, round, stage, done, total, unit, text, seconds; empty while it starts.
    """

    def __init__(self, run_dir: Path, config: Config, progress: Callable[[], dict[str, Any]]) -> None:
        self.run_dir, self.config, self._progress = run_dir, config, progress

    @functools.cached_property
    def store(self) -> Store:
        """Opened when first asked: the page is there before a ledger that is locked or damaged, or whose disk is full. Not
        before the runner has the folder by the locks that are set: opened by others, it would stand in the way of these."""
        if (self.config.run.locks == "lease") != lease.is_used(self.run_dir):
            error = sqlite3.OperationalError("it is not open yet")
            raise LedgerError(f"open {self.run_dir}", {}, error)
        try:
            return Store(self.run_dir)
        except (OSError, InputError) as error:
            raise LedgerError(f"open {self.run_dir}", {}, error) from error

    def service(self) -> m.Service:
        said = self._progress()
        found = m.Service(state=said.get("state") or "starting", why=said.get("why") or "", since=said.get("since"))
        if found.state == "waiting" and _is_time(found.why):
            found.next_round, found.why = found.why, ""
        if found.state == "running" and said.get("stage"):
            found.round, found.stage, found.done = said.get("round"), said["stage"], said.get("done") or 0
            found.total, found.unit, found.text = said.get("total"), said.get("unit") or "", said.get("text") or ""
            found.seconds = said.get("seconds") or 0.0
        return found

    def summary(self) -> m.RunSummary:
        run = next(iter(self.store.query("SELECT name, created FROM runs")), {})
        return m.RunSummary(
            name=run.get("name", self.config.run.name),
            created=run.get("created"),
            service=self.service(),
            current_policy=self.store.serving(),
            rounds=self.store.count_rounds(),
            orders_pending=paging.waiting_orders(self.store),
            restarts=int(sum(self.store.totals("events").get(kind, 0) for kind in RESTARTS)),
            gate_independent=bool(
                figures.newest(self.store, "evaluate/independent", self.config.evaluate.judge is not None)
            ),
            webhook=self.store.state(alerts.TROUBLE, ""),
            free_bytes=shutil.disk_usage(self.run_dir).free,
            version=VERSION,
        )

    # rounds

    def rounds(self, before: int | None = None, limit: int = 50) -> list[m.Round]:
        """Rounds, newest first."""
        rows = paging.rounds(self.store, before, limit)
        numbers = [row["round"] for row in rows]
        found = figures.metrics(self.store, SUMMARY, min(numbers), max(numbers)) if rows else {}
        return [m.Round(**row, metrics=found.get(row["round"], {})) for row in rows]

    def round(self, index: int) -> m.RoundDetail | None:
        row = paging.round_(self.store, index)
        if row is None:
            return None
        stages = paging.stages(self.store, index)
        return m.RoundDetail(
            **{name: value for name, value in row.items() if name not in ("config", "cursor")},
            seconds=sum(stage["seconds"] for stage in stages),
            metrics=self.store.metrics(index),
            stages=[m.Stage(**stage) for stage in stages],
            pairs=paging.reasons(self.store, index),
            deleted=retention.lost(self.store, index),
        )

    def histogram(self, index: int, column: str, bins: int = 30) -> m.Histogram:
        edges, kept, dropped = paging.histogram(self.store, index, column, bins)
        return m.Histogram(edges=edges, kept=kept, dropped=dropped)

    # pairs

    def pairs(
        self, where: paging.PairFilter, sort: paging.Sort = "round", descending: bool = True, after: str | None = None,
        limit: int = 50,
    ) -> m.PairPage:  # fmt: skip
        page = paging.pairs(self.store, where, sort, descending, after, limit)
        return m.PairPage(
            pairs=[m.PairRow(**row) for row in page.rows],
            next=page.next,
            deleted=retention.lost_pair_rows(self.store, where.round),
        )

    def pair(self, index: int, row: int) -> m.PairDetail | None:
        """A base pair, whole; None where the ledger or the artifacts do not have it.

        Where retention has deleted it from the ledger the artifacts are enough, and only its rank is not known.
        """
        there = self.store.query("SELECT 1 FROM pairs WHERE round = :i AND row = :row", i=index, row=row)
        path = self._artifact(index, "pairs", "pairs")
        if not path.is_file() or not (there or retention.lost_pair_rows(self.store, index)):
            return None
        try:
            pair = tables.read_row(path, Pair, row)
        except IndexError:
            return None
        deepened = list(self._rows(index, "depth", "pairs", Pair, [pair.prompt_id]))
        same = (pair.chosen_index, pair.rejected_index)
        base = next((p for p in deepened if (p.chosen_index, p.rejected_index) == same), pair)
        prompt = next(self._rows(index, "prompts", "prompts", Prompt, [pair.prompt_id]), None)
        where = paging.standing(self.store, index, row)
        config = (paging.round_(self.store, index) or {}).get("config") or {}
        return m.PairDetail(
            **{name: _known(getattr(pair, name)) for name in m.PairRow.model_fields if name not in ("round", "row")},
            round=index,
            row=row,
            messages=prompt.messages if prompt else [],
            chosen=m.Response(text=pair.chosen, reward=pair.chosen_reward, logp=pair.chosen_logp, tokens=len(pair.chosen_ids)),
            rejected=m.Response(
                text=pair.rejected, reward=pair.rejected_reward, logp=pair.rejected_logp, tokens=len(pair.rejected_ids)
            ),
            implicit_signed=pair.implicit_signed,
            cluster=base.cluster,
            closeness=base.closeness,
            added=sum(p.kept_because == "depth" for p in deepened),
            rank=where["rank"] if there and pair.potential is not None else None,
            ranked=where["of"],
            lowest_kept=where["lowest_kept"],
            settings={**(config.get("pairs") or {}), "noise": (config.get("reward") or {}).get("noise")},
        )  # fmt: skip

    def prompts(self, pairs: Iterable[m.PairRow], longest: int = 160) -> dict[tuple[int, str], str]:
        """The beginning of the last message of each pair's prompt, by round and prompt_id."""
        texts = {}
        for index, group in itertools.groupby(sorted(pairs, key=lambda p: p.round), key=lambda p: p.round):
            for prompt in self._rows(index, "prompts", "prompts", Prompt, {p.prompt_id for p in group}):
                texts[index, prompt.prompt_id] = prompt.messages[-1]["content"][:longest] if prompt.messages else ""
        return texts

    def _artifact(self, index: int, stage: str, name: str) -> Path:
        return self.run_dir / "rounds" / f"{index:04d}" / stage / f"{name}.parquet"

    def _rows(self, index: int, stage: str, name: str, row_type: Any, prompt_ids: Any) -> Any:
        path = self._artifact(index, stage, name)
        return tables.rows_with(path, row_type, "prompt_id", prompt_ids) if path.is_file() else iter(())

    # the rest

    def pool(self, after: int = 0, limit: int = 50) -> m.PromptPage:
        """Prompts in the order they came into the pool, from number `after` on; without their gold answers."""
        rows, total = pool.page(self.run_dir / "pool", after, limit)
        return m.PromptPage(
            prompts=[
                m.PromptRow(
                    number=after + i, prompt_id=p.prompt_id, messages=p.messages, tokens=len(p.prompt_ids), split=p.split,
                    source=p.source, parent=p.parent, joined=p.joined,
                )
                for i, p in enumerate(rows)
            ],
            total=total,
            next=after + len(rows) if rows and after + len(rows) < total else None,
        )  # fmt: skip

    def answers(self, before: int | None = None, columns: int = 3, after: int = 0, limit: int = 10) -> m.AnswerPage:
        """What the initial policy and those of some audited rounds say to some audit prompts."""
        found = answers.read(self.store, self.run_dir, before=before, columns=columns, start=after, prompts=limit)
        end = after + len(found.lines)
        return m.AnswerPage(
            columns=[m.AnswerColumn(**dataclasses.asdict(column)) for column in found.columns],
            prompts=[
                m.AnswerRow(
                    prompt_id=line.prompt_id,
                    messages=line.messages,
                    answers=[
                        None
                        if said is None
                        else m.Said(
                            text=said.text, reward=said.reward, tokens=said.n_tokens, thinking=said.thinking,
                            finish_reason=said.finish_reason, about=answers.about(said, before),
                        )
                        for before, said in zip([None, *line.said], line.said, strict=False)
                    ],
                )
                for line in found.lines
            ],
            total=found.prompts,
            next=end if found.lines and end < found.prompts else None,
            earlier=found.earlier,
        )  # fmt: skip

    def policies(self, before: int | None = None, limit: int = 50) -> list[m.PolicyRow]:
        """Policies, newest first."""
        current = self.store.serving()
        rows = paging.policies(self.store, before, limit)
        return [m.PolicyRow(**row, current=row["version"] == current) for row in rows]

    def events(
        self, before: int | None = None, kind: str | None = None, index: int | None = None, limit: int = 50
    ) -> list[m.Event]:
        return [m.Event(**row) for row in paging.events(self.store, before, kind, index, limit)]

    def orders(self, before: int | None = None, state: str | None = None, limit: int = 50) -> list[m.OrderRow]:
        return [m.OrderRow(**row) for row in paging.orders(self.store, before, state, limit)]

    def submit(self, kind: str, arguments: dict[str, Any], origin: str) -> int:
        """Leave an order for the service; returns its number. Raises InputError for one that can never be obeyed."""
        if paging.waiting_orders(self.store) >= MAX_PENDING:
            raise TooManyOrders(f"{MAX_PENDING} orders wait already", "wait until the service has obeyed some")
        return orders.submit(self.store, kind, arguments, origin)


class TooManyOrders(InputError):
    """The service does not keep up with its orders."""


def _known(value: Any) -> Any:
    """A value as the ledger has it: None where it is not a number."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _is_time(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True
