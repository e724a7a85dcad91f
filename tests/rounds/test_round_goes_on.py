"""Rounds of a run that stays open: stages that fail in turn, what the round then does, and one that has no pairs."""

from collections import Counter

import pyarrow.parquet as pq
import pytest
from mini import Opened, nothing_left, rows

from selfplay.pairs.selection import ADVICE
from selfplay.prompts import pool
from selfplay.types import Pair, PairGradient, Rewrite

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SETTINGS = (  # the policy rewrites prompts, depth follows gradients
    "evolve.every=1", "evolve.rewriter=policy", "pairs.keep=0.7", "depth.method=gradient", "depth.pairs_per_prompt=1.5",
    "depth.dim=64", "depth.layers=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def opened(calm, mini_world):
    """The calm run, open. A test goes on with the round that an earlier one left unfinished, or begins one.

    The engine has room for the instruction to rewrite; on one device it sleeps from the features to the end of training.
    """
    run_dir, _ = calm
    opened = Opened(mini_world, run_dir, "generate.engine.max_model_len=320", "placement.colocated=true")
    with opened.run:
        yield opened
    assert nothing_left(run_dir)


@pytest.fixture(scope="module")
def mended(opened):
    """What round 3 says when it fails in its trainer, and when it then goes on to its end."""
    failure = opened.failure(*SETTINGS, "train.agreement_mean=1e-15")
    assert (opened.run.dir / "current").read_text() == "2\n"
    return failure, opened.round(*SETTINGS, "train.beta_min=0.1")


def test_prompts_are_added_by_hand(opened):
    run = opened.run
    run.trainer.start()  # the next round's: it renders the prompts that are added meanwhile
    known = next(p for p in run.prompts if p.split == "train")
    held_out = next(p for p in run.prompts if p.split != "train")
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
    (new,) = [p for p in pool.Pool(run.dir / "pool") if p.source == "an order"]
    assert (new.parent, new.ancestor, new.joined, new.split) == (known.prompt_id, known.ancestor, 3, "train")


def test_layers_that_the_model_lacks_are_refused(opened):
    out = opened.failure(*SETTINGS, "depth.layers=9")
    assert "round 3: stage depth failed: layers must lie in [1, " in out
    assert "what to do: set depth.layers" in out
    assert "trainer.log" in out
    assert not (opened.run.dir / "rounds" / "0003" / "depth").exists()


def test_a_loss_that_is_not_finite_stops_the_round_and_changes_no_policy(opened):
    out = opened.failure(*SETTINGS, "train.learning_rate=1e20")
    assert "round 3: stage train failed: step " in out
    assert "no weight was changed by this step" in out
    assert "lower the learning rate" in out
    assert (opened.run.dir / "current").read_text() == "2\n"
    assert opened.run.policies.versions() == [0, 1, 2]


def test_a_failed_stage_says_what_to_do_and_the_round_goes_on_under_other_settings(opened, mended):
    failure, said = mended
    assert "round 3: stage train failed: the reference's log-probabilities differ from the generator's" in failure
    assert "what to do: " in failure
    assert "trainer.log" in failure
    assert "round 3 is unfinished: going on with it" in said
    for stage in ("generate", "score", "pairs", "evolve", "depth"):
        assert f"round 3: {stage} «kept»" in said
    assert said.count("β is held at its limit 0.1") == 1
    store = opened.run.store
    metrics = store.metrics(3)
    assert metrics["train/beta"] == 0.1
    assert metrics["train/agreement_mean"] < 1e-4
    assert metrics["train/steps"] > 0
    kinds = [e["kind"] for e in store.events(3)]
    assert (kinds[0], set(kinds[1:-1]), kinds[-1]) == ("evolve", {"failed", "evaluate"}, "promoted")
    assert store.rounds()[2]["state"] == "promoted"
    made = store.policies()[3]
    assert (made["version"], made["parent"], made["reference"], made["state"]) == (3, 2, 2, "promoted")
    assert (opened.run.dir / "current").read_text() == "3\n"


def test_depth_follows_the_gradients(opened, mended):
    run_dir = opened.run.dir
    base = [p for p in rows(run_dir, 3, "pairs/pairs", Pair) if p.kept_because]
    gradients = rows(run_dir, 3, "depth/gradients", PairGradient)
    assert [g.prompt_id for g in gradients] == [p.prompt_id for p in base]
    assert len(base) > 10 and len({g.cluster for g in gradients}) > 1
    schema = pq.read_schema(run_dir / "rounds" / "0003" / "depth" / "gradients.parquet")
    assert schema.field("feature").type.list_size == 64
    pairs = rows(run_dir, 3, "depth/pairs", Pair)
    by_prompt = {g.prompt_id: (g.cluster, g.closeness) for g in gradients}
    assert all((p.cluster, p.closeness) == by_prompt[p.prompt_id] for p in pairs)
    assert [p.prompt_id for p in pairs if p.kept_because == "base"] == [p.prompt_id for p in base]
    depths = Counter(p.prompt_id for p in pairs)
    assert len(base) < len(pairs) <= round(1.5 * len(base)) and max(depths.values()) > 1
    metrics = opened.run.store.metrics(3)
    assert metrics["depth/pairs"] == len(pairs) and metrics["depth/most"] == max(depths.values())
    assert metrics["depth/zero_gradients"] == metrics["depth/nonfinite_gradients"] == 0
    assert metrics["depth/clusters"] == len({g.cluster for g in gradients})
    assert -1 <= metrics["depth/closeness_length_correlation"] <= 1


def test_the_policy_itself_rewrites(opened, mended):
    """The miniature's policy writes no marks, so none of its rewrites joins; but it is asked, and the ledger says so."""
    run = opened.run
    metrics, (event,) = run.store.metrics(3), [e["text"] for e in run.store.events(3) if e["kind"] == "evolve"]
    assert metrics["prompts/pool"] == len([p for p in pool.Pool(run.dir / "pool") if p.split == "train"])
    assert metrics["evolve/by_rules"] == 0 < metrics["evolve/tokens"]
    rewrites = rows(run.dir, 3, "evolve/rewrites", Rewrite)
    assert {w.rewriter for w in rewrites} == {"policy 2"} and len(rewrites) == 40
    assert {w.rejected_because for w in rewrites} <= {"not marked", "cut off"}
    assert all(w.text and w.n_tokens for w in rewrites)
    assert event.startswith("0 of 40 rewrites join the pool") and event.endswith("rewritten by policy 2")


def test_a_round_without_pairs_is_skipped(opened, mended):
    """No margin is above the noise."""
    out = opened.round("reward.noise=1000")
    assert "no pair was left to train on: " in out and "margins within the reward's noise" in out
    store = opened.run.store
    skipped, metrics = store.rounds()[-1], store.metrics(4)
    assert (skipped["round"], skipped["state"], skipped["policy"]) == (4, "skipped", 3)
    assert skipped["reasons"][1] in ADVICE.values()  # by what most of its prompts were lost to
    assert metrics["pairs/dropped_noise"] == metrics["pairs/base"]
    assert (opened.run.dir / "current").read_text() == "3\n"
