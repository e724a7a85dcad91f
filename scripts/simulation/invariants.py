"""What has to hold when a history has ended, by its ledger and its folder."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from selfplay.storage import closed
from selfplay.storage.folders import MANIFEST
from selfplay.storage.ledger import Store
from selfplay.storage.policies import Policies
from simulation.processes import PROMPTS, WEIGHTS, digest
from simulation.stages import SHARDS, candidates, outcome, read, trained
from simulation.taps import must
from simulation.world import World

SAMPLED = ("prompts", "generate", "score", "guard", "pairs")
STAGES = {"skipped": SAMPLED, "promoted": (*SAMPLED, "depth", "train", "evaluate", "promote")}
STAGES["rejected"] = STAGES["promoted"]
KNOWN = {
    "ledger.sqlite",
    "pool",
    "rounds",
    "policies",
    "reward",
    "logs",
    "current",
    ".lock",
    ".ledger.lock",
    "pool.parts",
}
OUTCOMES = ("promoted", "rejected", "skipped", "cancelled")


def check(world: World) -> None:
    """Raises Violation for the first that does not hold."""
    store = world.database.outside
    events, rounds = store.events(), store.rounds()
    _rounds(world, rounds, events)
    _orders(world, store, events)
    _current(world, store, rounds, events)
    stages = _stages(store, rounds)
    for row in rounds:
        _folder(world, row, stages[row["round"]])
    _policies(world, store, rounds)
    _prompts(world, rounds)
    _ahead(world, store, rounds, events, stages)
    left = set(os.listdir(world.root)) - KNOWN
    must(not left, f"the folder has {sorted(left)}")


def _stages(store: Store, rounds: list[dict[str, Any]]) -> dict[int, set[str]]:
    """Names of the stages that the ledger tells of, by round."""
    found: dict[int, set[str]] = {row["round"]: set() for row in rounds}
    for row in store.query("SELECT round, stage FROM stages"):
        must(row["round"] in found, f"the ledger has a stage of round {row['round']}, and no such round")
        found[row["round"]].add(row["stage"])
    return found


def _rounds(world: World, rounds: list[dict[str, Any]], events: list[dict[str, Any]]) -> None:
    """No round is lost, double, open still, or other than its rewards and verdict say."""
    must([row["round"] for row in rounds] == list(range(1, len(rounds) + 1)), "the rounds have a gap")
    told = Counter(event["round"] for event in events if event["kind"] in OUTCOMES)
    for row in rounds:
        index, state = row["round"], row["state"]
        must(state in (outcome(world.base, index), "cancelled"), f"round {index} is {state}")
        must(row["ended"] is not None, f"round {index} has no end")
        must(told[index] == 1, f"the end of round {index} is told {told[index]} times")
        wanted = index if state == "promoted" else row["champion"]
        must(row["policy"] == wanted, f"round {index} is {state}, and policy {row['policy']} serves after it")


def _orders(world: World, store: Store, events: list[dict[str, Any]]) -> None:
    """Each order is obeyed or refused once, and who ordered a round got one, unless there is a pause."""
    given = store.query("SELECT id, kind, state, result FROM orders ORDER BY id")
    kinds = Counter(event["kind"] for event in events)
    for row in given:
        must(row["state"] in ("done", "refused"), f"order {row['id']} ({row['kind']}) is {row['state']}")
        must("Error" not in row["result"].split(":")[0], f"order {row['id']} ({row['kind']}): {row['result']}")
    for number, index in world.promised.items():
        must(
            index <= store.last_round() or store.state("pause"),
            f"order {number} was for round {index}, which never began",
        )
    must(kinds["order_given"] == len(given), "an order was given and is not there")
    must(kinds["order_done"] + kinds["order_refused"] == len(given), "an order is answered twice")


def _current(world: World, store: Store, rounds: list[dict[str, Any]], events: list[dict[str, Any]]) -> None:
    """The policy that serves is the last that was promoted, or that somebody went back to since."""
    expected = 0
    for event in events:
        if event["kind"] == "promoted":
            expected = event["round"]
        elif event["kind"] == "order_done" and event["text"].startswith("rollback "):
            expected = int(event["text"].partition("version=")[2].split()[0])
    current = Policies(world.root).current
    serving = store.serving()
    must(serving == expected, f"policy {serving} serves, and by its events it is {expected}")
    must(current == expected, f"the file current names policy {current}, and policy {expected} serves")


def _folder(world: World, row: dict[str, Any], recorded: set[str]) -> None:
    """The folder of a round has what the ledger tells of, and nothing else; and what each file was made from is in it."""
    index, state = row["round"], row["state"]
    folder = world.root / "rounds" / f"{index:04d}"
    there = set(os.listdir(folder)) - {closed.NAME} if folder.is_dir() else set()
    must(there == recorded, f"round {index} ({state}) has {sorted(there)}, and the ledger tells of {sorted(recorded)}")
    if state in STAGES:
        must(recorded == set(STAGES[state]), f"round {index} ({state}) has the stages {sorted(recorded)}")
    champion, sampler = _weights(world, row["champion"]), _weights(world, row["sampler"])
    sampled = folder / "generate" / "candidates.parquet"
    if champion is None or sampler is None or not sampled.is_file():
        return  # retention has deleted it
    drawn, said = _read(world, folder / "prompts" / "prompts.parquet"), sampled.read_text()
    wanted = [candidates(sampler, drawn, n) for n in range(SHARDS)]
    must(json.loads(said) == wanted, f"round {index} was sampled by other weights, or for other prompts")
    if "pairs" in there and (folder / "score" / "scored.parquet").is_file():
        scored = (folder / "score" / "scored.parquet").read_text()
        must(scored == json.dumps([digest("score", said)]), f"round {index} was scored otherwise")
        must(
            read(folder / "pairs" / "pairs.parquet")[0][0] == digest("pairs", scored), f"round {index} has other pairs"
        )
    if "evaluate" in there and (candidate := _weights(world, index)) is not None:
        for name, weights in (("champion", champion), ("candidate", candidate)):
            answers = read(folder / "evaluate" / f"{name}.parquet")
            must(
                answers == [digest("answers", weights, "held out")], f"round {index}: other weights answered as {name}"
            )


def _ahead(
    world: World, store: Store, rounds: list[dict[str, Any]], events: list[dict[str, Any]], stages: dict[int, set[str]]
) -> None:
    """A round is sampled by its champion, or by the policy that its champion was made from. What was sampled ahead is dropped
    for an order alone: not for a rejected candidate, nor for a kill. A round that has not opened has such shards, and no stage."""
    begun: dict[int, int] = {}
    for event in events:
        if event["kind"] == "ahead" and " samples round " in event["text"]:
            begun[event["round"] + 1] = int(event["text"].split()[1])
    dropped = [event["text"] for event in events if event["kind"] == "ahead" and " is dropped" in event["text"]]
    ordered = store.query("SELECT 1 FROM orders WHERE kind IN ('rollback', 'add_prompts', 'reload', 'cancel')")
    must(ordered or not dropped, f"nobody ordered anything: {dropped}")
    for row in rounds:
        index, sampler, champion = row["round"], row["sampler"], row["champion"]
        made_from = _read(world, world.root / "policies" / f"{champion:04d}" / MANIFEST)["parent"]
        must(sampler in (champion, made_from), f"policy {sampler} sampled round {index} for policy {champion}")
        if index in begun and not ordered and "generate" in stages[index]:
            must(sampler == begun[index], f"round {index} was begun by policy {begun[index]}, and {sampler} sampled it")
    known = {f"{row['round']:04d}" for row in rounds}
    rounds_folder = world.root / "rounds"
    for name in os.listdir(rounds_folder) if rounds_folder.is_dir() else ():
        if name not in known:
            there = [stage for stage in os.listdir(rounds_folder / name) if not stage.endswith(".shards")]
            must(not there, f"round {name} has not opened, and has {there}")


def _policies(world: World, store: Store, rounds: list[dict[str, Any]]) -> None:
    """Each policy is in the ledger and in its folder, with weights or without, and was trained once from its champion."""
    policies = Policies(world.root)
    rows = {row["version"]: row for row in store.policies()}
    versions, ended_as = policies.versions(), {row["round"]: row for row in rounds}
    must(sorted(rows) == versions, f"policies {versions}, and in the ledger {sorted(rows)}")
    for version, row in rows.items():
        if not version:
            continue
        files = set(os.listdir(policies.folder(version)))
        wanted = {MANIFEST, WEIGHTS} if row["weights"] else {MANIFEST}
        must(files == wanted, f"policy {version} has {sorted(files)}, in the ledger its weights are {row['weights']}")
        ended = ended_as[version]
        must(row["state"] == ended["state"], f"policy {version} is {row['state']}, its round {ended['state']}")
        parent = _weights(world, ended["champion"])
        pairs = world.root / "rounds" / f"{version:04d}" / "depth" / "pairs.parquet"
        manifest = _read(world, policies.folder(version) / MANIFEST)
        if row["weights"] and parent is not None:
            made = trained(parent, manifest["reference_sha256"], pairs.read_text())
            must(_weights(world, version) == made, f"policy {version} was trained otherwise")


def _prompts(world: World, rounds: list[dict[str, Any]]) -> None:
    """Of the prompts that were there from the start each is drawn once an epoch; one that was added is there once."""
    drawn: Counter[str] = Counter()
    for row in rounds:
        file = world.root / "rounds" / f"{row['round']:04d}" / "prompts" / "prompts.parquet"
        drawn.update(_read(world, file) if file.is_file() else [])
    known = read(world.root / "pool" / "prompts.json")
    must(len(known) == PROMPTS, "a prompt of the pool is lost")
    times = [drawn[name] for name in known]
    must(max(times) - min(times) <= 1, f"prompts are drawn {sorted(times)} times")
    joined = world.root / "pool" / "added"
    files = sorted(os.listdir(joined)) if joined.is_dir() else []
    added = [name for file in files for name, _ in read(joined / file)]
    must(len(set(added)) == len(added), "a prompt was added twice")


def _read(world: World, path: Path) -> Any:
    """What is in a file of JSON. At the end of a history it stays as it is."""
    if path not in world.files:
        world.files[path] = read(path)
    return world.files[path]


def _weights(world: World, version: int) -> str | None:
    """The weights of a policy; None where they are gone. At the end of a history they stay as they are."""
    if version not in world.weights:
        manifest = world.root / "policies" / f"{version:04d}" / MANIFEST
        there = manifest.is_file()
        source = _read(world, manifest)["source"] if there else None
        file = (Path(source) if source else manifest.parent) / WEIGHTS
        world.weights[version] = file.read_text() if there and file.is_file() else None
    return world.weights[version]
