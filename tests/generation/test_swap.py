import math
from types import SimpleNamespace

import engine_world
import pytest

from selfplay.errors import CheckpointError
from selfplay.generation import swap
from selfplay.generation.installing import WarmEngine
from selfplay.generation.swap import Canaries

SPECS = {"model.embed_tokens.weight": ("F32", (280, 64)), "model.norm.weight": ("F32", (64,))}
CONFIG = {"model_type": "llama", "num_attention_heads": 2, "tie_word_embeddings": True, "transformers_version": "4"}
IDS = [[1, 5, 9], [1, 7, 8, 9, 4]]  # 2 and 4 scored tokens


def canaries(*logps: float) -> Canaries:
    return Canaries(token_ids=IDS, logps=list(logps))


def test_a_checkpoint_of_the_same_shape_fits_whatever_its_float_type():
    new = {name: ("BF16", shape) for name, (_, shape) in SPECS.items()}
    swap.check_fits(SPECS, new, CONFIG, CONFIG | {"transformers_version": "5"})


def test_a_tied_output_layer_may_be_stored_or_not():
    both = SPECS | {"lm_head.weight": ("F32", (280, 64))}
    swap.check_fits(SPECS, both, CONFIG, CONFIG)
    swap.check_fits(both, SPECS, CONFIG, CONFIG)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        swap.check_fits(both, SPECS, CONFIG, CONFIG | {"tie_word_embeddings": False})


@pytest.mark.parametrize(
    ("new", "config", "fault"),
    [
        ({"model.norm.weight": ("F32", (64,))}, {}, "model.embed_tokens.weight is missing"),
        (SPECS | {"model.extra": ("F32", (1,))}, {}, "model.extra is not in the running model"),
        (SPECS | {"model.norm.weight": ("F32", (65,))}, {}, r"model.norm.weight has shape \[65\], not \[64\]"),
        (SPECS | {"model.norm.weight": ("I8", (64,))}, {}, "model.norm.weight has type I8, not F32"),
        (SPECS, {"num_attention_heads": 4}, "config.json: num_attention_heads is 4, not 2"),
    ],
)
def test_what_does_not_fit_is_named(new, config, fault):
    with pytest.raises(CheckpointError, match=fault):
        swap.check_fits(SPECS, new, CONFIG, CONFIG | config)


def test_long_lists_of_faults_are_cut():
    with pytest.raises(CheckpointError, match=r"and 7 more$"):
        swap.check_fits({str(i): ("F32", (1,)) for i in range(10)}, {}, {}, {})


def test_distance_is_the_worst_sequence_in_nats_a_token():
    # |−3 + 3.5| / 2 = 0.25, |−8 + 7.6| / 4 = 0.1
    assert swap.distance([-3.0, -8.0], [-3.5, -7.6], IDS) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("engine", "new", "parent", "noise", "verdict"),
    [
        ((-3.0, -8.0), (-3.0, -8.0), (-3.5, -8.0), 0.0, "shown"),
        ((-3.5, -8.0), (-3.0, -8.0), (-3.5, -8.0), 0.0, "refuted"),  # the old weights answer
        ((-3.0, math.nan), (-3.0, -8.0), (-3.5, -8.0), 0.0, "refuted"),
        ((-3.0, -8.0), (-3.0, -8.0), (-3.0, -8.0), 0.0, "unclear"),  # the same weights
        # Within the tolerance of both, nearer to the parent: gap 5e-5, 4e-5 from new and 1e-5 from parent.
        ((-3.00008, -8.0), (-3.0, -8.0), (-3.0001, -8.0), 1e-7, "refuted"),
        # Nearer to new (1.5e-5 of 5e-5), but not within the engine's noise: half a reload?
        ((-3.00003, -8.0), (-3.0, -8.0), (-3.0001, -8.0), 1e-7, "unclear"),
        ((-3.00003, -8.0), (-3.0, -8.0), (-3.0001, -8.0), 2e-5, "shown"),
        # A gap of 5e-5 is within twice a noise of 3e-5.
        ((-3.0, -8.0), (-3.0, -8.0), (-3.0001, -8.0), 3e-5, "unclear"),
    ],
)
def test_judge(engine, new, parent, noise, verdict):
    assert swap.judge(engine, canaries(*new), canaries(*parent), noise, 1e-4)[0] == verdict


def test_judge_without_a_parent_goes_by_the_tolerance():
    assert swap.judge((-3.0001, -8.0), canaries(-3.0, -8.0), None, 0.0, 1e-4)[0] == "shown"
    assert swap.judge((-3.001, -8.0), canaries(-3.0, -8.0), None, 0.0, 1e-4)[0] == "refuted"


def test_canaries_of_other_sequences_cannot_be_compared():
    other = Canaries(token_ids=[[1, 5, 9], [1, 7, 8, 9, 5]], logps=[-3.5, -8.0])
    assert swap.judge((-3.0, -8.0), canaries(-3.0, -8.0), other, 0.0, 1e-4) == ("unclear", 0.0, None, None)


def test_a_manifest_without_canaries_is_refused():
    for bad in ({}, {"token_ids": [[1, 2]], "logps": []}, {"token_ids": [[1]], "logps": [-1.0]}):
        with pytest.raises(CheckpointError, match="no usable canaries"):
            Canaries.of(bad)


def test_prefix_prompt_spans_whole_blocks_and_leaves_room():
    assert len(swap.prefix_prompt(IDS, 32, 1000, 8)) == 3 * 32 + 16
    assert swap.prefix_prompt(IDS, 2, 1000, 64) == [1, 5, 9, 1, 7, 8, 9]
    assert len(swap.prefix_prompt(IDS, 32, 100, 8)) == 100 - 8 - 1


def test_the_bound_follows_from_the_noise_below_float32():
    """Four times the noise, or of .02 nats a token what is left of a mean over so many: .02 / √64 = .0025."""
    assert swap.tolerance("float32", 0.05, 64) == swap.fresh_tolerance("float32") == 1e-4
    assert swap.tolerance("bfloat16", 0.03, 64) == pytest.approx(0.12)
    assert swap.tolerance("bfloat16", 0.0, 64) == pytest.approx(0.01)
    assert swap.fresh_tolerance("bfloat16") == 0.1


@pytest.mark.parametrize(("errors", "stale"), [([0.03, 0.001, 0.002], False), ([0.03, 0.04, 0.002], True)])
def test_an_error_of_the_prefix_cache_is_one_with_most_seeds(tmp_path, monkeypatch, errors, stale):
    """A bound of .01, which follows from the least noise over 64 tokens. The first error alone would be past it."""
    config = engine_world.config(tmp_path)
    below = config.model_copy(update={"policy": config.policy.model_copy(update={"dtype": "bfloat16"})})
    warm, left = WarmEngine(below, tmp_path, tmp_path / "log"), list(errors)
    warm.info, warm._fresh = SimpleNamespace(block_size=32, max_model_len=512), False

    def order(self, name, *, prompt_ids, seed, n):
        assert (name, n, seed) == ("canary_generate", 64, 3 - len(left))
        return {"token_ids": [5] * n, "logps": [-1.0] * n}

    monkeypatch.setattr(WarmEngine, "order", order)
    monkeypatch.setattr(WarmEngine, "logps", lambda self, sequences: [-64 * (1 + left.pop(0))])
    assert (warm._prefix_error(canaries(-1.0, -1.0)) > warm.prefix_tolerance) == stale
    assert left == []


def test_prefix_error():
    assert swap.prefix_error([-1.0, -2.0], -3.5) == pytest.approx(0.25)
    assert swap.prefix_error([-1.0, -math.inf], -3.5) == math.inf
