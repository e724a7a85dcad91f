"""Answers of policies to held-out prompts: which prompts, and that each is asked once."""

import io

import numpy as np
import pytest
from mini import TINY
from rich.console import Console

from selfplay.config import load
from selfplay.evaluation.stage import Asked
from selfplay.generation.serving import Serving
from selfplay.prompts import formats
from selfplay.prompts.pool import OLD, Pool
from selfplay.reporting.terminal import Display
from selfplay.rounds.answers import Answers
from selfplay.rounds.frame import Frame
from selfplay.rounds.stages import STAGES
from selfplay.storage import answers, tables
from selfplay.storage.ledger import Store
from selfplay.types import Candidate, Policy, Prompt


def policy(version):
    return Policy(version=version, path=f"/p/{version}", parent=None, round=version, beta=None, reference=None)


class Engine:
    """Stands in for the engine: each answer says which policy was in it, and it notes what it was asked."""

    def __init__(self):
        self.policy, self.asked = policy(0), []  # it is loaded

    def sample(self, asks, *, on_progress, before_shard):
        for asked, shard in [(each, shard) for each in asks for shard in each.shards]:
            count, version = len(shard.seeds), asked.policy.version
            ids = tables.read_column(asked.prompts, "prompt_id")[shard.start : shard.start + count]
            assert asked.candidates == 1 and len(set(shard.seeds)) == count
            self.asked.append((version, len(ids)))
            rows = answers.table(
                prompt_ids=ids, per_prompt=1, texts=[f"policy {version} to {name}" for name in ids],
                token_ids=[np.array([5, 2], np.int32)] * count, logps=[-1.0] * count, finish_reasons=["stop"] * count,
                policy=version,
            )  # fmt: skip
            with tables.writing(shard.file, Candidate) as file:
                file.table(rows)

    def answer_logps(self, prompts, said, start, count, per_prompt, on_progress, policies, before_piece):
        asked, told = (tables.read_column(path, "prompt_id") for path in (prompts, said))
        assert (asked, start, count, per_prompt) == (told, 0, len(asked), 1)
        self.asked += [(policy.version, "logps") for policy in policies]
        on_progress(count * len(policies))
        return np.array([np.arange(count, dtype=np.float64) + policy.version for policy in policies])


class World:
    """The answers of any round, over a real pool of twenty prompts a split."""

    def __init__(self, run_dir):
        self.dir, self.store, self.engine = run_dir, Store(run_dir), Engine()
        (run_dir / "pool").mkdir()
        rows = []
        for split in ("heldout", "audit"):
            for i in range(20):
                messages = [{"role": "user", "content": f"{split} question {i}"}]
                name = formats.prompt_id(messages)
                rows.append(Prompt(prompt_id=name, messages=messages, prompt_ids=[1], split=split))
        tables.write_rows(run_dir / "pool" / OLD, rows, Prompt)
        self.display = Display(Console(file=io.StringIO()))

    def of(self, index, *settings):
        defaults = (
            "evaluate.prompts=6",
            "evaluate.audit_prompts=4",
            "evaluate.audit_every=3",
            "generate.shard_prompts=4",
        )
        config = load(TINY, [*defaults, *settings])
        frame = Frame(
            dir=self.dir / "rounds" / f"{index:04d}", index=index, stages=STAGES, config=config, store=self.store,
            display=self.display, breathe=lambda where: None, logs=self.dir / "logs", weights=lambda: 0, adopted=lambda: False,
        )  # fmt: skip
        serving = Serving(self.engine, lambda: policy(0), lambda: None, self.display)
        return Answers(
            frame=frame, prompts=Pool(self.dir / "pool"), serving=serving, run_dir=self.dir, champion=lambda: policy(index - 1)
        )  # fmt: skip


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path)
    yield made
    made.store.close()


def test_the_audit_set_comes_every_so_many_rounds_and_is_always_the_same(world):
    def audit(index, *settings):
        return [p.messages[0]["content"] for p in world.of(index, *settings).audit_prompts()]

    def gate(index):
        return [p.messages[0]["content"] for p in world.of(index).gate_prompts()]

    assert audit(1) == audit(2) == []
    assert audit(3) == audit(6) and len(set(audit(3))) == 4 and all(i.startswith("audit") for i in audit(3))
    assert gate(3) == gate(3) != gate(4)
    assert len(set(gate(4))) == 6 and all(i.startswith("heldout") for i in gate(4))
    assert audit(3, "evaluate.audit_every=0") == []


def test_one_policys_answers_under_one_name_are_sampled_once_and_then_read(world):
    """Six prompts are two shards. Another policy, and another round, are asked anew."""
    of = world.of(2)
    prompts = of.gate_prompts()
    found = of.answers("candidate", prompts, policy(2))
    assert [a.text for a in found] == [f"policy 2 to {p.prompt_id}" for p in prompts]
    assert world.engine.asked == [(2, 4), (2, 2)]
    assert of.answers("candidate", prompts, policy(2)) == found
    assert world.engine.asked == [(2, 4), (2, 2)]
    assert {a.policy for a in of.answers("candidate", prompts, policy(3))} == {3}
    assert len(world.engine.asked) == 4
    assert of.answers("candidate", [], policy(2)) == []


def test_several_policies_are_asked_at_once(world):
    of = world.of(2)
    prompts = of.gate_prompts()
    asked = [
        Asked(name="champion", prompts=prompts, policy=policy(1)),
        Asked(name="candidate", prompts=prompts[:3], policy=policy(2)),
    ]
    done = []
    champion, candidate = of.side_by_side(asked, done.append)
    assert [a.policy for a in champion] == [1] * 6 and [a.policy for a in candidate] == [2] * 3
    assert world.engine.asked == [(1, 4), (1, 2), (2, 3)]
    assert of.side_by_side(asked, done.append) == [champion, candidate] and done[-1] == 9
    assert len(world.engine.asked) == 3


def test_what_the_champion_answers_beside_the_training_is_there_for_the_evaluation(world):
    of = world.of(2)
    of.of_the_champion()
    asked = list(world.engine.asked)
    assert asked == [(1, 4), (1, 2)]
    assert [a.policy for a in of.answers("champion", of.gate_prompts(), policy(1))] == [1] * 6
    assert world.engine.asked == asked


def test_the_initial_policy_answers_the_audit_set_once_for_the_run(world):
    told = []
    found = world.of(3).of_the_initial(world.of(3).audit_prompts(), policy(0), told.append)
    assert len(found) == 4 and {a.policy for a in found} == {0} and told == [0]
    assert world.of(6).of_the_initial(world.of(6).audit_prompts(), policy(0), told.append) == found
    assert world.engine.asked == [(0, 4)]
    warmer = world.of(6, "generate.temperature=0.7")
    warmer.of_the_initial(warmer.audit_prompts(), policy(0), told.append)
    assert world.engine.asked == [(0, 4), (0, 4)]


def test_another_policy_scores_the_answers_it_is_asked_about(world):
    of = world.of(2)
    prompts = of.gate_prompts()
    found = of.answers("candidate", prompts, policy(2))
    told = []
    champion, initial = of.logps(prompts, found, [policy(1), policy(0)], told.append)
    assert told == [12]
    assert champion == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0] and initial == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert world.engine.asked[-2:] == [(1, "logps"), (0, "logps")]
