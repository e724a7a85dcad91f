"""Scorers with real reward servers: ensembles whose scale is kept, a cache that spares questions, models that change."""

import contextlib
import json
import math
import threading
from collections import Counter

import numpy as np
import pytest
from fake_reward import fake, send
from mini import nothing_left
from outside import served
from reward_world import bare_scores, conversation, reward_model

from selfplay.config import EnsembleConfig, RewardSource
from selfplay.errors import GuardError, Interrupted, RewardError
from selfplay.rewards.cache import ScoreCache
from selfplay.rewards.scorer import Scorer
from selfplay.rewards.service import RewardService
from selfplay.rewards.texts import Item
from selfplay.storage import folders

pytestmark = pytest.mark.service

ITEMS = [Item(*conversation(i, 3 + i % 5)) for i in range(12)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two reward models with other weights."""
    return [reward_model(tmp_path_factory.mktemp(f"model{seed}"), seed=seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def urls(models):
    with served(models[0]) as first, served(models[1]) as second:
        yield [first, second]


def scorer(tmp_path, *urls, cache=None, combine="mean", events=None):
    sources = [RewardSource(url=[url], deadline=20) for url in urls]
    settings = None
    if len(urls) > 1:
        members = [{"name": name, "url": [url]} for name, url in zip("ab", urls, strict=True)]
        settings = EnsembleConfig.model_validate({"members": members, "combine": combine})
    tell = (events if events is not None else []).append
    return Scorer(
        "reward", sources, settings, tmp_path, cache=cache, gpus=None, on_event=lambda kind, text: tell((kind, text))
    )


def z(values):
    return (np.array(values) - np.mean(values)) / np.std(values)


def test_an_ensemble_keeps_the_scale_of_its_first_round(models, urls, tmp_path):
    both = np.array([bare_scores(folder, ITEMS) for folder in models])
    events = []
    ours = scorer(tmp_path, *urls, events=events)
    answer = ours.ask(ITEMS)
    assert not answer.reasons
    np.testing.assert_allclose(answer.scores, both, atol=1e-5)
    found = ours.combine(answer.identities, answer.scores)
    expected = np.array([z(both[0]), z(both[1])])
    np.testing.assert_allclose(found.rewards, expected.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(found.disagreement, np.abs(expected[0] - expected[1]) / 2, atol=1e-4)
    assert [kind for kind, _ in events] == ["scale"]

    # Another process, other items: the scale is the one of the first.
    later = scorer(tmp_path, *urls, combine="minimum")
    few = later.score(ITEMS[:3])[0]
    np.testing.assert_allclose(few, expected.min(axis=0)[:3], atol=1e-4)
    kept = folders.read_json(tmp_path / "reward" / "reward-scale.json")
    assert set(kept) - {"sha256"} == {"a", "b"}


def test_a_member_without_a_score_leaves_the_item_without_one(urls, tmp_path):
    ours = scorer(tmp_path, *urls)
    too_long = Item(*conversation(0, 2000))
    assert [v is None for v in ours.score([*ITEMS, too_long])[0]] == [False] * len(ITEMS) + [True]
    with pytest.raises(RewardError, match="member a of the reward ensemble gave no score at all"):
        scorer(tmp_path / "other", *urls).score([too_long])


def test_what_was_scored_once_is_not_asked_again(urls, tmp_path, monkeypatch):
    cache = ScoreCache(tmp_path / "scores.sqlite", 1000)
    ours = scorer(tmp_path, urls[0], cache=cache)
    asked = []
    service = ours._services[0]
    real = service.score
    monkeypatch.setattr(service, "score", lambda *a: (asked.append(len(a[0]) - len(a[3])), real(*a))[1])
    progress = []
    too_long = Item(*conversation(0, 2000))
    answer = ours.ask([*ITEMS, *ITEMS[:5], too_long], progress.append)
    assert answer.reasons == {"longer than 256 tokens": 1}
    first = answer.scores
    assert asked == [len(ITEMS) + 1]
    assert progress[-1] == len(ITEMS) + 6
    np.testing.assert_array_equal(first[0, len(ITEMS) : -1], first[0, :5])
    assert math.isnan(first[0, -1])
    again = ours.ask([too_long, *ITEMS]).scores
    assert asked == [len(ITEMS) + 1, 1]  # the missing score is asked for again, nothing else
    np.testing.assert_array_equal(again[0, 1:], first[0, : len(ITEMS)])
    ours.ask(ITEMS, fresh=True)
    assert asked[-1] == len(ITEMS)


def test_a_shard_that_is_cut_short_is_not_asked_for_again_whole(urls, tmp_path, monkeypatch):
    cache = ScoreCache(tmp_path / "scores.sqlite", 1000)
    ours = scorer(tmp_path, urls[0], cache=cache)
    service = ours._services[0]
    service._config = service._config.model_copy(update={"batch": 4, "concurrency": 1})

    def stop(done):
        if done >= 8:
            raise Interrupted("the service stops")

    with pytest.raises(Interrupted):
        ours.ask(ITEMS, stop)
    assert cache.count() == 8
    counts = []
    answer = ours.ask(ITEMS, counts.append)
    assert counts[0] == len(ITEMS) and cache.count() == len(ITEMS)
    np.testing.assert_array_equal(answer.scores, scorer(tmp_path, urls[0]).ask(ITEMS).scores)


def test_scores_of_a_service_that_tells_nothing_are_kept_under_a_name_that_is_vouched_for(tmp_path):
    def answer(handler, asked):  # OpenRLHF's form, from a server that names its weights with the scores
        scores = [float(len(q)) for q in asked["query"]]
        send(handler, 200, json.dumps({"rewards": scores, "weights_sha256": "w"}).encode())

    cache = ScoreCache(tmp_path / "scores.sqlite", 1000)
    with fake(default=answer) as server:
        for identity, expected in ((None, 3), ("mine-1", 4), ("mine-1", 4), ("mine-2", 5)):
            source = RewardSource(url=[server.url], dialect="openrlhf", identity=identity)
            ours = Scorer("reward", [source], None, tmp_path, cache=cache, gpus=None, on_event=lambda kind, text: None)
            for _ in range(3 if identity is None else 1):
                ours.ask(ITEMS)
            ours.stop()
            assert len(server.asked) == expected


def test_no_name_makes_a_score_that_compares_answers_one_of_an_answer_alone(tmp_path):
    with fake() as server:
        server.weights, server.kind = "", "judge"
        source = RewardSource(url=[server.url], identity="mine")
        ours = RewardService(source, tmp_path, on_event=lambda kind, text: None)
        assert ours.identity == ""
        server.kind = "service"
        assert ours.identity.endswith("/mine")
        ours.stop()


def test_a_cache_that_breaks_costs_time_and_no_round(tmp_path):
    cache, events = ScoreCache(tmp_path / "scores.sqlite", 100), []
    member = Member("a", identity="one/t", weights={"one"})
    ours = by_hand(scorer(tmp_path, "http://a", cache=cache, events=events), member)
    first = ours.ask(ITEMS).scores
    cache._connection.execute("DROP TABLE scores")
    np.testing.assert_array_equal(ours.ask(ITEMS).scores, first)
    np.testing.assert_array_equal(ours.ask(ITEMS).scores, first)
    assert member.asked == 3 * len(ITEMS)
    assert [kind for kind, _ in events] == ["warning"] and "cannot be used: no such table" in events[0][1]
    with pytest.raises(RewardError):  # what is to be forgotten must not stay for others
        ours.forget(("one/t",), ITEMS)


def test_after_a_cut_the_requests_are_what_they_would_have_been(tmp_path):
    """The last bits of a score depend on what is in its request. Answer 1 gets no score, so it is asked for again: alone,
    and not together with the next ones."""

    def all_but_one(handler, asked):
        scores = [None if i["response"] == "answer 1" else 1.0 for i in asked["items"]]
        ids = [i["id"] for i in asked["items"]]
        send(handler, 200, json.dumps({"scores": scores, "ids": ids, "weights_sha256": "one"}).encode())

    def stop(done):
        raise Interrupted("the service stops")

    items = [Item(conversation(i, 3)[0], f"answer {i}") for i in range(10)]
    with fake(default=all_but_one) as server:
        ours = scorer(tmp_path, server.url, cache=ScoreCache(tmp_path / "scores.sqlite", 100))
        service = ours._services[0]
        service._config = service._config.model_copy(update={"batch": 4, "concurrency": 1})
        with pytest.raises(Interrupted):
            ours.ask(items, stop)
        assert [i for i, v in enumerate(ours.ask(items).scores[0]) if math.isnan(v)] == [1]
        requests = {tuple(int(i["response"].split()[1]) for i in asked["items"]) for asked in server.asked}
    assert requests == {(0, 1, 2, 3), (1,), (4, 5, 6, 7), (8, 9)}


def test_a_model_that_changes_while_it_scores_leaves_nothing_in_the_cache(models, tmp_path, monkeypatch):
    cache = ScoreCache(tmp_path / "scores.sqlite", 1000)
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        url = first.enter_context(served(models[0]))
        ours = scorer(tmp_path, url, cache=cache)
        service = ours._services[0]
        real = service.score

        def swap_after(*asked):
            found = real(*asked)
            first.close()
            second.enter_context(served(models[1], int(url.rpartition(":")[2])))
            return found

        monkeypatch.setattr(service, "score", swap_after)
        with pytest.raises(GuardError, match="changed while it scored"):
            ours.ask(ITEMS)
        assert cache.count() == 0
        monkeypatch.setattr(service, "score", real)
        np.testing.assert_allclose(ours.ask(ITEMS).scores[0], bare_scores(models[1], ITEMS), atol=1e-5)


def test_servers_of_our_own_are_children_with_names_of_their_own(models, tmp_path):
    members = [{"name": "a", "model": str(models[0])}, {"model": str(models[1])}]
    settings = EnsembleConfig.model_validate({"members": members})
    sources = [RewardSource(model=str(folder), dtype="float32") for folder in models]
    ours = Scorer("reward", sources, settings, tmp_path, cache=None, gpus=None, on_event=lambda kind, text: None)
    ours.start()
    try:
        assert len(set(ours.identities)) == 2
        assert all(v is not None for v in ours.score(ITEMS)[0])
    finally:
        ours.stop()
    assert (tmp_path / "logs" / "reward-a.log").is_file() and (tmp_path / "logs" / "reward-1.log").is_file()
    assert nothing_left(tmp_path)


class Member:
    """A service at its boundary: so many points a character, told of in steps of one item."""

    def __init__(self, name, factor=1.0, identity="", weights=frozenset()):
        self.name, self.factor, self.identity, self.weights, self.compares = name, factor, identity, weights, False
        self.asked, self.offset, self.reasons = 0, 0.0, Counter()

    def score(self, items, on_progress, on_scored=None, known=()):
        for n in range(len(items) - len(known)):
            self.asked += 1
            on_progress(n + 1)
        return [self.offset + self.factor * len(text) for _, text, _ in items]


def by_hand(scorer, *members):
    scorer._services = list(members)
    return scorer


def test_progress_is_told_in_the_callers_thread_and_its_end_is_the_end_of_all(tmp_path):
    ours = by_hand(scorer(tmp_path, "http://a", "http://b"), Member("a"), Member("b"))
    threads, counts = set(), []
    ours.ask(ITEMS, lambda n: (threads.add(threading.current_thread()), counts.append(n)))
    assert threads == {threading.current_thread()}
    assert counts == sorted(counts) and counts[-1] == len(ITEMS)

    def stop(done):
        raise Interrupted("cancelled", now=True)

    with pytest.raises(Interrupted, match="cancelled"):
        ours.ask(ITEMS, stop)


def test_members_that_have_no_name_of_their_weights_have_their_own_scales(tmp_path):
    """The server at another address is another model: its scale is not that of the one before."""
    first = by_hand(scorer(tmp_path, "http://a", "http://b"), Member("a", 2.0), Member("b"))
    z_first = first.score(ITEMS)[0]
    second = by_hand(scorer(tmp_path, "http://c", "http://b"), Member("a", 200.0), Member("b"))
    np.testing.assert_allclose(second.score(ITEMS)[0], z_first, atol=1e-9)
    again = by_hand(scorer(tmp_path, "http://a", "http://b"), Member("a", 4.0), Member("b"))
    assert not np.allclose(again.score(ITEMS)[0], z_first)
    kept = folders.read_json(tmp_path / "reward" / "reward-scale.json")
    assert {name: len(scales) for name, scales in kept.items() if name != "sha256"} == {"a": 2, "b": 1}


def test_members_that_change_their_places_keep_their_scales(tmp_path):
    ours = by_hand(scorer(tmp_path, "http://a", "http://b"), Member("a", 2.0), Member("b", 3.0))
    before = ours.score(ITEMS)[0]
    events = []
    turned = by_hand(scorer(tmp_path, "http://b", "http://a", events=events), Member("a", 3.0), Member("b", 2.0))
    assert turned.score(ITEMS[:3])[0] == pytest.approx(before[:3]) and events == []


def test_a_member_that_gives_every_item_the_same_is_told_and_has_no_part(tmp_path):
    """The standard deviation of equal numbers is 0 but for rounding, which is no scale."""
    events = []
    ours = by_hand(scorer(tmp_path, "http://a", "http://b", events=events), Member("a", 2.0), Member("b", 0.0))
    ours._services[1].offset = 0.1
    rewards = ours.score(ITEMS)[0]
    assert rewards == pytest.approx(z([len(text) for _, text, _ in ITEMS]) / 2)
    assert [kind for kind, _ in events] == ["warning", "scale"] and "member b of the reward ensemble" in events[0][1]
    ours._services[1].offset = 0.2
    assert ours.score(ITEMS)[0] == pytest.approx(rewards)


def test_models_that_may_be_others_under_the_same_name_begin_anew(tmp_path):
    cache = ScoreCache(tmp_path / "scores.sqlite", 100)
    member = Member("a", identity="judge/t", weights={"judge"})
    ours = by_hand(scorer(tmp_path, "http://a", "http://b", cache=cache), member, Member("b"))
    first = ours.score(ITEMS)[0]
    member.factor = ours._services[1].factor = 50.0
    ours.begin_anew(ours.identities)
    assert cache.count() == 0
    assert ours.score(ITEMS)[0] == pytest.approx(first)


def test_a_resaved_model_keeps_its_scale(tmp_path):
    ours = by_hand(scorer(tmp_path, "http://a", "http://b"), Member("a", identity="old/t"), Member("b", identity="b/t"))
    ours.score(ITEMS)[0]
    ours.rename(ours.names(("old/t", "b/t")), ours.names(("new/t", "b/t")))
    events = []
    later = by_hand(
        scorer(tmp_path, "http://a", "http://b", events=events),
        Member("a", identity="new/t"),
        Member("b", identity="b/t"),
    )
    assert all(v is not None for v in later.score(ITEMS[:3])[0])
    assert events == []


def test_scores_of_other_weights_than_the_server_names_are_not_kept(tmp_path):
    cache = ScoreCache(tmp_path / "scores.sqlite", 100)
    ours = by_hand(scorer(tmp_path, "http://a", cache=cache), Member("a", identity="one/t", weights={"two"}))
    with pytest.raises(GuardError, match="changed while it scored: one/t before, one/t after, scores by two"):
        ours.ask(ITEMS)
    assert cache.count() == 0


def test_probes_leave_the_cache_alone_and_what_is_forgotten_is_asked_again(tmp_path):
    cache = ScoreCache(tmp_path / "scores.sqlite", 100)
    member = Member("a", identity="one/t", weights={"one"})
    ours = by_hand(scorer(tmp_path, "http://a", cache=cache), member)
    ours.ask(ITEMS)
    kept = cache.count()
    member.factor = 9.0  # replaced, and it says nothing of it
    ours.ask(ITEMS[:4], fresh=True)
    member.factor = 1.0
    right = [float(len(text)) for _, text, _ in ITEMS]
    assert ours.ask(ITEMS).scores[0].tolist() == right and cache.count() == kept
    ours.forget(("one/t",), ITEMS)
    assert cache.count() == 0


def test_what_may_compare_items_is_asked_for_equal_ones_too(tmp_path):
    member = Member("a")
    ours = by_hand(scorer(tmp_path, "http://a"), member)
    assert len(ours.score([*ITEMS, ITEMS[0]])[0]) == len(ITEMS) + 1 and member.asked == len(ITEMS)
    member.asked, member.compares = 0, True
    assert len(ours.score([*ITEMS, ITEMS[0]])[0]) == len(ITEMS) + 1 and member.asked == len(ITEMS) + 1


def test_two_policies_are_not_compared_by_two_judges(tmp_path):
    member = Member("a", identity="one/t")
    ours = by_hand(scorer(tmp_path, "http://a"), member)
    judge = ours.identities
    ours.score(ITEMS, identities=judge)[0]
    member.identity = "two/t"
    with pytest.raises(GuardError, match="changed during the stage"):
        ours.score(ITEMS, identities=judge)[0]
