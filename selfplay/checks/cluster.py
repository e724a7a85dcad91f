"""A look at the cluster: whether it answers, has room for every child, and sees the same files and packages on all nodes."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from selfplay.checks.finding import Finding, Level
from selfplay.cluster import survey
from selfplay.cluster.placing import Need, connected, load_driver, needs
from selfplay.config import Config
from selfplay.processes import gpus
from selfplay.rounds.requirements import PACKAGES

ABOUT = "cluster"
SECONDS = 120.0  # For the nodes to say what they see. A node may have to start a process for it.


def nodes(config: Config, run_dir: Path) -> Iterator[Finding]:
    """Raises ConfigError without Ray, and InputError where no cluster answers."""
    cluster = config.cluster
    if cluster is None:
        return
    if cluster.address == "local":  # it is this machine alone
        load_driver()
        there: list[Mapping[str, float]] = [{"CPU": os.cpu_count() or 1, "GPU": gpus.count()}]
        yield from room(config, there)
        return
    driver = connected(cluster.address)
    try:
        found = driver.nodes()
        yield from room(config, [node["resources"] for node in found.values()])
        yield from _same_everywhere(config, run_dir, driver, {name: node["address"] for name, node in found.items()})
    finally:
        driver.disconnect()


def room(config: Config, there: Sequence[Mapping[str, float]]) -> Iterator[Finding]:
    """Whether all children have room side by side on nodes with these resources."""
    cluster = config.cluster
    assert cluster is not None
    wanted = needs(config, any(node.get("GPU") for node in there))
    lacks = list(_lacks(wanted, there))
    level: Level = "warning" if cluster.autoscaling else "error"
    yield from (Finding(level, f"{ABOUT}.{'reward' if '-' in role else role}", text) for role, text in lacks)
    if not lacks:
        said = ", ".join(f"{role} {need}" for role, need in wanted.items())
        yield Finding.ok(ABOUT, f"{len(there)} nodes with {_total(there)} have room for {said}")


def _lacks(wanted: Mapping[str, Need], there: Sequence[Mapping[str, float]]) -> Iterator[tuple[str, str]]:
    """Which roles have no room, even when nobody else uses the nodes, and why."""
    for role, need in wanted.items():
        each = need.bundles[0]
        able = sum(all(node.get(name, 0) >= amount for name, amount in each.items()) for node in there)
        needed = need.children if need.strategy == "STRICT_SPREAD" else 1
        if able < needed:
            yield role, f"the {role} needs {need}, and {able} of {len(there)} nodes have room for one"
            return
    if wanted["engine"].workers and not any(node.get("GPU") for node in there):
        yield (
            "engine",
            "an engine on several nodes needs GPUs (cluster.engine.nodes): vLLM's Ray executor knows no CPUs",
        )
        return
    for name in ("CPU", "GPU"):
        sums = {role: sum(bundle.get(name, 0) for bundle in need.bundles) for role, need in wanted.items()}
        if name == "GPU":
            sums["engine"] += wanted["engine"].workers * wanted["engine"].children
        total, have = sum(sums.values()), sum(node.get(name, 0) for node in there)
        if total > have:
            parts = " + ".join(f"{role} {amount:g}" for role, amount in sums.items() if amount)
            yield (
                max(sums, key=lambda role: sums[role]),
                f"{total:g} {name} are needed ({parts}), the nodes have {have:g}",
            )


def _total(there: Sequence[Mapping[str, float]]) -> str:
    sums = {name: sum(node.get(name, 0) for node in there) for name in ("CPU", "GPU")}
    return " and ".join(f"{amount:g} {name}" for name, amount in sums.items() if amount) or "nothing"


def _same_everywhere(config: Config, run_dir: Path, driver: Any, addresses: Mapping[str, str]) -> Iterator[Finding]:
    models = [config.policy.model, *(source.model for source in config.all_sources().values())]
    files = [str(Path(model).resolve() / "config.json") for model in models if model and Path(model).is_dir()]
    with _nonce(run_dir) as nonce:
        asked = [str(nonce), *dict.fromkeys(files)]
        here = survey.look(asked, (*PACKAGES, "ray"))
        answers = driver.on_each_node(survey.look, asked, (*PACKAGES, "ray"), seconds=SECONDS)
    wrong = False
    for node, answer in answers.items():
        called = f"node {addresses[node]} ({node[:8]})"
        if isinstance(answer, BaseException):
            first = (str(answer).strip().splitlines() or [type(answer).__name__])[0]
            told = [f"it does not answer: {first}"]
        else:
            told = [
                text.replace(str(nonce), f"the run folder ({nonce.parent})")
                for text in survey.differences(here, answer)
            ]
        for text in told:
            wrong = True
            yield Finding.error(f"{ABOUT}.nodes", f"{called}: {text}")
    if not wrong:
        yield Finding.ok(f"{ABOUT}.nodes", f"{len(answers)} nodes see {nonce.parent} and have the same packages")


@contextlib.contextmanager
def _nonce(run_dir: Path) -> Iterator[Path]:
    """A file that no node can have seen before, in the run folder, or where that will be made."""
    where = next(path for path in [run_dir.resolve(), *run_dir.resolve().parents] if path.is_dir())
    file = where / f".cluster-{secrets.token_hex(8)}"
    try:
        file.write_text(secrets.token_hex(32), encoding="utf-8")
        yield file
    finally:
        file.unlink(missing_ok=True)
