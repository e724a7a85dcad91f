"""Roles that take turns on shared GPUs. A CPU has no memory to give back by sleeping, but the reward really ends and comes back."""

import pytest
from mini import Opened, commands

from selfplay.rounds.turns import Turns
from selfplay.storage import folders


def test_a_role_that_takes_its_turn_waits_for_the_one_before_it():
    done = []
    rooms = {role: lambda role=role: done.append(role) for role in ("engine", "reward")}
    turns = Turns(
        rooms,
        lambda: True,
        lambda kind, text: done.append(f"{kind}: {text.partition(';')[0]}"),
        lambda text: done.append(text),
    )
    for role in ("engine", "engine", "reward", "engine"):
        turns.take(role)
    assert done == [
        "turn: engine uses the GPUs",
        "reward waits for its turn on the GPUs: engine makes room", "engine", "turn: reward uses the GPUs",
        "engine waits for its turn on the GPUs: reward makes room", "reward", "turn: engine uses the GPUs",
    ]  # fmt: skip
    quiet = Turns(rooms, lambda: False, lambda kind, text: pytest.fail("it is nobody's turn"), pytest.fail)
    quiet.take("engine")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_reward_of_a_round_by_turns_ends_and_the_one_that_comes_back_is_the_same(calm, mini_world):
    """The third round of the calm run."""
    opened = Opened(mini_world, calm[0], "placement=shared", "prompts.per_round=16", "evaluate.prompts=8")
    seen: dict[str, set[int]] = {}  # stage → reward servers that ran meanwhile

    def breathe(where: str) -> None:
        servers = {pid for pid, words in commands(opened.run.dir) if words[1:3] == ["-m", "reward.server"]}
        if where != "stage":
            seen.setdefault(lines[-1], set()).update(servers)

    lines: list[str] = []
    with opened.run as run:
        run.breathe = breathe
        run.display.on_line = lambda line: lines.append(line.name)
        said = opened.round()
        assert "promoted" in said
        turns = [event["text"] for event in run.store.events() if event["kind"] == "turn"]
        assert "generate/overlap_seconds" not in run.store.metrics(3), "nothing is scored while the engine samples"
    taken = [(text.split()[0], text.partition("; ")[2].split()[0:1]) for text in turns]
    assert taken == [
        ("engine", []), ("reward", ["engine"]), ("trainer", ["reward"]), ("engine", ["trainer"]), ("reward", ["engine"]),
        ("engine", ["reward"]),
    ]  # fmt: skip
    assert not seen["generate"] and not seen["train"] and len(seen["score"]) == 1
    assert not seen["score"] & seen["evaluate"], "the server that judges is another process"
    score, judge = (
        folders.read_json(run.dir / "rounds" / "0003" / name) for name in ("score/reward.json", "evaluate/judge.json")
    )
    assert score["identities"] == judge["identities"]
