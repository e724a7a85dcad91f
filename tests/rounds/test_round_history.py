"""What a round needs to know of those before it."""

import json

import pytest
from storage_world import sign

from selfplay.rounds.history import STATE, History
from selfplay.storage import folders
from selfplay.storage.ledger import Store


class World:
    """A run folder whose rounds were scored and judged as told, with a real ledger."""

    def __init__(self, run_dir):
        self.store, self.rounds = Store(run_dir), run_dir / "rounds"

    def round(self, index, names=None, judge=None, state="promoted", **metrics):
        """Write a round. names: what scored it; `...`: its file is there and tells none."""
        self.store.open_round(index, index - 1, (0, 0), "f", {})
        if state != "running":
            self.store.close_round(index, state, index, [])
        for stage, file, given in (("score", "reward.json", names), ("evaluate", "judge.json", judge)):
            if given is not None:
                folder = self.rounds / f"{index:04d}" / stage
                folder.mkdir(parents=True, exist_ok=True)
                folders.write_json(folder / file, {} if given is ... else {"names": given})
                sign(folder, index)
        for name, value in metrics.items():
            self.store.record_metrics(index, name.split("_")[0], {name.partition("_")[2]: value})

    def before(self, index):
        return History(self.store, self.rounds, index)

    def alike(self, index):
        return self.before(index).scored_alike()


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path)
    yield made
    made.store.close()


A, B = ["a/t/x"], ["b/t/x", "mean 0"]


def test_rounds_are_alike_that_the_same_reward_scored_over_a_switch_and_back(world):
    for index, names in enumerate((A, A, B, B, A), 1):
        world.round(index, names)
    assert [world.alike(index) for index in range(1, 6)] == [[], [1], [], [3], [1, 2]]
    world.round(6, A)
    world.round(7, B)
    assert (world.alike(6), world.alike(7)) == ([1, 2, 5], [3, 4])
    # the same with a run that asks for the first time now
    world.store.set_state(STATE, [])
    assert world.alike(7) == [3, 4]
    assert world.store.state(STATE) == [[1, 2, A], [3, 4, B], [5, 6, A]]


def test_rounds_that_were_given_up_are_no_measure(world):
    world.round(1, A)
    world.round(2, A, state="cancelled")
    world.round(3, A)
    world.round(4, B, state="cancelled")
    world.round(5, A, state="running")
    assert world.alike(5) == [1, 3]
    assert world.before(5).cancelled() == {2, 4}


def test_rounds_from_before_names_were_recorded_are_alike_among_themselves(world):
    world.round(1)
    world.round(2, ...)
    world.round(3, A)
    world.round(4)
    assert (world.alike(3), world.alike(4)) == ([], [1, 2])


def test_each_rounds_file_is_opened_once_when_it_is_a_round_of_the_past(world, monkeypatch):
    for index in range(1, 9):
        world.round(index, A if index < 5 else B)
    opened = []
    read = folders.read_json

    def reading(path):
        if path.name == "reward.json":  # not the manifests by which they are checked
            opened.append(path.parent.parent.name)
        return read(path)

    monkeypatch.setattr(folders, "read_json", reading)
    assert world.alike(8) == [5, 6, 7]
    assert sorted(opened) == [f"{i:04d}" for i in range(1, 9)]
    opened.clear()
    assert world.alike(8) == [5, 6, 7]
    assert opened == ["0008"]  # the round itself may be scored anew
    world.round(9, B)
    opened.clear()
    assert world.alike(9) == [5, 6, 7, 8]
    assert sorted(opened) == ["0008", "0009"]
    assert len(json.dumps(world.store.state(STATE))) < 100  # ranges: what is kept does not grow with the rounds


def test_a_round_that_comes_again_is_known_by_what_scores_it_then(world):
    """After the end of a run was cut off, its rounds are done again, perhaps under another reward."""
    for index in range(1, 7):
        world.round(index, A)
    assert world.alike(6) == [1, 2, 3, 4, 5]
    for index in (4, 5, 6):
        folders.write_json(world.rounds / f"{index:04d}" / "score" / "reward.json", {"names": B})
        sign(world.rounds / f"{index:04d}" / "score", index)
        assert world.alike(index) == list(range(4, index))
    assert world.store.state(STATE) == [[1, 3, A], [4, 5, B]]


def test_rewards_and_gold_scores_come_together_from_the_rounds_that_have_both(world):
    gold = "evaluate_gold_total_champion"
    world.round(1, score_reward_mean=1.0, **{gold: 0.1})
    world.store.record_metrics(2, "score", {"part_external": 5.0, "reward_mean": 2.0})
    world.store.record_metrics(2, "evaluate", {"gold_total_champion": 0.2})
    world.store.record_metrics(3, "score", {"reward_mean": 3.0})
    world.store.record_metrics(4, "evaluate", {"gold_total_champion": 0.4})
    # the external reward before the shaped one
    assert world.before(5).rewards_and_gold([1, 2, 3, 4]) == [(1.0, 0.1), (5.0, 0.2)]
    assert world.before(5).rewards_and_gold([2]) == [(5.0, 0.2)]
    assert world.before(5).rewards_and_gold([]) == []


def test_pairs_of_the_last_rounds_are_those_that_there_are(world):
    for index, state in ((1, "promoted"), (2, "cancelled"), (3, "skipped"), (4, "promoted"), (5, "running")):
        world.round(index, A, state=state)
        if index != 3:
            folder = world.rounds / f"{index:04d}" / "pairs"
            folder.mkdir()
            (folder / "pairs.parquet").touch()
            sign(folder, index)

    def of(count):
        return [path.parent.parent.name for path in world.before(5).pairs(count)]

    assert (of(0), of(1), of(3), of(9)) == ([], ["0004"], ["0004"], ["0001", "0004"])


def test_the_last_judge_is_that_of_the_last_round_that_was_judged(world):
    world.round(1, judge=["other"])
    world.round(2)
    world.round(3, judge=["one"])
    world.round(4)
    world.round(5, judge=["now"])
    assert world.before(5).judge_before() == (3, ["one"])
    assert world.before(3).judge_before() == (1, ["other"])
    assert world.before(1).judge_before() is None
    world.round(6, judge=...)  # from before names were recorded
    assert world.before(7).judge_before() is None
