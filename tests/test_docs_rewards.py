"""The examples of docs/rewards.md and docs/rewards-in-a-round.md are executed."""

import json
import re
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from fake_reward import QUICK, fake, status
from fastapi.testclient import TestClient
from reward_world import conversation, reward_model

from reward import kinds
from reward.app import build_app
from reward.client import RewardClient
from reward.openrlhf import Unrender
from reward.schema import Health
from reward.server import parser
from selfplay.config import GuardConfig, Limits, RewardConfig, load

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
SELFPLAY = (ROOT / "docs" / "rewards-in-a-round.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^```\w+ (.+)\n((?:.|\n)*?)^```$", TEXT, re.MULTILINE))


def example(title: str) -> Any:
    return json.loads(BLOCKS[title])


@pytest.fixture
def rules(tmp_path: Path) -> TestClient:
    path = tmp_path / "rules.yaml"
    path.write_text(BLOCKS["rules"])
    app = build_app(
        kinds.load("rules", str(path)).scorers(), max_body=2**20, max_items=9, max_waiting=9, unrender=Unrender(None)
    )
    return TestClient(app)


@pytest.mark.parametrize("path", ["/score", "/get_reward"])
def test_our_server_answers_as_written(rules: TestClient, path: str) -> None:
    answer = rules.post(path, json=example(f"request {path}")).json()
    assert answer | example(f"answer {path}") == answer


def test_the_judge_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "judge.yaml"
    path.write_text(BLOCKS["judge"])
    assert kinds.load("judge", str(path)).model_dump()["model"] == "Qwen/Qwen3-32B"


def test_a_service_of_ones_own() -> None:
    Health.model_validate(example("healthz"))
    asked = example("request /score")["items"]
    items = [(i["messages"], i["response"]) for i in asked]
    answer = example("answer /score")
    del answer["ids"]  # the client's ids are random
    with fake(status(200, json.dumps(answer).encode())) as server, RewardClient(server.url, **QUICK) as client:
        assert client.score(items, references=[i.get("reference") for i in asked]) == answer["scores"]
        sent = [{k: v for k, v in i.items() if k != "id"} for i in server.asked[0]["items"]]
    assert sent == [{k: v for k, v in i.items() if k != "id"} for i in asked]


@pytest.mark.parametrize("route", ["classify", "pooling"])
def test_vllm(tmp_path: Path, route: Literal["classify", "pooling"]) -> None:
    folder = reward_model(tmp_path / "reward")
    with fake(status(200, BLOCKS[f"answer /{route}"].encode())) as server:
        client = RewardClient(server.url, dialect=f"vllm-{route}", tokenizer=str(folder), model="my-reward", **QUICK)
        assert client.score([conversation(0, 3), conversation(1, 3)]) == [1.25, -0.5]
        asked = {k: v for k, v in server.asked[0].items() if k != "input"}
    assert asked == {k: v for k, v in example(f"request /{route}").items() if k != "input"} | {"path": f"/{route}"}


def test_openrlhf() -> None:
    with fake(status(200, BLOCKS["answer /get_reward"].encode())) as server:
        client = RewardClient(server.url, dialect="openrlhf", **QUICK)
        messages = [{"role": "user", "content": "What is 20 + 22?"}]
        assert client.score([(messages, "It is 42.")], references=["42"]) == [3.5]
        assert server.asked[0] == example("request /get_reward") | {"path": "/get_reward"}


@pytest.mark.parametrize("line", re.findall(r"^    python -m reward\.server (.*)$", TEXT, re.MULTILINE))
def test_commands_are_understood(line: str) -> None:
    parser().parse_args(line.split())


@pytest.mark.parametrize("source", re.findall(r"^```yaml source\n((?:.|\n)*?)^```$", TEXT, re.MULTILINE))
def test_sources_are_valid(source: str) -> None:
    RewardConfig.model_validate(yaml.safe_load(source))


@pytest.mark.parametrize("block", re.findall(r"^```yaml\n((?:.|\n)*?)^```$", SELFPLAY, re.MULTILINE))
def test_parts_of_a_configuration_are_valid(block: str, tmp_path: Path) -> None:
    """In place of what configs/tiny.yaml has there."""
    given = yaml.safe_load(block)
    whole = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(whole | given))
    assert load(tmp_path / "given.yaml").pairs.max_disagreement == 1.0


@pytest.mark.parametrize("name", ["instructions", "math", "code"])
def test_every_setting_of_a_kind_that_checks_answers_is_in_the_docs(name: str) -> None:
    (part,) = [p for p in re.split(r"^##+ ", TEXT, flags=re.MULTILINE) if f"{{kind: {name}," in p]
    said = dict(re.findall(r"^\| `(\w+)` \| `(\S+)` \|", part, re.MULTILINE))
    assert said == {key: str(field.default) for key, field in kinds.find(name).model_fields.items()}


def test_every_sign_of_the_guard_is_in_the_docs() -> None:
    signs = [name for name, field in GuardConfig.model_fields.items() if field.annotation is Limits]
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \| ([^|]*) \|", SELFPLAY.partition("## Guard")[2], re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(signs)
    for name, defaults in rows:
        limits = getattr(GuardConfig(), name)
        said = [
            f"{level} {limit:g}" for level, limit in (("warn", limits.warn), ("stop", limits.stop)) if limit is not None
        ]
        assert [d for d in defaults.split(", ") if d[-1].isdigit()] == said
