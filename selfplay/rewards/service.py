"""A reward service as a run uses it: servers at a URL, or a server of ours that is kept alive while it is asked."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import TypeVar

from reward.client import RewardClient, RewardRefused, RewardUnavailable
from reward.dialects import Scored as Given
from reward.kinds import Kind
from reward.proxies import proxy_of
from selfplay.config import RewardSource, secrets
from selfplay.errors import InputError, Interrupted, RewardError
from selfplay.processes.child import PATIENT, Child, ChildDied
from selfplay.processes.children import owning
from selfplay.processes.gpus import count, environment
from selfplay.processes.logs import last_line
from selfplay.processes.places import ADDRESS, HERE, Place
from selfplay.rewards.texts import Item

Answer = TypeVar("Answer")
RESTARTS = 3  # of a reward server that dies within one call
REQUESTS = 2  # in flight for each device: one that it scores and one that waits, so that it never idles in between


class RewardService:
    """Rewards for items, from the servers at `config.url` or from a server that is a child of ours.

    A child that dies while it is asked is started again at the same address, and the client's retries bridge the gap.
    """

    def __init__(
        self,
        config: RewardSource,
        run_dir: Path,
        *,
        name: str = "reward",
        gpus: Sequence[int] | None = None,
        shared: bool = False,
        on_event: Callable[[str, str], None],
        place: Place = HERE,
    ) -> None:
        """`shared`: the server uses all GPUs, and has to make room for others between its turns. `place`: where it runs."""
        self._config, self._run_dir, self.name, self._on_event = config, run_dir, name, on_event
        self._shared, self._gpus = shared, count() if gpus is None else len(gpus)
        self._everywhere = shared or len(gpus or ()) > 1
        self._place = place  # another place than this machine gives the server its GPUs itself, and has its own secrets
        own = owning(*secrets.of(config))
        self._env = {"OMP_NUM_THREADS": "1", **environment(gpus if place is HERE else None), **own}
        self.log = run_dir / "logs" / f"{name}.log"
        self._child: Child | None = None
        self._starting: Child | None = None  # the same child while `_watch` waits until it serves
        self._port = 0  # any free one at first, and then the same at each restart
        self._client: RewardClient | None = None

    def start(self) -> None:
        """Start the server if it is ours. It returns at once."""
        if self._config.url or self._child is not None:
            return
        name, settings = self._served()
        options = [
            "--kind",
            name,
            "--settings",
            settings.model_dump_json(),
            "--host",
            ADDRESS,
            "--port",
            str(self._port),
        ]
        argv = [sys.executable, "-m", "reward.server", *options]
        child = Child(
            self.name, argv, run_dir=self._run_dir, log=self.log, env=self._env, silence=PATIENT, place=self._place
        )
        child.start()
        self._child = child

    def _served(self) -> tuple[str, Kind]:
        """The kind that the child serves, and its settings: with a copy on each GPU where it may choose its device."""
        served = self._config.served()
        assert served is not None
        name, settings = served
        several = self._everywhere and getattr(settings, "device", None) == "auto"
        return name, settings.model_copy(update={"device": "all"}) if several else settings

    def _devices(self) -> int:
        """How many devices score, as far as the configuration says it."""
        if self._config.url:
            return len(self._config.url)
        _, settings = self._served()
        device = str(getattr(settings, "device", "cpu"))
        return max(1, self._gpus) if device == "all" else len(device.split(","))

    @property
    def takes_turns(self) -> bool:
        """Whether the server is ours and works on GPUs that it shares with other roles."""
        return self._shared and not self._config.url and getattr(self._served()[1], "device", "cpu") != "cpu"

    def make_room(self) -> None:
        """Give the memory of shared GPUs back: the server ends, and the next call starts another.

        The process ends, and does not only empty its caches, because a CUDA context alone keeps half a gigabyte of each GPU.
        """
        if self.takes_turns:
            self.stop()

    def stop(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._child is not None:
            self._child.stop()
            self._child = None

    def interrupt(self) -> None:
        """Have whoever waits for scores now, in another thread, raise Interrupted instead."""
        if (client := self._client) is not None:
            client.interrupt(Interrupted(f"the scores of the {self.name} are not wanted any more"))

    def score(
        self,
        items: Sequence[Item],
        on_progress: Callable[[int], None] | None = None,
        on_scored: Callable[[Sequence[Given]], None] | None = None,
        known: Container[int] = (),
    ) -> list[float | None]:
        """One finite number for each item, or None for an item that cannot be scored.

        `on_scored` gets the answers to each request when they come, with places in `items`. Items at places in `known` are
        not asked for and get None. Raises RewardError when the reward stays down, and InputError when the server refuses
        the model or the request.
        """
        return self._ask(
            lambda client: client.score(
                [(item.messages, item.response) for item in items],
                references=[item.reference for item in items],
                on_progress=on_progress,
                on_scored=on_scored,
                known=known,
            )
        )

    @property
    def identity(self) -> str:
        """What scores: the SHA-256 of weights and template, and the precision, as the server says. A server that does not
        say goes by the name in the configuration, behind a «/», or by «» without such a name."""
        health = self._ask(lambda client: client.health())
        if health.weights_sha256:
            return f"{health.weights_sha256}/{health.template_sha256}/{health.dtype}"
        if health.kind == "judge":  # it compares answers, and with a name its scores would count as those of one answer
            return ""
        return f"/{health.template_sha256}/{self._config.identity}" if self._config.identity else ""

    @property
    def compares(self) -> bool:
        """Whether a server that does not say which weights it has may compare the items of a request."""
        return self._config.dialect == "selfplay"

    @property
    def reasons(self) -> Counter[str]:
        """Why items of the last call have no score, and how many."""
        return self._client.reasons if self._client is not None else Counter[str]()

    @property
    def weights(self) -> frozenset[str]:
        """The weights that the last scores came from, as the server says; empty if it does not say."""
        return self._client.weights if self._client is not None else frozenset()

    def _ask(self, call: Callable[[RewardClient], Answer]) -> Answer:
        """Make `call` with a server that is kept alive meanwhile."""
        client = self._ready()
        done, unavailable = threading.Event(), False
        watch = threading.Thread(target=self._watch, args=(done,), name=f"{self.name}-watch", daemon=True)
        if self._child is not None:
            watch.start()
        try:
            return call(client)
        except RewardRefused as error:
            raise InputError(f"the {self.name} server refuses: {error}", self._hint()) from error
        except RewardUnavailable as error:
            unavailable = True
            raise RewardError(f"the {self.name} is unavailable: {error}", self._hint()) from error
        finally:
            done.set()
            while watch.is_alive():  # it may wait for a server that is slow to start, which nobody needs any more
                if (starting := self._starting) is not None:
                    starting.cut()
                watch.join(0.2)
            if unavailable and self._child is not None:
                self._child.stop(grace=0)  # it may hang, and the next call starts another one

    def _ready(self) -> RewardClient:
        """The client of a server that serves. A server of ours is started if there is none."""
        if self._child is not None and not self._child.alive:
            self._on_event("reward_restart", f"the {self.name} server died; starting it again")
            self._child.stop()
            self._child = None
        url = self._config.url
        if not url and (self._child is None or self._client is None):
            self.start()
            url = [self._wait_until_it_serves()]
        if self._client is None:
            key = self._config.api_key_env
            if key and not os.environ.get(key):
                raise InputError(f"the key for the {self.name} is to be in ${key}, which is not set", "export it")
            try:
                self._client = RewardClient(
                    url,
                    dialect=self._config.dialect,
                    tokenizer=self._config.tokenizer,
                    model=self._config.served_model,
                    chat_template_kwargs=self._config.chat_template_kwargs,
                    template_date=self._config.template_date,
                    api_key=os.environ[key] if key else None,
                    proxy=proxy_of(self._config.proxy_env),
                    batch_size=self._config.batch,
                    concurrency=self._config.concurrency or REQUESTS * self._devices(),
                    timeout=self._config.timeout,
                    deadline=self._config.deadline,
                )
            except ValueError as error:
                raise InputError(f"the {self.name} cannot be asked: {error}", "correct the configuration") from error
        return self._client

    def _wait_until_it_serves(self) -> str:
        assert self._child is not None
        try:
            url = str(self._child.wait_for("ready")["url"])
        except ChildDied as error:
            self._child = None
            what = self._config.model or f"the kind {self._served()[0]}"
            message = f"the {self.name} server for {what} did not start: {last_line(self.log)}"
            failure = InputError if re.search(r"exit code 2\b", str(error)) else RewardError
            raise failure(message, self._hint()) from error
        if self._place is HERE:
            self._port = int(url.rpartition(":")[2])
        if self._client is not None:  # it was started again, and may be on another node now
            self._client.move(url)
        return url

    def _watch(self, done: threading.Event) -> None:
        """Start a dead server again while somebody waits for its answers, at most RESTARTS times."""
        for _ in range(RESTARTS):
            while self._child is None or self._child.alive:
                if done.wait(0.2):
                    return
            if done.is_set():
                return
            self._on_event("reward_restart", f"the {self.name} server died; starting it again")
            self._child.stop()
            self._child = None
            try:
                self.start()
                self._starting = self._child
                self._wait_until_it_serves()
            except Interrupted:
                return
            except (InputError, RewardError) as error:
                if not done.is_set():
                    self._on_event("warning", str(error))
                return
            finally:
                self._starting = None

    def _hint(self) -> str:
        if self._config.url:
            return f"see that {', '.join(self._config.url)} answers, then run the same command again"
        return f"see {self.log}, then run the same command again"
