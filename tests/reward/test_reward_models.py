import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_world import bare_scores, conversation, reward_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from reward.models import ModelRefused, RewardModel, Score, Stopped, batches, load
from reward.schema import Item

LENGTHS = [1, 40, 3, 17, 60, 2, 25, 8, 33, 12]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reward_model(tmp_path_factory.mktemp("reward"))


def item(i: int, words: int) -> Item:
    messages, response = conversation(i, words)
    return Item.model_validate({"messages": messages, "response": response})


def values(scores: list[Score]) -> list[float]:
    assert not [s for s in scores if s.value is None]
    return [s.value for s in scores if s.value is not None]


def with_tensor(folder: Path, target: Path, change: Any) -> Path:
    """A copy of the model whose tensors went through `change`."""
    shutil.copytree(folder, target)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_batches_hold_like_lengths_under_the_budget() -> None:
    lengths = {0: 5, 1: 50, 2: 7, 3: 120, 4: 6, 5: 7}
    # 120 alone, above the budget; 50 × 2 fits, 50 × 3 does not; then 7, 6, 5
    assert list(batches(lengths, 100)) == [[3], [1, 2], [5, 4, 0]]
    assert list(batches({}, 100)) == []
    assert list(batches({0: 5, 1: 5}, 1)) == [[0], [1]]


def test_scores_are_those_of_transformers_whatever_the_batch(folder: Path) -> None:
    items = [conversation(i, n) for i, n in enumerate(LENGTHS)]
    expected = bare_scores(folder, items)
    assert max(expected) - min(expected) > 0.1
    requests = [item(i, n) for i, n in enumerate(LENGTHS)]
    for budget in (1, 200, 100_000):  # alone, in a few batches, all in one
        assert values(load(str(folder), batch_tokens=budget).score(requests)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("pad", [None, -1, 4])
def test_padding_changes_no_score_without_a_pad_token_or_where_it_ends_the_turn(
    tmp_path: Path, pad: int | None
) -> None:
    # 4 is <|eot_id|>, with which every conversation ends: the model reads the token before it, in any batch
    folder = reward_model(tmp_path / "reward", pad_token_id=pad)
    items = [conversation(i, n) for i, n in enumerate(LENGTHS)]
    model = load(str(folder))
    together = values(model.score([item(i, n) for i, n in enumerate(LENGTHS)]))
    alone = [values(model.score([item(i, n)]))[0] for i, n in enumerate(LENGTHS)]
    assert together == pytest.approx(alone, abs=1e-5)
    if pad == -1:  # transformers' own code cannot run it: the last token counts, as without one
        shutil.copytree(folder, tmp_path / "none")
        LlamaConfig.from_pretrained(folder, pad_token_id=None).save_pretrained(tmp_path / "none")
        folder = tmp_path / "none"
    assert together == pytest.approx(bare_scores(folder, items), abs=1e-5)


def test_a_score_that_is_not_finite_is_none_and_the_others_stay(folder: Path, tmp_path: Path) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][token] = float("nan")

    model = load(str(folder))
    encoded = model._encoder.encode([item(0, 5), item(1, 5)])
    token = next(t for t in encoded[1] if isinstance(t, int) and t not in encoded[0])
    poisoned = load(str(with_tensor(folder, tmp_path / "nan", poison)))
    before, after = model.score([item(0, 5), item(1, 5)]), poisoned.score([item(0, 5), item(1, 5)])
    assert after == [before[0], Score(reason="the model's score is nan")]


def test_bad_items_have_reasons_and_change_no_other_score(folder: Path) -> None:
    model = load(str(folder))
    good = [item(i, n) for i, n in enumerate(LENGTHS)]
    alone = model.score(good)
    long, surrogate = item(1, 400), Item.model_validate({"messages": good[0].messages, "response": "\ud800"})
    mixed = model.score([long, *good[:5], surrogate, *good[5:]])
    assert mixed[0] == Score(reason="longer than 256 tokens")
    assert mixed[6] == Score(reason="text that is not valid Unicode (a lone surrogate)")
    assert mixed[1:6] + mixed[7:] == alone
    assert model.score([long]) == [mixed[0]]
    assert model.score([]) == []


def test_a_token_without_an_embedding_is_a_bad_item(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "more")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(["capital"])
    tokenizer.save_pretrained(tmp_path / "more")
    items = [
        Item.model_validate({"messages": [{"role": "user", "content": "?"}], "response": r}) for r in ("!", "capital")
    ]
    first, second = load(str(tmp_path / "more")).score(items)
    assert [first] == load(str(folder)).score(items[:1])
    assert second == Score(reason="has a token that the model has no embedding for")


def test_limits_and_health(folder: Path) -> None:
    health = load(str(folder)).health
    assert (health.model, health.dtype, health.device, health.max_tokens) == (str(folder), "float32", "cpu", 256)
    assert health.parameters == LlamaForSequenceClassification.from_pretrained(folder).num_parameters()
    assert list(health.files) == ["model.safetensors"]
    assert load(str(folder), max_tokens=100).health.max_tokens == 100
    assert load(str(folder), max_tokens=1000).health.max_tokens == 256
    assert load(str(folder), dtype="bfloat16").health.dtype == "bfloat16"


def test_the_hash_is_that_of_weights_configuration_and_tokenizer(folder: Path, tmp_path: Path) -> None:
    def changed(name: str, **keys: object) -> Path:
        copy = shutil.copytree(folder, tmp_path / next(iter(keys)))
        settings = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps(settings | keys))
        return copy

    same = changed("config.json", transformers_version="9.9")
    others = [
        with_tensor(folder, tmp_path / "other", lambda tensors: tensors["score.weight"].mul_(1.001)),
        changed("config.json", rms_norm_eps=0.01),
        changed("tokenizer_config.json", model_max_length=77),
    ]
    hashes = [load(str(f)).health.weights_sha256 for f in (folder, same, *others)]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 4


def test_shards_are_found_by_their_index(folder: Path, tmp_path: Path) -> None:
    sharded = shutil.copytree(folder, tmp_path / "sharded", ignore=shutil.ignore_patterns("model.safetensors"))
    LlamaForSequenceClassification.from_pretrained(folder).save_pretrained(sharded, max_shard_size="40KB")
    model = load(str(sharded))
    assert len(model.health.files) > 1
    assert model.score([item(0, 5)]) == load(str(folder)).score([item(0, 5)])
    (sharded / next(iter(model.health.files))).unlink()
    with pytest.raises(ModelRefused, match="the index names model-00001"):
        load(str(sharded))


def test_a_model_that_is_going_down_stops_between_batches(folder: Path) -> None:
    model: RewardModel = load(str(folder))
    model.stopping.set()
    with pytest.raises(Stopped):
        model.score([item(0, 5)])


def test_refusals_name_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    def refused(path: Path, match: str) -> None:
        with pytest.raises(ModelRefused, match=match):
            load(str(path))

    refused(tmp_path / "nothing", "there is no such folder")
    refused(folder / "config.json", "there is no such folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no config.json")
    mixed = reward_model(tmp_path / "mixed")
    (mixed / "adapter_config.json").write_text("{}")
    refused(mixed, "an adapter lies there")
    refused(reward_model(tmp_path / "two", labels=2), "one label, this one has num_labels = 2")
    refused(reward_model(tmp_path / "mute", template=None), "no chat template")

    pickled = shutil.copytree(folder, tmp_path / "pickled")
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    refused(pickled, "pickled weights are not loaded")

    cut = shutil.copytree(folder, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    refused(cut, "cut: ")

    with (cut / "model.safetensors").open("wb") as file:  # a hole, which takes no room on the disk
        file.write((40 << 20).to_bytes(8, "little") + b"{")
        file.truncate(60 << 20)
    refused(cut, "model.safetensors is damaged, or no weights: .* 41943040 bytes")

    headless = with_tensor(folder, tmp_path / "headless", lambda tensors: tensors.pop("score.weight"))
    refused(headless, r"no trained reward model, its weight files lack score\.weight")
    policy = shutil.copytree(
        folder, tmp_path / "policy", ignore=shutil.ignore_patterns("model.safetensors", "config.json")
    )
    LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).save_pretrained(policy)
    refused(policy, "lack score.weight")
