"""Every kind of reward source of the configuration, as the pipeline uses it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from fake_reward import fake
from pydantic import ValidationError
from reward_world import reward_model
from test_reward_dialects import numbers
from test_reward_judge import saying

from selfplay.config import RewardConfig, RewardSource, load
from selfplay.errors import ConfigError, InputError
from selfplay.rewards.service import RewardService
from selfplay.rewards.texts import Item

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"

pytestmark = pytest.mark.service

ITEMS = [Item([{"role": "user", "content": "Where?"}], text) for text in ("Paris.", "It is Rome.")]


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


RULES = [{"rule": "regex", "pattern": "Paris"}, {"rule": "length", "min": 2, "weight": 0.5}]
JUDGE = {"url": ["http://h:1"], "model": "m", "timeout": 5.0, "api_key_env": "KEY"}


@pytest.mark.parametrize(
    ("source", "fields"),
    [
        ({"kind": "rules", "rules": RULES}, {"rules": RULES}),
        ({"kind": "judge", **JUDGE}, {"chat_judge": JUDGE}),
        ({"kind": "model", "model": "a", "dtype": "float32", "heads": {"x": 2}}, {"model": "a", "heads": {"x": 2}}),
    ],
)
def test_a_kind_with_fields_of_its_own_is_the_same_reward_in_either_way(source: Any, fields: dict[str, Any]) -> None:
    one = RewardSource.model_validate({"source": source, "dtype": "float32"})
    other = RewardSource.model_validate({**fields, "dtype": "float32"})
    assert one.which() == other.which() and one.served() == other.served()
    assert one.plain() == other
    assert "KEY" not in json.dumps(one.which())
    same = {"source": source, "dtype": "float32"}
    with pytest.raises(ConfigError, match=r"evaluate\.judge is a reward that trains"):
        load(TINY, [f"reward={json.dumps({**fields, 'dtype': 'float32'})}", f"evaluate.judge={json.dumps(same)}"])


def test_what_only_a_kind_can_say_is_part_of_which_reward_it_is() -> None:
    revised = RewardSource.model_validate(
        {"source": {"kind": "model", "model": "a", "revision": "r"}, "dtype": "float32"}
    )
    expected = {"kind": "model", "model": "a", "revision": "r", "dtype": "float32"}
    assert revised.which() == {"source": expected}
    name, settings = revised.served() or ("", None)
    assert name == "model" and settings is not None and settings.model_dump()["dtype"] == "float32"


def test_a_source_of_rules_is_served_like_the_field(tmp_path: Path) -> None:
    by_field = scores(tmp_path, rules=RULES)
    assert scores(tmp_path, source={"kind": "rules", "rules": RULES}) == by_field


def test_members_and_the_judge_may_be_of_any_kind() -> None:
    member = {"kind": "rules", "rules": RULES}
    ensemble = {"members": [{"name": "a", "source": member}, {"url": ["http://h:1"]}]}
    judge = {"source": {"kind": "judge", **JUDGE}}
    config = load(
        TINY, [f"reward={json.dumps({'ensemble': ensemble, 'batch': 9})}", f"evaluate.judge={json.dumps(judge)}"]
    )
    first, second = config.reward_sources().values()
    assert len(first.rules) == 2 and first.batch == 9 and second.url == ["http://h:1"]
    (judge_source,) = config.judge_sources().values()
    assert judge_source.chat_judge is not None and judge_source.chat_judge.model == "m"
    with pytest.raises(ConfigError, match=r"reward\.source\.rulse: unknown key, did you mean rules"):
        load(TINY, ["reward={source: {kind: rules, rulse: []}}"])


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ({"model": "a", "rules": [{"rule": "json"}]}, "exactly one of"),
        ({"url": ["http://a"], "heads": {"x": 1}}, "`heads` belongs to a `model`"),
        ({"model": "a", "dialect": "openrlhf"}, "needs a `url`"),
        ({"url": ["http://a"], "dialect": "vllm-pooling"}, "needs `tokenizer`"),
        ({"rules": [{"rule": "length", "maximum": 3}]}, "maximum"),
        ({"model": "a", "source": {"kind": "rules", "rules": [{"rule": "json"}]}}, "exactly one of"),
        (
            {"source": {"rules": [{"rule": "json"}]}},
            "`kind` is required: model, rules, judge, instructions, math, code, or a kind of your own",
        ),
        ({"source": {"kind": "rulse"}}, "did you mean rules"),
        (
            {"source": {"kind": "rules", "rules": [{"rule": "length", "maximum": 3}]}},
            r"source\.rules\.0\.length\.maximum",
        ),
        ({"source": {"kind": "model", "model": "a", "header": {}}}, r"source\.header\s+.*did you mean heads"),
        ({"source": {"kind": "judge", "model": "m", "url": ["http://u:p@h"]}}, "the url of h holds a user"),
    ],
)
def test_sources_that_make_no_sense_are_named(source: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        RewardConfig.model_validate(source)
