"""Models with several heads: named ones, weighted sums, and models that combine their heads by code of their own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from reward_world import conversation, reward_model
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from reward.models import ModelRefused, load
from reward.schema import Item
from reward.server import head

pytestmark = pytest.mark.service

NAMES = {0: "helpfulness", 1: "correctness", 2: "verbosity"}
CONVERSATIONS = [conversation(i, n) for i, n in enumerate([1, 40, 3, 17])]
ITEMS = [Item.model_validate({"messages": m, "response": r}) for m, r in CONVERSATIONS]

# as ArmoRM: the attributes' rewards, and a score from a gate that reads the prompt
OWN_CODE = """
from dataclasses import dataclass
import torch
from transformers import LlamaModel, LlamaPreTrainedModel
from transformers.utils import ModelOutput

@dataclass
class Output(ModelOutput):
    rewards: torch.Tensor = None
    score: torch.Tensor = None
    logits: torch.Tensor = None

class GatedReward(LlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.regression_layer = torch.nn.Linear(config.hidden_size, 3, bias=False)
        self.gate = torch.nn.Linear(config.hidden_size, 3, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **unused):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        last = attention_mask.sum(-1) - 1 if attention_mask is not None else torch.full(input_ids.shape[:1], input_ids.shape[1] - 1)
        rewards = self.regression_layer(hidden[torch.arange(len(hidden)), last])
        score = (rewards * self.gate(hidden[:, 0]).softmax(-1)).sum(-1)
        return Output(rewards=rewards, score=score, logits=score)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    labels = {"id2label": NAMES, "label2id": {v: k for k, v in NAMES.items()}}
    return reward_model(tmp_path_factory.mktemp("heads") / "reward", labels=3, **labels)


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    target = tmp_path_factory.mktemp("heads") / "gated"
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("model.safetensors"))
    (target / "own_code.py").write_text(OWN_CODE)
    settings = json.loads((target / "config.json").read_text())
    settings |= {
        "auto_map": {"AutoModelForSequenceClassification": "own_code.GatedReward"},
        "architectures": ["GatedReward"],
    }
    (target / "config.json").write_text(json.dumps(settings))
    config = AutoConfig.from_pretrained(target, trust_remote_code=True)
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_config(config, trust_remote_code=True).save_pretrained(target)
    return target


def all_logits(folder: Path) -> torch.Tensor:
    """(N, H) by transformers alone."""
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    rows = []
    for messages, response in CONVERSATIONS:
        turns = [*messages, {"role": "assistant", "content": response}]
        ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        with torch.inference_mode():
            rows.append(model(input_ids=torch.tensor([ids])).logits[0])
    return torch.stack(rows)


def test_a_named_head_and_a_weighted_sum(folder: Path) -> None:
    logits = all_logits(folder)
    named = [s.value for s in load(str(folder), heads={"correctness": 1.0}).score(ITEMS)]
    assert named == pytest.approx(logits[:, 1].tolist(), abs=1e-5)
    mixed = [s.value for s in load(str(folder), heads={"helpfulness": 0.65, "verbosity": -0.2}).score(ITEMS)]
    assert mixed == pytest.approx((0.65 * logits[:, 0] - 0.2 * logits[:, 2]).tolist(), abs=1e-5)


def test_heads_by_number(folder: Path) -> None:
    named, numbered = (load(str(folder), heads=h).score(ITEMS) for h in ({"correctness": 2.0}, {"1": 2.0}))
    assert [s.value for s in named] == [s.value for s in numbered]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("import torch\n", "import torch\nfrom transformers import NO_SUCH_NAME\n", "ImportError: .*NO_SUCH_NAME"),
        ("hidden = self.model(", "hidden = self.modle(", "AttributeError at its first conversation: .*modle"),
    ],
)
def test_code_of_a_model_that_fails_means_that_it_cannot_be_served(
    gated: Path, tmp_path: Path, before: str, after: str, message: str
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(gated, folder)
    (folder / "own_code.py").write_text(OWN_CODE.replace(before, after, 1))
    with pytest.raises(ModelRefused, match=message):
        load(str(folder), trust_remote_code=True)


def test_heads_are_part_of_what_scores(folder: Path) -> None:
    hashes = {
        load(str(folder), heads=h).health.weights_sha256
        for h in ({"verbosity": 1}, {"verbosity": 2}, {"helpfulness": 1})
    }
    assert len(hashes) == 3


def test_what_is_missing_is_named(folder: Path) -> None:
    with pytest.raises(ModelRefused, match=r"num_labels = 3: name the heads.*helpfulness, correctness, verbosity"):
        load(str(folder))
    with pytest.raises(ModelRefused, match="no head 'kindness'; it has helpfulness"):
        load(str(folder), heads={"kindness": 1.0})


def test_a_model_that_combines_its_heads_itself(gated: Path) -> None:
    with pytest.raises(ModelRefused):
        load(str(gated))  # its code is not run unasked
    whole = load(str(gated), trust_remote_code=True)
    alone = [whole.score([item])[0].value for item in ITEMS]
    assert [s.value for s in whole.score(ITEMS)] == pytest.approx(alone, abs=1e-5)
    parts = {n: load(str(gated), trust_remote_code=True, heads={n: 1.0}) for n in NAMES.values()}
    rewards = torch.tensor([[s.value for s in model.score(ITEMS)] for model in parts.values()])
    # a gate is a convex mixture of what it gates
    assert all(lo - 1e-5 <= s <= hi + 1e-5 for lo, s, hi in zip(rewards.amin(0), alone, rewards.amax(0), strict=True))
    assert alone != pytest.approx(rewards.mean(0).tolist(), abs=1e-4)


def test_heads_on_the_command_line() -> None:
    assert head("helpfulness=0.65") == ("helpfulness", 0.65)
    assert head("verbosity=-2e-1") == ("verbosity", -0.2)
    assert head("a=b=1") == ("a=b", 1.0)
    assert head("helpfulness") == ("helpfulness", 1.0)
    with pytest.raises(ValueError):
        head("helpfulness=much")
