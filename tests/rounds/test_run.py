"""A run whose configuration is changed under it: which children go on, and which are ended."""

from types import SimpleNamespace

import pytest
from mini import config

from selfplay.errors import InputError
from selfplay.generation.generator import Generator
from selfplay.generation.serving import Serving
from selfplay.processes.places import environment
from selfplay.reporting.terminal import Display
from selfplay.rewards.scorer import Scorer
from selfplay.rounds.run import Run
from selfplay.storage.ledger import Store
from selfplay.training.service import Trainer


def ledger(run):
    found = Store(run.dir)
    found.open_run(run.config.run.name, run.config.fixed(), fresh=True)
    return found


@pytest.fixture
def run(mini_world, tmp_path):
    """With all that starts children, and one that stands for the engine's."""
    run = Run(config(mini_world), tmp_path, Display())
    run.generator = Generator(run.config, tmp_path, tmp_path / "generator.log")
    run.generator.engines[0].warm.child = SimpleNamespace(stop=lambda: None)
    run.trainer = Trainer(
        run.config, tmp_path, Serving(run.generator, None, None, run.display), lambda kind, text: None
    )
    run.store = ledger(run)
    run._open_scorers(run.config)
    yield run
    run.store.close()
    if run._cache is not None:
        run._cache.close()


@pytest.mark.parametrize(
    ("setting", "engine_stays", "rewards_stay"),
    [
        ("train.beta=0.2", True, True),
        ("generate.temperature=0.7", True, True),
        ("evaluate.gate.max_kl=1", True, True),
        ("swap.tolerance=0.5", True, True),
        ("generate.max_tokens=32", False, True),  # the engine's context follows from it
        ("generate.engine.max_num_seqs=8", False, True),
        ("policy.trust_remote_code=true", False, True),
        ("placement={generator: [0]}", False, True),
        ("placement={colocated: true}", False, True),
        ("placement={reward: [0]}", True, False),
        ("reward.batch=8", True, False),
        ("reward.cache.entries=0", True, False),
        ("evaluate.judge={url: ['http://127.0.0.1:1']}", True, False),
    ],
)
def test_children_go_on_unless_they_are_made_from_what_changed(run, mini_world, setting, engine_stays, rewards_stay):
    before = run.reward, run.judge, run._cache
    changed = config(mini_world, setting)
    run.reconfigure(changed)
    assert run.config is changed and run.trainer.config is changed
    assert (run.generator.engines[0].warm.child is not None) == engine_stays
    assert ((run.reward, run.judge, run._cache) == before) == rewards_stay
    assert (run.judge is run.reward) == (changed.evaluate.judge is None)


def test_the_engine_goes_on_under_the_new_settings(run, mini_world):
    run.reconfigure(config(mini_world, "swap.tolerance=0.5", "generate.candidates=7"))
    assert run.generator.engines[0].warm.prefix_tolerance == 0.5 and run.generator._config.generate.candidates == 7


def test_what_cannot_be_used_changes_nothing(run, mini_world, tmp_path):
    before = run.config, run.reward, run._cache
    file = tmp_path / "file"
    file.touch()
    for setting in (f"reward.model={tmp_path}/nowhere", f"reward.cache.path={file}/scores", "evaluate.gold=no:where"):
        with pytest.raises(InputError):
            run.reconfigure(config(mini_world, "generate.max_tokens=32", setting))
        assert (run.config, run.reward, run._cache) == before and run.generator.engines[0].warm.child is not None


def test_no_child_gets_the_keys_of_what_the_controller_alone_speaks_to(mini_world, tmp_path, monkeypatch):
    for name in (names := ("SELFPLAY_TOKEN", "SELFPLAY_WEBHOOK", "WANDB_API_KEY")):
        monkeypatch.setenv(name, "hush-hush")
    Run(config(mini_world), tmp_path, Display())
    assert not environment({}).keys() & set(names)


@pytest.mark.parametrize(
    ("gpus", "placement", "waits"),
    [
        (0, "{}", False),
        (1, "{}", True),
        (8, "{generator: [0, 1], reward: [2, 3]}", False),
        (8, "{generator: [0, 1], reward: [1, 2]}", True),
    ],
)
def test_engines_load_after_the_rewards_on_their_gpus(mini_world, tmp_path, monkeypatch, gpus, placement, waits):
    """vLLM takes what a reward model allocates meanwhile for its own need."""
    said = []
    monkeypatch.setattr("selfplay.generation.groups.count_gpus", lambda: gpus)
    monkeypatch.setattr(Run, "warm_up", lambda self: said.append("started"))
    monkeypatch.setattr(Scorer, "identities", property(lambda self: said.append(self.role) or ["it"]))
    judge = f"evaluate.judge.model={mini_world / 'judge'}"
    run = Run(config(mini_world, f"placement={placement}", "evaluate.judge={}", judge), tmp_path, Display())
    run.store = ledger(run)
    run._open_scorers(run.config)
    run.make_way()
    run._cache.close()
    run.store.close()
    assert said[0] == "started" and sorted(said[1:]) == (["judge", "reward"] if waits else [])
