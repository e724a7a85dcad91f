"""A policy into a running `vllm serve`: pause, reload, resume, and canaries that show which weights answer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

from selfplay.errors import PublishError
from selfplay.generation.swap import Canaries, distance, fresh_tolerance, judge, tolerance
from selfplay.publishing.server import EXTENSION, Server


def put(
    server: Server,
    version: int,
    path: str,
    known: Mapping[int, tuple[str, Canaries]],
    *,
    dtype: str,
    largest: float | None,
    seconds: float,
    touched: bool,
    begin: Callable[[], None],
) -> str:
    """Have a server serve the weights in `path`, shown by their canaries. Returns how they were shown.

    known: policies of the run that it may serve now, and `version` itself: folder and canaries of each.
    dtype: the serving precision of the run. largest: `swap.tolerance`, in nats a token.
    touched: an earlier try may have left it with any weights. begin: called before it is touched.
    Raises PublishError. The server then serves what it did before, as far as it can be brought back.
    """
    root, new = server.open(), known[version][1]
    serves: int | None = None  # the policy that is in it, where that can be told
    noise = 0.0
    if server.paused:  # it answers nothing then
        if not touched:
            raise PublishError(f"{server.url} is paused, by somebody else", "resume it (POST /resume)")
    else:
        serves, noise = _recognised(server, new, known, largest or fresh_tolerance(dtype))
        if serves is None and not touched:
            raise PublishError(
                f"{server.url} serves none of this run's policies: the nearest is {noise:.2g} nats a token away",
                f"start it with the run's model ({known[min(known)][0]}) and --dtype {dtype}: weights of another shape would end it",
            )
    short = min(len(ids) - 1 for ids in new.token_ids)
    bound = largest or (fresh_tolerance(dtype) if serves is None else tolerance(dtype, noise, short))
    parent = None if serves is None or serves == version else known[serves][1]

    def shown() -> tuple[str, float]:
        evidence, to_new, _, _ = judge(
            server.logps(new.token_ids), new, parent, 0.0 if serves is None else noise, bound
        )
        return evidence, to_new

    back = [root] if serves is None else [known[serves][0], root]
    begin()
    _reload(server, [path], back, seconds)
    evidence, to_new = shown()
    if evidence == "refuted" and server.rpc("renew_packed_weights"):  # kernels of a CPU keep copies
        evidence, to_new = shown()
    said = f"{to_new:.2g} nats a token from its canaries"
    if evidence == "refuted":
        with contextlib.suppress(PublishError):
            _reload(server, back, [], seconds)
            server.rpc("renew_packed_weights")
        hint = f"on a CPU start it with {EXTENSION}; see its log"
        raise PublishError(f"{server.url} does not answer with the weights of policy {version} ({said})", hint)
    if evidence == "shown":
        return f"shown by canaries, {said}"
    (compared,) = server.rpc("compare_weights", path)[:1] or [{"supported": False}]
    if not compared["supported"]:
        return f"canaries cannot tell it from policy {serves} at this precision ({said}); with {EXTENSION} the weights are compared"
    if compared["max_abs_diff"] > 0:
        why = f"its weights differ from the policy's by up to {compared['max_abs_diff']:.2g}"
        raise PublishError(f"{server.url} does not serve policy {version}: {why}", "see its log")
    return f"shown by {compared['compared']:,} weights that are the policy's"


def _recognised(
    server: Server, asked: Canaries, known: Mapping[int, tuple[str, Canaries]], most: float
) -> tuple[int | None, float]:
    """Which policy it serves, and how far its canaries are off (nats a token); None where it is none of them."""
    found = server.logps(asked.token_ids)
    distances = {
        number: distance(found, canaries.logps, canaries.token_ids)
        for number, (_, canaries) in known.items()
        if canaries.token_ids == asked.token_ids
    }
    nearest = min(distances, key=lambda number: distances[number])
    return (nearest if distances[nearest] <= most else None), distances[nearest]


def _reload(server: Server, wanted: list[str], back: list[str], seconds: float) -> None:
    """Pause, reload the first of `wanted` that can be, resume. Where none can, one of `back` before the server goes on.

    Requests would kill an engine whose last reload failed. Raises PublishError.
    """
    failure: PublishError | None = None
    server.pause()
    try:
        for path in [*wanted, *back]:
            try:
                server.reload(path, seconds)
            except PublishError as error:
                failure = failure or error
            else:
                if failure is not None and path not in wanted:
                    raise PublishError(
                        f"it could not read {wanted[0]} ({failure}), and serves {path} again",
                        "the server has to see the weights under this path: mount the folder there",
                    )
                return
        assert failure is not None, "a reload that worked returns"
        raise failure
    finally:
        server.resume()
