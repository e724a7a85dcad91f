"""What each kind of child finds in its environment: the secrets that are its own, and no others."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from daemon_world import until
from mini import TINY

from selfplay.checks.check import check
from selfplay.config import load
from selfplay.errors import Interrupted
from selfplay.evaluation.harness import Task
from selfplay.generation.generator import Generator
from selfplay.processes import children
from selfplay.processes.child import Child
from selfplay.processes.reaping import descendants
from selfplay.publishing.hub import upload_in_child
from selfplay.reporting.terminal import Display
from selfplay.rewards.service import RewardService
from selfplay.rounds.importing import ask_importer
from selfplay.rounds.requirements import withhold_secrets
from selfplay.rounds.run import Run
from selfplay.training.service import Trainer

SECRETS = ("SELFPLAY_TOKEN", "SELFPLAY_WEBHOOK", "WANDB_API_KEY", "REWARD_KEY", "JUDGE_KEY", "SUITE_KEY", "VLLM_KEY",
           "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # fmt: skip
JUDGE = "{url: ['http://127.0.0.1:9'], model: m, api_key_env: %s, proxy_env: HTTPS_PROXY}"
SETTINGS = [
    "publish.api_key_env=VLLM_KEY",
    "reward.model=null", f"reward.chat_judge={JUDGE % 'REWARD_KEY'}",
    "evaluate.judge={source: {kind: judge, url: ['http://127.0.0.1:8'], model: m, api_key_env: JUDGE_KEY}}",
    "evaluate.suites=[{name: s, file: a.jsonl, reward: {url: ['http://127.0.0.1:9'], api_key_env: SUITE_KEY}}, {name: t, task: t}]",
]  # fmt: skip


@pytest.fixture
def seen(monkeypatch):
    """The environments of the children that are started, the guard's and the child's own. Each is ended at once."""
    found: list[dict[str, str]] = []
    start = Child.start

    def start_and_look(self: Child) -> None:
        start(self)
        until(lambda: [pid for pid in descendants(self.pid) if "TMPDIR" in environment(pid)])
        found.extend(map(environment, [self.pid, *descendants(self.pid)]))
        self.stop(grace=0)
        raise Interrupted("seen")

    monkeypatch.setattr(children, "_withheld", set())
    # A fork of a template has the log of its guard open, which waits for what was written last. This one ends at its start.
    monkeypatch.delenv("SELFPLAY_TEMPLATES", raising=False)
    monkeypatch.setattr(Child, "start", start_and_look)
    for name in (*SECRETS, "HTTPS_PROXY", "PLAIN"):
        monkeypatch.setenv(name, "there")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    return found


def environment(pid: int) -> dict[str, str]:
    words = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(word.split("=", 1) for word in words if "=" in word)


def ways(config, run_dir):
    """How each kind of child is started, with the secrets that it is to get."""
    nothing, serving = (lambda *_: None), SimpleNamespace(loaded=False)
    reward, judge = config.reward_sources()["reward"], config.judge_sources()["evaluate.judge"]
    task = SimpleNamespace(folder=lambda *_: run_dir, room=lambda: 9)
    harness = Task(settings=config.evaluate.suites[1], engine=task, run_dir=run_dir, tokenizer={}, max_tokens=1)
    run = Run(config, run_dir, Display())
    by_name = load(TINY, ["reward.model=org/reward", "breadth.method=clusters", "breadth.embedding=org/embedding"])
    here = load(TINY, [f"reward.model={run_dir}"])
    embeds = Trainer(by_name, run_dir, serving, nothing).start
    hub = {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"}
    return {
        "engine": (lambda: Generator(config, run_dir, run_dir / "engine.log", on_event=nothing).start(), set()),
        "trainer": (Trainer(config, run_dir, serving, nothing).start, set()),
        "importer": (lambda: ask_importer(run_dir, "render", nothing), hub),
        "harness": (lambda: harness.play([], SimpleNamespace()), hub),
        "publisher": (lambda: upload_in_child(run_dir, run_dir, "me/mine", "a policy", True), {"HF_TOKEN"}),
        "trainer that embeds by a model of the Hub": (embeds, hub),
        "reward of the Hub": (RewardService(by_name.reward_sources()["reward"], run_dir, on_event=nothing).start, hub),
        "reward of a folder": (RewardService(here.reward_sources()["reward"], run_dir, on_event=nothing).start, set()),
        "report": (run.write_report, set()),
        "reward": (RewardService(reward, run_dir, on_event=nothing).start, {"REWARD_KEY"}),
        "judge": (RewardService(judge, run_dir, name="judge", on_event=nothing).start, {"JUDGE_KEY"}),
    }


@pytest.mark.slow
def test_a_child_gets_the_secrets_that_are_its_own(seen, tmp_path, monkeypatch):
    config = load(TINY, SETTINGS)
    withhold_secrets(config)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0")
    for kind, (start, own) in ways(config, tmp_path).items():
        seen.clear()
        with pytest.raises(Interrupted):
            start()
        assert len(seen) >= 2, kind
        for given in seen:
            assert {name for name in SECRETS if name in given} == own, kind
            assert children.OWN not in given and given["PLAIN"] == given["HTTPS_PROXY"] == "there"
            assert given["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1" and "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in given
        temporary = Path(seen[-1]["TMPDIR"])
        assert temporary.name.startswith("selfplay-") and not temporary.exists(), "it goes with the child"


def test_what_check_starts_gets_no_secret(seen):
    """`selfplay check` builds models and rules in processes that have this environment, and their code may be anybody's."""
    check(load(TINY, SETTINGS), Path("nowhere"), looks=[])
    assert not set(SECRETS) & set(children.inherited_environment())


def test_a_judge_may_use_the_key_of_the_hub(seen, tmp_path):
    config = load(TINY, ["reward.model=null", f"reward.chat_judge={JUDGE % 'HF_TOKEN'}"])
    withhold_secrets(config)
    service = RewardService(config.reward_sources()["reward"], tmp_path, on_event=lambda *_: None)
    with pytest.raises(Interrupted):
        service.start()
    assert all("HF_TOKEN" in given for given in seen) and "HF_TOKEN" not in children.inherited_environment()
