"""What a round says of its judge before the candidate is judged."""

import contextlib
import json
from types import SimpleNamespace

import pytest
from fake_reward import fake
from steps_world import LINE, Opened
from storage_world import sign

from selfplay.errors import EngineError
from selfplay.storage import folders


@contextlib.contextmanager
def opened(run_dir, weights):
    """A run whose judge has these weights, without any the reward judges; its engine is down, so that the stage ends with the first answer it wants."""
    with fake() as rewarding, fake() as judging:
        rewarding.weights, judging.weights = "one", weights
        reward, judges = (json.dumps({"url": [server.url], "deadline": 20}) for server in (rewarding, judging))
        run = Opened(
            run_dir, f"reward={reward}", f"evaluate.judge={judges if weights else 'null'}", "evaluate.audit_every=0",
            "guard.probes=0",
        )  # fmt: skip

        def engine():
            raise EngineError("the engine is down")

        run.serving = SimpleNamespace(engine=engine)
        try:
            yield run
        finally:
            run.reward.stop()
            run.judge.stop()
            run.store.close()


def said(run, index):
    """The events of the round, and the warnings that were shown of it."""
    with pytest.raises(EngineError):
        run.steps(index).evaluate(run.dir, LINE)
    return run.events(index), run.warned


def judged(run, index, names):
    folder = run.dir / "rounds" / f"{index:04d}" / "evaluate"
    folder.mkdir(parents=True)
    folders.write_json(folder / "judge.json", {"names": names})
    sign(folder, index)


def scored_by(run, index, identities):
    folder = run.dir / "rounds" / f"{index:04d}" / "score"
    folder.mkdir(parents=True)
    folders.write_json(folder / "reward.json", {"identities": identities})


def test_another_judge_than_at_the_last_gate_is_told(tmp_path):
    with opened(tmp_path, "two") as run:
        (name,) = run.judge.described(run.judge.identities)
        judged(run, 1, ["other"])
        judged(run, 3, [name])
        assert said(run, 5) == ([], [])
        judged(run, 5, ["one"])
        told = f"another judge decides at this gate than in round 5: {name} instead of one"
        assert said(run, 6) == ([told], [f"warning: round 6: {told}"])


def test_a_judge_with_the_weights_of_the_reward_is_told(tmp_path):
    with opened(tmp_path, "two") as run:
        scored_by(run, 1, ["one/t/float32"])
        assert said(run, 1) == ([], [])
        scored_by(run, 2, ["two/t/float32", "one/t/float32"])
        told = "gate not independent: evaluate.judge has the weights two of the reward that trains"
        assert said(run, 2) == ([told], [f"warning: round 2: {told}"])


def test_a_reward_that_judges_itself_is_noted_and_no_warning(tmp_path):
    """The configuration says so: nobody has to be warned every round."""
    with opened(tmp_path, None) as run:
        told = "gate not independent: the reward that trains judges (evaluate.judge names no other)"
        assert said(run, 1) == ([told], [])
        assert told in run.said.getvalue()
