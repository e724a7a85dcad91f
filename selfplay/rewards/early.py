"""Scores while others are still sampled: a thread that takes the shards of a round as they become whole."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from selfplay.errors import Interrupted
from selfplay.rewards.prefetch import prefetched
from selfplay.rewards.scorer import Scorer
from selfplay.rewards.shards import Shards, contents
from selfplay.rewards.texts import Conversations, Item
from selfplay.storage import tables

logger = logging.getLogger(__name__)

GRACE = 2.0  # seconds for the thread to end in, once nobody wants its scores any more
NO_MORE = -1  # comes before the number of any shard


class EarlyScoring:
    """Scores whole shards into files that the stage `score` finds, until it is told that no more are wanted.

    It fails nobody and tells nobody: a reward that is down, that refuses or that is not what it was ends it, and `score`
    then meets the same and says so. It uses the scorer in its thread, so nobody else may use that before it has ended.

    prompts: the file of the round's prompts. shards: as in `scoring.score`. begins: whether anything is to be scored early,
    asked once in the thread with the shard that has the first prompts, before any score.
    """

    def __init__(
        self, scorer: Scorer, *, prompts: Path, shards: Callable[[object], Path], begins: Callable[[Path], bool]
    ) -> None:
        self._scorer, self._prompts, self._shards, self._begins = scorer, prompts, shards, begins
        self._whole: queue.PriorityQueue[tuple[int, Path]] = queue.PriorityQueue()
        self._unwanted = threading.Event()
        self._seconds, self._asks_since = 0.0, 0.0
        self.scored = 0
        """Candidates that have been scored."""
        self.trouble: Exception | None = None
        """What has ended it."""
        self._thread = threading.Thread(target=self._work, name="early-scoring", daemon=True)
        self._thread.start()

    @property
    def seconds(self) -> float:
        """How long the reward has been asked."""
        since = self._asks_since
        return self._seconds + (time.monotonic() - since if since else 0.0)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def add(self, start: int, file: Path) -> None:
        """Take a whole shard, whose first prompt is number `start`."""
        self._whole.put((start, file))

    def finish(self, breathe: Callable[[str], None]) -> None:
        """Let it end with the shard that it is at and the one that is read already, and wait for that. `breathe("shard")` is called
        meanwhile; what it raises ends the wait."""
        self._whole.put((NO_MORE, Path()))
        while self.alive:
            breathe("shard")
            self._thread.join(0.1)

    def stop(self) -> None:
        """End it at once. Answers that it still waits for are not wanted; what is whole stays.

        It may live on where a server does not start or does not answer. It then does nothing more than wait for that.
        """
        self._unwanted.set()
        self._whole.put((NO_MORE, Path()))
        until = time.monotonic() + GRACE
        while self.alive and time.monotonic() < until:
            self._scorer.interrupt()
            self._thread.join(0.05)

    def _work(self) -> None:
        try:
            self._score()
        except Exception as error:  # the stage `score` meets it again
            self.trouble = error
            logger.info("no more scores before all candidates are sampled: %s", error)

    def _score(self) -> None:
        waiting = [self._whole.get()]
        while waiting[-1][0] > 0:
            waiting.append(self._whole.get())
        start, first = waiting[-1]
        if start == NO_MORE:
            return
        for shard in waiting:
            self._whole.put(shard)
        identities = self._scorer.identities
        if not self._begins(first):
            return
        who = self._scorer.who(identities)
        shards = Shards(folder=self._shards(who), scorer=self._scorer, identities=identities)
        with Conversations(self._prompts) as conversations, ThreadPoolExecutor(1, "early-scores") as beside:

            def whole() -> Iterator[tuple[str, int, list[Item] | None]]:
                while (shard := self._whole.get())[0] != NO_MORE:
                    count = tables.count_rows(shard[1])
                    [content] = contents(shard[1], count)
                    yield content, count, None if shards.has(content) else conversations.of_file(shard[1])

            # While the reward is at a shard, the next one is read, and the scores of the last one are written.
            written: list[Future[None]] = []
            with contextlib.closing(prefetched(whole())) as wanted:
                try:
                    for content, count, items in wanted:
                        if self._unwanted.is_set():
                            return
                        if items is not None:
                            self._asks_since = time.monotonic()
                            answer = shards.ask(items, self._still_wanted)
                            self._seconds, self._asks_since = self.seconds, 0.0
                            for last in written:
                                last.result()
                            written = [beside.submit(shards.keep, content, answer)]
                        self.scored += count
                finally:
                    self._whole.put((NO_MORE, Path()))  # nobody waits for the next one any more
            for last in written:
                last.result()

    def _still_wanted(self, done: int) -> None:
        if self._unwanted.is_set():
            raise Interrupted("nobody wants these scores any more")
