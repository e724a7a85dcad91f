"""Rounds that compress their draw and rewrite prompts, on the miniature: undisturbed, killed, with the policy as rewriter."""

import os
import shutil
import signal
from pathlib import Path

import pytest
from mini import Command, config, nothing_left

from selfplay import artifacts, pool
from selfplay.display import Display
from selfplay.run import Run
from selfplay.store import Store
from selfplay.types import Drawn, Prompt, Rewrite

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

RULES = "selfplay.tiny_rewriter:rewrite"
GROW = [
    word
    for override in ("breadth.method=clusters", "evolve.every=1", f"evolve.rewriter={RULES}")
    for word in ("--set", override)
]


@pytest.fixture(scope="module")
def calm(mini_world, tmp_path_factory):
    """Two rounds that nobody disturbed. Tests that go on with a run take a copy."""
    run_dir = tmp_path_factory.mktemp("calm") / "run"
    code, out = Command(mini_world, run_dir, "--rounds", "2", *GROW).finish()
    assert code == 0, out
    return run_dir


def state(run_dir: Path) -> dict[str, bytes]:
    files = [*run_dir.glob("rounds/*/*/*.parquet"), *run_dir.glob("pool/**/*.parquet")]
    return {str(f.relative_to(run_dir)): f.read_bytes() for f in [*files, *run_dir.glob("policies/*/*.safetensors")]}


def rows(run_dir, index, name, kind):
    return artifacts.read_rows(run_dir / "rounds" / f"{index:04d}" / f"{name}.parquet", kind)


def test_a_draw_is_compressed_and_what_was_passed_over_counts_as_drawn(calm):
    store = Store(calm)
    metrics = [store.metrics(index) for index in (1, 2)]
    store.close()
    seen = set()
    for index in (1, 2):
        drawn, clusters = rows(calm, index, "prompts/drawn", Prompt), rows(calm, index, "prompts/clusters", Drawn)
        kept = [p.prompt_id for p in rows(calm, index, "prompts/prompts", Prompt)]
        assert (len(drawn), len(kept)) == (64, 32)
        assert [c.prompt_id for c in clusters] == [p.prompt_id for p in drawn]
        assert [c.prompt_id for c in clusters if c.kept] == kept
        for cluster in {c.cluster for c in clusters}:
            members = [c for c in clusters if c.cluster == cluster]
            near, far = ([c.distance for c in members if c.kept is kept] for kept in (True, False))
            assert near and max(near) <= min(far, default=1e9)
        assert not seen & {p.prompt_id for p in drawn}
        seen |= {p.prompt_id for p in drawn}
    assert metrics[0]["prompts/passed_over"] == 32
    assert 0.3 < metrics[0]["prompts/cluster_evenness"] < 1
    assert metrics[0]["prompts/clusters"] == 32
    assert (metrics[0]["prompts/epoch"], metrics[0]["prompts/offset"]) == (0, 64)


def test_rewrites_join_the_next_round_with_their_lineage(calm):
    began = {p.prompt_id: p for p in artifacts.read_rows(calm / "pool" / pool.POOL, Prompt)}
    everything = pool.read(calm / "pool")
    added = [p for p in everything.values() if p.prompt_id not in began]
    store = Store(calm)
    events = [e for e in store.events() if e["kind"] == "evolve"]
    metrics = [store.metrics(index) for index in (1, 2)]
    store.close()
    assert [e["round"] for e in events] == [1, 2]
    for index, event in zip((1, 2), events, strict=True):
        m = metrics[index - 1]
        joined = [p for p in added if p.joined == index + 1]
        assert len(joined) == m["evolve/joined"] > 10
        assert m["evolve/rewrites"] == 5 * m["evolve/parents"] == 40
        assert event["text"].startswith(f"{len(joined)} of 40 rewrites join the pool")
        assert f"rewritten by {RULES}, a function with rules: no model was asked" in event["text"]
        rewrites = rows(calm, index, "evolve/rewrites", Rewrite)
        assert [w.prompt_id for w in rewrites if w.prompt_id] == [p.prompt_id for p in joined]
        assert all((w.prompt_id is None) != (w.rejected_because is None) for w in rewrites)
        drawn = {p.prompt_id for p in rows(calm, index, "prompts/prompts", Prompt)}
        for prompt in joined:
            assert prompt.split == "train" and prompt.parent in drawn
            assert prompt.ancestor == everything[prompt.parent].ancestor in began
            assert prompt.source.endswith(f" by {RULES}")
            assert prompt.prompt_ids[0] == began[prompt.ancestor].prompt_ids[0]
    assert metrics[1]["prompts/pool"] == metrics[0]["prompts/pool"] + metrics[0]["evolve/joined"]
    held_out = {p.messages[-1]["content"] for p in began.values() if p.split != "train"}
    assert not held_out & {p.messages[-1]["content"] for p in added}


def test_killed_while_it_embeds_and_while_it_evolves_nothing_is_lost_or_doubled(calm, mini_world, tmp_path):
    run_dir = tmp_path / "run"
    first = run_dir / "rounds" / "0001"

    run = Command(mini_world, run_dir, "--rounds", "1", *GROW)
    run.until(lambda: list(first.glob(".prompts.partial/drawn.parquet")), "the draw")
    run.kill_child("selfplay.trainer")
    run.until((first / "generate").is_dir, "the end of generate")
    os.kill(run.process.pid, signal.SIGKILL)
    assert "starting it again" in run.finish()[1]
    assert nothing_left(run_dir)

    run = Command(mini_world, run_dir, "--rounds", "2", *GROW)
    run.until((first / "evolve").is_dir, "the end of evolve")
    os.kill(run.process.pid, signal.SIGKILL)
    run.finish()
    assert nothing_left(run_dir)

    code, out = Command(mini_world, run_dir, "--rounds", "2", *GROW).finish()
    assert code == 0, out
    assert "evolve «kept»" in out
    ours, theirs = state(run_dir), state(calm)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    store = Store(run_dir)
    assert [e["round"] for e in store.events() if e["kind"] == "evolve"] == [1, 2]
    store.close()


def test_the_policy_itself_rewrites_and_prompts_are_added_by_hand(calm, mini_world, tmp_path):
    """The miniature's policy writes no marks, so none of its rewrites joins; but it is asked, and the ledger says so."""
    run_dir = tmp_path / "run"
    shutil.copytree(calm, run_dir, symlinks=True)
    with Run(config(mini_world), run_dir, Display()) as run:
        known = next(p for p in run.prompts.values() if p.split == "train")
        held_out = next(p for p in run.prompts.values() if p.split != "train")
        rows_to_add = [
            {"prompt": "Which river runs through Paris?", "parent": known.prompt_id},
            {"messages": held_out.messages},
            {"messages": known.messages},
            {"prompt": "word " * 200},
        ]
        counts = run.add_prompts(rows_to_add, "an order")
        assert counts == {"added": 1, "held out": 1, "duplicate": 1, "too long": 1}
        assert run.add_prompts(rows_to_add[:1], "an order") == {"duplicate": 1}
        assert [e["text"] for e in run.store.events() if e["kind"] == "prompts"] == [
            "1 of 4 prompts from an order join the pool; refused: 1 × duplicate, 1 × held out, 1 × too long",
            "0 of 1 prompts from an order join the pool; refused: 1 × duplicate",
        ]
    (new,) = [p for p in pool.read(run_dir / "pool").values() if p.source == "an order"]
    assert (new.parent, new.ancestor, new.joined, new.split) == (known.prompt_id, known.ancestor, 3, "train")

    sets = ["breadth.method=none", "evolve.rewriter=policy", "generate.engine.max_model_len=320"]
    code, out = Command(mini_world, run_dir, "--rounds", "3", *GROW, *(w for s in sets for w in ("--set", s))).finish()
    assert code == 0, out
    store = Store(run_dir)
    metrics, (event,) = store.metrics(3), [e["text"] for e in store.events(3) if e["kind"] == "evolve"]
    sampler = store.rounds()[2]["sampler"]
    store.close()
    assert metrics["prompts/pool"] == len([p for p in pool.read(run_dir / "pool").values() if p.split == "train"])
    assert metrics["evolve/by_rules"] == 0 < metrics["evolve/tokens"]
    rewrites = rows(run_dir, 3, "evolve/rewrites", Rewrite)
    assert {w.rewriter for w in rewrites} == {f"policy {sampler}"} and len(rewrites) == 40
    assert {w.rejected_because for w in rewrites} <= {"not marked", "cut off"}
    assert all(w.text and w.n_tokens for w in rewrites)
    assert event.startswith("0 of 40 rewrites join the pool") and event.endswith(f"rewritten by policy {sampler}")
