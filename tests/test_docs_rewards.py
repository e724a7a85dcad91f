"""The examples of docs/rewards.md are executed."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient
from reward_world import conversation, reward_model
from test_reward_client import QUICK, fake, status

from reward.app import build_app
from reward.client import RewardClient
from reward.judge import read_judge
from reward.openrlhf import Unrender
from reward.rules import Rules, read_rules
from reward.schema import Health
from reward.server import parser
from selfplay.config import RewardConfig

TEXT = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^```\w+ (.+)\n((?:.|\n)*?)^```$", TEXT, re.MULTILINE))


def example(title: str) -> Any:
    return json.loads(BLOCKS[title])


@pytest.fixture
def rules(tmp_path: Path) -> TestClient:
    path = tmp_path / "rules.yaml"
    path.write_text(BLOCKS["rules"])
    app = build_app([Rules(read_rules(str(path)))], max_body=2**20, max_items=9, max_waiting=9, unrender=Unrender(None))
    return TestClient(app)


@pytest.mark.parametrize("path", ["/score", "/get_reward"])
def test_our_server_answers_as_written(rules: TestClient, path: str) -> None:
    answer = rules.post(path, json=example(f"request {path}")).json()
    assert answer | example(f"answer {path}") == answer


def test_the_judge_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "judge.yaml"
    path.write_text(BLOCKS["judge"])
    assert read_judge(str(path)).model == "Qwen/Qwen3-32B"


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


def test_vllm(tmp_path: Path) -> None:
    folder = reward_model(tmp_path / "reward")
    with fake(status(200, BLOCKS["answer /classify"].encode())) as server:
        client = RewardClient(server.url, dialect="vllm-classify", tokenizer=str(folder), model="my-reward", **QUICK)
        assert client.score([conversation(0, 3), conversation(1, 3)]) == [1.25, -0.5]
        assert server.asked[0].keys() - {"path"} == example("request /classify").keys()
        assert server.asked[0]["use_activation"] is False


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
