"""Turns on GPUs that every role uses (`placement: shared`): whoever needs them takes its turn, and the role before makes room."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


class Turns:
    """Whose turn it is. Only for the thread that runs the rounds.

    `make_room`: how each role gives the memory of all GPUs back. The roles are the engine, the reward, the judge and the
    trainer. `shared`: whether they take turns at all; elsewhere nothing here happens. `tell`: records an event. `say`: shows what
    is waited for.
    """

    def __init__(
        self,
        make_room: Mapping[str, Callable[[], object]],
        shared: Callable[[], bool],
        tell: Callable[[str, str], None],
        say: Callable[[str], None],
    ) -> None:
        self._make_room, self._shared, self._tell, self._say = make_room, shared, tell, say
        self._role: str | None = None

    def take(self, role: str) -> None:
        """Wait until the role may use the GPUs. A role whose turn it is goes on."""
        before = self._role
        if not self._shared() or before == role:
            return
        self._role = role
        if before is None:
            self._tell("turn", f"{role} uses the GPUs")
            return
        self._say(f"{role} waits for its turn on the GPUs: {before} makes room")
        began = time.monotonic()
        self._make_room[before]()
        self._tell("turn", f"{role} uses the GPUs; {before} made room in {time.monotonic() - began:.1f} s")
