"""Embeddings of a small random policy, computed in this process and by order in the trainer's."""

import sys

import numpy as np
import pytest
import torch
from engine_world import write_policy
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from selfplay.errors import TrainError
from selfplay.methods import breadth
from selfplay.models.weights import load
from selfplay.processes.child import Child, ChildError
from selfplay.storage import tables, tensors
from selfplay.training.embed_job import embed, hidden_states
from selfplay.training.jobs import EmbedJob
from selfplay.types import Prompt

pytestmark = pytest.mark.service


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A policy and 40 prompts of 1 to 90 tokens."""
    root = tmp_path_factory.mktemp("embed")
    write_policy(root, 0, seed=1)
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(
            prompt_id=f"p{i}", messages=[{"role": "user", "content": f"number {i}"}], split="train",
            prompt_ids=rng.integers(3, 280, 1 + int(rng.integers(0, 90))).tolist(),
        )
        for i in range(40)
    ]  # fmt: skip
    tables.write_rows(root / "prompts.parquet", prompts, Prompt)
    return root, prompts


def job(root, **changes):
    settings = {
        "prompts": root / "prompts.parquet", "policy": root / "0000", "embedding": "policy", "keep": 12, "seed": 2**63 - 1,
    }  # fmt: skip
    return EmbedJob(**(settings | changes))


@torch.no_grad()
def one_at_a_time(model, sequences, pooling):
    """By the model's public output, no batch and no padding."""
    states = [model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0] for ids in sequences]
    return np.stack([(s.mean(0) if pooling == "mean" else s[-1]).numpy() for s in states])


@pytest.mark.parametrize(("batch_tokens", "pooling"), [(1, "mean"), (200, "mean"), (8192, "mean"), (200, "last")])
def test_batches_are_exact(world, batch_tokens, pooling):
    root, prompts = world
    model = load(root / "0000").eval()
    sequences = [p.prompt_ids for p in prompts]
    done = []
    found = hidden_states(model, sequences, pooling, batch_tokens, done.append)
    expected = one_at_a_time(model, sequences, pooling)
    assert found.shape == (40, 64) and found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-5
    assert done == sorted(done) and done[-1] == 40
    assert batch_tokens > 1 or len(done) == 40


def test_bf16_is_pooled_in_float32(world):
    """The mean over 90 tokens of states in bf16 is nearer to theirs in float32 than bf16 could say."""
    root, prompts = world
    model = load(root / "0000", torch.bfloat16).eval()
    ids = max((p.prompt_ids for p in prompts), key=len)
    with torch.no_grad():
        states = model.get_decoder()(input_ids=torch.tensor([ids])).last_hidden_state[0]
    assert states.dtype == torch.bfloat16
    (found,) = hidden_states(model, [ids])
    assert np.abs(found - states.double().mean(0).numpy()).max() < 1e-6


def test_the_representatives_come_with_their_clusters(world):
    root, prompts = world
    found = embed(job(root, clusters=5), lambda done: None)
    kept, labels, distances = breadth.representatives(
        hidden_states(load(root / "0000").eval(), [p.prompt_ids for p in prompts]), 12, 5, 2**63 - 1
    )
    assert (found["kept"], found["clusters"]) == (kept.tolist(), labels.tolist())
    assert found["distances"] == pytest.approx(distances.tolist())
    assert len(found["kept"]) == 12 and set(found["clusters"]) == set(range(5))


def test_the_state_from_which_the_policy_answers_stands_for_a_prompt_where_the_job_says_so(world):
    root, prompts = world
    found = embed(job(root, pooling="last"), lambda done: None)
    states = hidden_states(load(root / "0000").eval(), [p.prompt_ids for p in prompts], "last")
    assert found["kept"] == breadth.representatives(states, 12, None, 2**63 - 1)[0].tolist()
    assert found["kept"] != embed(job(root), lambda done: None)["kept"]


def test_by_order_in_the_child(world, tmp_path):
    root, _ = world
    child = Child(
        "trainer", [sys.executable, "-m", "selfplay.training.trainer"], run_dir=tmp_path, log=tmp_path / "log"
    )
    child.start()
    try:
        seen = []
        first = child.order("embed", seen.append, job=job(root).model_dump(mode="json"))
        again = child.order("embed", job=job(root).model_dump(mode="json"))
        assert {k: first[k] for k in ("kept", "clusters", "distances")} == {
            k: again[k] for k in ("kept", "clusters", "distances")
        }
        assert seen[-1]["done"] == 40
        with pytest.raises(ChildError, match="cannot be loaded") as error:
            child.order("embed", job=job(root, embedding=str(tmp_path / "none")).model_dump(mode="json"))
        assert error.value.kind == "input" and "a folder or a Hub id" in error.value.hint
        with pytest.raises(ChildError, match="holds no checkpoint"):
            child.order("embed", job=job(root, policy=root / "none").model_dump(mode="json"))
    finally:
        child.stop()


def test_a_damaged_policy_is_named(world, tmp_path):
    root, _ = world
    write_policy(tmp_path, 1, seed=1)
    model = load(tmp_path / "0001")
    model.model.norm.weight.data[3] = float("nan")
    model.save_pretrained(tmp_path / "0001")
    with pytest.raises(TrainError, match="40 of 40 embeddings are not finite") as error:
        embed(job(root, policy=tmp_path / "0001"), lambda done: None)
    assert error.value.kind == "nonfinite"


def sentence_model(folder):
    """A small random BERT, as its own library saves it: of it sentence-transformers makes a model with mean pooling."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "number", *map(str, range(40))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def test_a_sentence_transformers_model_embeds_text(world, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    root, prompts = world
    folder = sentence_model(tmp_path / "model")
    found = embed(job(root, embedding=str(folder)), lambda done: None)
    vectors = sentence_transformers.SentenceTransformer(str(folder)).encode([p.messages[0]["content"] for p in prompts])
    assert len(np.unique(vectors, axis=0)) == 40
    kept, labels, distances = breadth.representatives(vectors, 12, None, 2**63 - 1)
    assert (found["kept"], found["clusters"]) == (kept.tolist(), labels.tolist())
    assert found["distances"] == pytest.approx(distances.tolist(), abs=1e-5)


def test_of_a_sentence_transformers_model_no_pickle_is_loaded(world, tmp_path):
    pytest.importorskip("sentence_transformers")
    folder = sentence_model(tmp_path / "model")
    torch.save(BertModel.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(TrainError, match="cannot be loaded: .*model.safetensors"):
        embed(job(world[0], embedding=str(folder)), lambda done: None)


@pytest.mark.parametrize("of_the_hub", [False, True])
def test_of_a_sentence_transformers_model_no_header_fills_the_memory(world, tmp_path, monkeypatch, of_the_hub):
    """A layer of its own has weights in a folder of its own."""
    pytest.importorskip("sentence_transformers")
    folder = sentence_model(tmp_path / "model")
    (folder / "2_Dense").mkdir()
    with (folder / "2_Dense" / "model.safetensors").open("wb") as file:
        file.write((tensors.LARGEST_HEADER + 1).to_bytes(8, "little"))
        file.truncate(tensors.LARGEST_HEADER + 64)
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **how: asked.append(name) or str(folder))
    with pytest.raises(TrainError, match="cannot be loaded: .*2_Dense.*its header has 33554433 bytes"):
        embed(job(world[0], embedding="some-model" if of_the_hub else str(folder)), lambda done: None)
    assert asked == (["sentence-transformers/some-model"] if of_the_hub else [])


def test_without_the_package_a_model_of_it_is_a_clear_error(world, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(TrainError, match="needs the package sentence-transformers") as error:
        embed(job(world[0], embedding="some/model"), lambda done: None)
    assert "pip install" in error.value.hint
