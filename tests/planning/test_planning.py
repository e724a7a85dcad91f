"""Memory and time of a round from sizes that can be followed by hand."""

import pytest

from selfplay.planning import memory, seconds
from selfplay.planning.devices import Device, device
from selfplay.planning.gantt import Span, busy, length, line
from selfplay.planning.memory import GIB
from selfplay.planning.shapes import Shape, from_config, usual

LLAMA_8B = {
    "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
EIGHT = from_config(LLAMA_8B, 8_030_261_248)
SMALL = Shape(parameters=1000, active=1000, layers=2, hidden=10, feed_forward=30, kv_width=4, embeddings=200)
ROUND = Device(name="round", flops=1000.0, bandwidth=1000.0)  # numbers to count with


def test_a_config_says_the_shape():
    assert EIGHT is not None and EIGHT.parameters == EIGHT.active == 8_030_261_248
    assert (EIGHT.layers, EIGHT.hidden, EIGHT.feed_forward) == (32, 4096, 14336)
    assert (EIGHT.kv_width, EIGHT.embeddings) == (2 * 8 * 128, 2 * 128256 * 4096)
    assert EIGHT.layer == pytest.approx(218.1e6, rel=1e-3)
    assert from_config({"text_config": LLAMA_8B}, 8_030_261_248) == EIGHT
    assert from_config({"hidden_size": 8}, 1) is None


def test_of_a_mixture_a_token_passes_some_experts():
    """Two of eight experts: 6 · 3 · hidden · inner parameters of each of two layers are not used: 6 · 3 · 4 · 8 · 2 = 1,152."""
    config = {
        "num_hidden_layers": 2, "hidden_size": 4, "num_attention_heads": 2, "intermediate_size": 8, "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }  # fmt: skip
    found = from_config(config, 10_000)
    assert (found.active, found.feed_forward, found.kv_width) == (10_000 - 1_152, 16, 2 * 2 * 2)


def test_a_model_without_a_config_is_like_others_of_its_size():
    found = usual(8_030_261_248)
    assert 30 <= found.layers <= 36 and 4000 <= found.hidden <= 4600


def test_what_fsdp_holds_of_an_8b_policy_on_each_of_four():
    """Per parameter and share: weights 4 bytes, moments 8, gradients 4, reference 4; 8.03e9 / 4 · 4 bytes = 7.48 GiB.

    Gathered are two layers and both embeddings in bf16: (2 · 218.1e6 + 1050.7e6) · 2 bytes = 2.77 GiB. The activations of
    8,192 tokens: 32 layers of 4096 numbers = 2.0 GiB, and one layer of 8 · 4096 + 4 · 14336 = 90,112: 1.375 GiB.
    """
    parts = memory.trainer(
        EIGHT, processes=4, shares=4, rank=None, reference=True, tokens=8192, bf16=True, checkpointing=True
    )
    found = {name: round(size / GIB, 2) for name, size in parts.items()}
    assert found == {
        "weights": 7.48, "optimizer": 14.96, "gradients": 7.48, "reference": 7.48, "gathered": 2.77, "activations": 3.38,
        "CUDA": 1.5,
    }  # fmt: skip


def test_an_adapter_is_trained_on_a_base_that_is_the_reference_too():
    """Rank 64: 64 · (9 · 4096 + 2048 + 3 · 14336) = 5.24e6 numbers a layer, 167.8e6 in all; 12 bytes each beside the weights."""
    assert memory.adapter(EIGHT, 64) == 167_772_160
    parts = memory.trainer(
        EIGHT, processes=1, shares=1, rank=64, reference=False, tokens=4096, bf16=True, checkpointing=True
    )
    assert "reference" not in parts and "gathered" not in parts
    assert parts["optimizer"] + parts["gradients"] == 12 * 167_772_160
    assert parts["weights"] == 4 * (8_030_261_248 + 167_772_160)


def test_without_checkpointing_every_layer_keeps_its_activations():
    """SMALL: 8 · 10 + 4 · 30 = 200 numbers a token and layer, in fp32."""
    settings = {"processes": 1, "shares": 1, "rank": None, "reference": False, "tokens": 5, "bf16": False}
    assert memory.trainer(SMALL, **settings, checkpointing=False)["activations"] == 5 * 200 * 4 * 2
    assert memory.trainer(SMALL, **settings, checkpointing=True)["activations"] == 5 * 200 * 4 + 5 * 10 * 4 * 2


def test_a_reward_model_holds_its_weights_and_one_layer_of_a_batch():
    parts = memory.reward(EIGHT, 2, 16_384)
    assert sum(parts.values()) / GIB == pytest.approx(14.96 + 2.75 + 0.5, abs=0.01)


def test_a_decoding_step_reads_weights_and_cache_and_multiplies():
    """Weights 2,000 bytes; cache 3 sequences · 50 tokens · 2 layers · 4 numbers · 2 bytes = 2,400; both at 850 bytes a second.
    Arithmetic 2 · 1000 · 3 at 600 a second. Over two GPUs half of that, and 4 all-reduces."""
    one = seconds.decoding_step(SMALL, ROUND, sequences=3, context=50, parallel=1)
    assert one == pytest.approx(4400 / 850 + 6000 / 600 + seconds.STEP)
    two = seconds.decoding_step(SMALL, ROUND, sequences=3, context=50, parallel=2)
    assert two == pytest.approx((4400 / 850 + 6000 / 600) / 2 + 4 * seconds.REDUCE + seconds.STEP)


def test_engines_share_the_answers():
    """60 answers, six at a time, two engines: five waves each of 10 tokens."""
    step = seconds.decoding_step(SMALL, ROUND, sequences=6, context=25, parallel=1)
    asked = {"prompt": 20, "answer": 10, "parallel": 1, "most": 6}
    found = seconds.sampling(SMALL, ROUND, answers=60, engines=2, **asked)
    assert found == pytest.approx(5 * 10 * step / seconds.FULL)
    assert seconds.sampling(SMALL, ROUND, answers=60, engines=1, **asked) == pytest.approx(2 * found)


def test_passes_over_tokens():
    """Forward 2, backward 4, recomputation 2, reference 2 operations a parameter and token; an adapter has no weight gradients."""
    assert seconds.scoring(SMALL, ROUND, tokens=9, gpus=2) == pytest.approx(2 * 1000 * 9 / (0.45 * 1000 * 2))
    assert seconds.features(SMALL, ROUND, tokens=9, gpus=1) == pytest.approx(6 * 1000 * 9 / (0.3 * 1000))
    full = seconds.training(SMALL, ROUND, tokens=9, gpus=1, lora=False, checkpointing=True)
    assert full == pytest.approx(10 * 1000 * 9 * 1.18 / (0.33 * 1000))
    assert seconds.training(SMALL, ROUND, tokens=9, gpus=1, lora=True, checkpointing=False) == pytest.approx(0.6 * full)


def test_gpus_by_their_names():
    assert device("NVIDIA H100 80GB HBM3").flops == 989e12
    assert device("NVIDIA H100 PCIe").flops == 756e12 and device("NVIDIA A100-SXM4-80GB").bandwidth == 2e12
    assert device("something new").name == "H100"


SPANS = [
    Span(lane="a", what="generate", start=0, seconds=40),
    Span(lane="b", what="score", start=0, seconds=40, busy=0.5),
    Span(lane="b", what="train", start=60, seconds=40),
    Span(lane="a", what="train", start=30, seconds=20),  # overlaps with itself for ten seconds
]


def test_the_share_of_a_lane_that_is_busy():
    assert length(SPANS) == 100
    assert busy(SPANS, "a", 100) == pytest.approx(0.5)
    assert busy(SPANS, "b", 100) == pytest.approx(0.2 + 0.4)
    assert busy(SPANS, "c", 100) == busy([], "a", 0) == 0


def test_a_line_shows_what_fills_most_of_each_cell():
    assert line(SPANS, "a", 100, 10) == "ggggt·····"  # the fourth ten seconds have both
    assert line(SPANS, "b", 100, 10) == "ssss··tttt"
    assert line([Span(lane="a", what="evaluate", start=0, seconds=3)], "a", 20, 2) == "e·"
