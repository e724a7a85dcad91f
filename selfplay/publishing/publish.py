"""What is published where, and what of it is done: the ledger says it, so that a kill at any moment changes nothing.

A target that fails fails no round. There is an alert, and it is tried again with the next
policy and at the next start.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from selfplay.config import Config
from selfplay.errors import Interrupted, PublishError, SelfplayError
from selfplay.generation.swap import Canaries
from selfplay.progress import Display
from selfplay.publishing import folder, hub, scratch, vllm
from selfplay.publishing.server import Server
from selfplay.reporting.export import export_policy
from selfplay.storage import policies
from selfplay.storage.ledger import LedgerError, Store, now
from selfplay.storage.policies import Manifest, Policies

STATE = "published"
"""In the ledger: target → {version, sha256, state, touched, time}. `state` is begun, failed or done. `touched`: a try that was
not done to its end may have left any weights there."""

Target = tuple[str, Callable[[bool, Callable[[], None]], str]]
"""What it is called, and a function that publishes there and says how it went. It gets whether the target was touched, and
what it has to call before it touches it."""


def publish(
    config: Config, run_dir: Path, store: Store, display: Display, alert: Callable[[str], None], retry: bool
) -> None:
    """Have every target serve the current policy. The initial one goes only where another was published before.

    retry: also what failed with this policy before.
    """
    if not (config.publish.hub or config.publish.folder or config.publish.vllm):
        return
    if (version := store.serving()) is None:
        return
    manifest = policies.read(Policies(run_dir).folder(version))
    wanted = {"version": version, "sha256": policies.weights_sha256(manifest)}
    known: dict[str, dict[str, Any]] = store.state(STATE, {})
    for name, put in targets(config, run_dir, manifest):
        last = known.get(name)
        if last is None and version == 0:
            continue
        if last is not None and wanted.items() <= last.items() and (last["state"] == "done" or not retry):
            continue
        touched = last is not None and last["touched"]
        note = partial(_note, store, known, name, wanted)
        note("begun", touched)
        try:
            policies.verify(Policies(run_dir).folder(version), masters=False)
            with display.stage(None, "publish") as line:
                line.update(text=f"policy {version} to {name}")
                said = put(touched, partial(note, "begun", True))
        except (LedgerError, Interrupted):
            raise
        except Exception as error:  # whatever a network, a Hub, a server or a disk may do: the run goes on
            hint = f"; {error.hint}" if isinstance(error, SelfplayError) and error.hint else ""
            text = f"policy {version} was not published to {name}, and is tried again at the next start: {error}{hint}"
            note("failed", known[name]["touched"])
            store.event("alert", text)
            display.warn(text)
            alert(text)
        else:
            note("done", False)
            store.event("published", f"policy {version} is published to {name}: {said}")


def _note(
    store: Store, known: dict[str, dict[str, Any]], name: str, wanted: dict[str, Any], state: str, touched: bool
) -> None:
    known[name] = {**wanted, "state": state, "touched": touched, "time": now()}
    store.set_state(STATE, known)


def targets(config: Config, run_dir: Path, manifest: Manifest) -> Iterator[Target]:
    """The folder first: servers read it."""
    settings = config.publish
    if settings.folder is not None:
        root = settings.folder.resolve()
        yield f"the folder {root}", lambda touched, begin: str(folder.put(run_dir, config.run.name, manifest, root))
    if settings.hub is not None:
        yield f"the Hub as {settings.hub}", lambda touched, begin: _to_hub(config, run_dir, manifest)
    for url in settings.vllm:
        yield f"the server {url}", partial(_to_server, config, run_dir, manifest, url)


def _to_hub(config: Config, run_dir: Path, manifest: Manifest) -> str:
    repo = config.publish.hub
    assert repo is not None
    hub.require_token()
    message = f"Policy {manifest.version} of the run {config.run.name}"
    model = run_dir / scratch.SERVICE
    shutil.rmtree(model, ignore_errors=True)  # what a killed try left
    try:
        export_policy(run_dir, manifest.version, model)
        return hub.upload_in_child(run_dir, model, repo, message, config.publish.private)
    finally:
        shutil.rmtree(model, ignore_errors=True)


def _to_server(
    config: Config, run_dir: Path, manifest: Manifest, url: str, touched: bool, begin: Callable[[], None]
) -> str:
    settings, run = config.publish, Policies(run_dir)
    place = {}
    for version in run.versions():
        found = policies.read(run.folder(version))
        place[version] = (str(Path(found.source or run.folder(version)).resolve()), Canaries.of(found.canaries))
    path = place[manifest.version][0]
    if settings.folder is not None:
        path = str(settings.folder.resolve() / f"{manifest.version:04d}")
    return vllm.put(
        server(config, url), manifest.version, path, place,
        dtype=config.policy.dtype, largest=config.swap.tolerance, seconds=settings.reload_seconds, touched=touched, begin=begin,
    )  # fmt: skip


def server(config: Config, url: str) -> Server:
    """The server at an address, with the key from the environment. Raises PublishError where that is not set."""
    settings = config.publish
    key = os.environ.get(settings.api_key_env) if settings.api_key_env else None
    if settings.api_key_env and key is None:
        raise PublishError(f"${settings.api_key_env} is not set", "export it, or leave publish.api_key_env out")
    return Server(url, key, settings.proxy_env)
