"""Kinds of reward: the registry, settings with errors that name the key, and a new kind that is one module and one line."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from reward_world import process_of

from reward import kinds
from reward.client import RewardClient
from reward.kinds import Kind
from reward.schema import Item
from reward.scorer import ModelRefused, OneByOne, Score, Unscorable

ROOT = Path(__file__).parents[2]
EXAMPLES = dict(
    re.findall(r"^```python (.+)\n((?:.|\n)*?)^```$", (ROOT / "docs/rewards.md").read_text("utf-8"), re.MULTILINE)
)
MESSAGES = [{"role": "user", "content": "Where?"}]
ITEMS = [(MESSAGES, "In Paris."), (MESSAGES, "It is a city in France, you know, and a large one.")]
SCORE = """
import json, sys
from pathlib import Path
import reward
from selfplay.config import load
from selfplay.rewards.service import RewardService
from selfplay.rewards.texts import Item

config = load(sys.argv[1], ["reward.model=null", "reward.source={kind: brevity, words: 10}"])
(source,) = config.reward_sources().values()
service = RewardService(source, Path("run"), on_event=lambda kind, text: print(text, file=sys.stderr))
try:
    print(json.dumps([reward.__file__, service.score([Item(*item) for item in json.loads(sys.argv[2])]), source.which()]))
finally:
    service.stop()
"""


def item(response: str) -> Item:
    return Item.model_validate({"messages": MESSAGES, "response": response})


@pytest.mark.service
def test_a_new_kind_is_one_module_and_one_line(tmp_path: Path) -> None:
    """The example of the docs, in a copy of the packages: from the configuration to scores of a server in a child."""
    for package in ("reward", "selfplay"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "reward" / "brevity.py").write_text(EXAMPLES["reward/brevity.py"])
    registry = tmp_path / "reward" / "kinds.py"
    registry.write_text(registry.read_text().replace("KINDS = {\n", "KINDS = {\n" + EXAMPLES["line"], 1))
    done = subprocess.run(
        [sys.executable, "-c", SCORE, str(ROOT / "configs/tiny.yaml"), json.dumps(ITEMS)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    place, scores, which = json.loads(done.stdout)
    assert Path(place).parent == tmp_path / "reward"
    assert scores == pytest.approx([0.8, 0.0])
    assert which == {"source": {"kind": "brevity", "words": 10}}


@pytest.mark.service
def test_a_kind_elsewhere_is_served_by_its_place_and_known_by_its_settings_and_code(tmp_path: Path) -> None:
    module = tmp_path / "my_brevity.py"

    def served(*settings: str) -> tuple[list[float | None], str]:
        options = ("--kind", "my_brevity:Brevity", *settings)
        with (
            process_of(*options, env={"PYTHONPATH": f"{ROOT}:{tmp_path}"}) as (_, line),
            RewardClient(line["url"]) as c,
        ):
            return c.score(ITEMS), c.health().weights_sha256

    module.write_text(EXAMPLES["reward/brevity.py"])
    scores, identity = served("--settings", '{"words": 10}')
    assert scores == pytest.approx([0.8, 0.0])
    assert served("--settings", '{"words": 10}')[1] == identity
    others, other = served()  # the default: 50 words
    assert others == pytest.approx([1 - 2 / 50, 1 - 12 / 50]) and other != identity
    module.write_text(module.read_text().replace("1 -", "2 -"))
    assert served("--settings", '{"words": 10}')[1] not in (identity, other)


class Nice(Kind):
    access = frozenset({"hurry"})
    words: list[str] = ["please"]  # noqa: RUF012
    hurry: float = 1.0

    def scorers(self) -> list[OneByOne]:
        return []


class Tells(Kind):
    key: SecretStr = SecretStr("")


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("modle", {}, "no kind of reward is called 'modle': did you mean model"),
        ("poem", {}, "there are model, rules, judge"),
        ("no_such_module:Kind", {}, "cannot be imported: ModuleNotFoundError"),
        ("reward.kinds:Nothing", {}, "cannot be imported: AttributeError"),
        ("reward.scorer:OneByOne", {}, "has to be a subclass of reward.kinds.Kind"),
        (f"{__name__}:Tells", {}, "the setting key is a secret"),
        (f"{__name__}:Nice", {"word": []}, "word: unknown key, did you mean words"),
        (f"{__name__}:Nice", {"qqqq": 1}, "qqqq: unknown key, known: words, hurry"),
        ("model", {}, "model model: required"),
        ("model", {"model": "m", "batch_tokens": 0}, "batch_tokens: Input should be greater than"),
        ("judge", {"url": ["http://me:secret@h"], "model": "m"}, "url.0: the url of h holds a user, a password"),
    ],
)
def test_what_is_no_kind_and_what_is_no_setting_are_named(name: str, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelRefused, match=re.escape(says)) as error:
        kinds.load(name, json.dumps(settings))
    assert "secret@" not in str(error.value)


def test_settings_that_change_no_score_are_no_part_of_the_identity() -> None:
    plain, hurried, other = Nice(), Nice(hurry=2.0), Nice(words=["thanks"])
    assert plain.health() == hurried.health() != other.health()
    assert (plain.which(), hurried.which(), other.which()) == ({}, {}, {"words": ["thanks"]})


def test_an_item_that_has_no_value_is_set_aside_alone() -> None:
    class Length(OneByOne):
        def value(self, item: Item) -> float:
            if not item.response:
                raise Unscorable("nothing was said")
            return float(item.response)

    scores = Length(Nice().health()).score([item("1.5"), item(""), item("x"), item("inf")])
    assert scores[0] == Score(value=1.5)
    reasons = [score.reason for score in scores[1:]]
    assert reasons == ["nothing was said", "ValueError: could not convert string to float: 'x'", "the value is inf"]


@pytest.mark.slow
def test_the_registry_imports_no_kind_and_each_kind_is_there() -> None:
    code = "import sys, reward.kinds; print([m for m in ('reward.rules', 'reward.judge', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
    assert all(issubclass(kinds.find(name), Kind) for name in kinds.KINDS)
