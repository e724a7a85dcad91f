"""Every kind of reward source of the configuration, as the pipeline uses it."""

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from reward_world import reward_model
from test_reward_client import fake
from test_reward_dialects import numbers
from test_reward_judge import saying

from selfplay.config import RewardConfig, RewardSource
from selfplay.errors import InputError
from selfplay.rewards.service import RewardService

ITEMS: list[Any] = [([{"role": "user", "content": "Where?"}], text) for text in ("Paris.", "It is Rome.")]


def scores(tmp_path: Path, **source: Any) -> tuple[list[float | None], str]:
    service = RewardService(
        RewardSource.model_validate({"deadline": 60.0, **source}), tmp_path, on_event=lambda level, text: None
    )
    try:
        return service.score(ITEMS), service.identity
    finally:
        service.stop()


def test_rules(tmp_path: Path) -> None:
    rules = [{"rule": "regex", "pattern": "Paris"}, {"rule": "length", "min": 2, "weight": 0.5}]
    values, identity = scores(tmp_path, rules=rules)
    assert values == [1.25, 0.5]
    assert len(identity) > 100


def test_a_chat_judge(tmp_path: Path) -> None:
    with fake(default=saying(lambda s: f"SCORE: {len(s['answer'])}")) as chat:
        values, _ = scores(tmp_path, chat_judge={"url": [chat.url], "model": "m", "highest": 20})
    assert values == [6.0, 11.0]


def test_heads(tmp_path: Path) -> None:
    folder = reward_model(tmp_path / "model", labels=2, id2label={0: "good", 1: "short"})
    one, first = scores(tmp_path, model=str(folder), heads={"good": 1.0})
    two, second = scores(tmp_path, model=str(folder), heads={"good": 2.0})
    assert two == pytest.approx([2 * v for v in one if v is not None])
    assert first != second


def test_a_vllm_server_and_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = reward_model(tmp_path / "model")
    with fake(default=numbers("probs")) as server:
        source = {"url": [server.url], "dialect": "vllm-classify", "tokenizer": str(folder), "api_key_env": "A_KEY"}
        service = RewardService(RewardSource.model_validate(source), tmp_path, on_event=lambda level, text: None)
        monkeypatch.delenv("A_KEY", raising=False)
        with pytest.raises(InputError, match=r"\$A_KEY, which is not set"):
            service.score(ITEMS)
        monkeypatch.setitem(os.environ, "A_KEY", "secret")
        assert all(v is not None and v > 10 for v in service.score(ITEMS))
        service.stop()


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ({"model": "a", "rules": [{"rule": "json"}]}, "exactly one of"),
        ({"url": ["http://a"], "heads": {"x": 1}}, "`heads` belongs to a `model`"),
        ({"model": "a", "dialect": "openrlhf"}, "needs a `url`"),
        ({"url": ["http://a"], "dialect": "vllm-pooling"}, "needs `tokenizer`"),
        ({"rules": [{"rule": "length", "maximum": 3}]}, "maximum"),
    ],
)
def test_sources_that_make_no_sense_are_named(source: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        RewardConfig.model_validate(source)
