"""A run that compresses its draws and rewrites prompts by rules."""

import pytest
from mini import RULES, rows

from selfplay.prompts import pool
from selfplay.storage.ledger import Store
from selfplay.types import Drawn, Prompt, Rewrite

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_draw_is_compressed_and_what_was_passed_over_counts_as_drawn(calm):
    run_dir, _ = calm
    store = Store(run_dir)
    metrics = [store.metrics(index) for index in (1, 2)]
    store.close()
    seen = set()
    for index in (1, 2):
        drawn, clusters = rows(run_dir, index, "prompts/drawn", Prompt), rows(run_dir, index, "prompts/clusters", Drawn)
        kept = [p.prompt_id for p in rows(run_dir, index, "prompts/prompts", Prompt)]
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
    run_dir, _ = calm
    everything = {p.prompt_id: p for p in pool.Pool(run_dir / "pool")}
    began = {prompt_id: p for prompt_id, p in everything.items() if p.joined is None}
    added = [p for p in everything.values() if p.prompt_id not in began]
    store = Store(run_dir)
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
        rewrites = rows(run_dir, index, "evolve/rewrites", Rewrite)
        assert [w.prompt_id for w in rewrites if w.prompt_id] == [p.prompt_id for p in joined]
        assert all((w.prompt_id is None) != (w.rejected_because is None) for w in rewrites)
        drawn = {p.prompt_id for p in rows(run_dir, index, "prompts/prompts", Prompt)}
        for prompt in joined:
            assert prompt.split == "train" and prompt.parent in drawn
            assert prompt.ancestor == everything[prompt.parent].ancestor in began
            assert prompt.source.endswith(f" by {RULES}")
            assert prompt.prompt_ids[0] == began[prompt.ancestor].prompt_ids[0]
    assert metrics[1]["prompts/pool"] == metrics[0]["prompts/pool"] + metrics[0]["evolve/joined"]
    held_out = {p.messages[-1]["content"] for p in began.values() if p.split != "train"}
    assert not held_out & {p.messages[-1]["content"] for p in added}
