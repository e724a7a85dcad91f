"""Every feature must be the projection of what autograd gives for its pair alone, by the plain loss over whole logits."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from selfplay.methods.features import PairGradients, linear_layers, pair_features, projection

WORDS = 53
LOSS = {"beta": 0.3, "epsilon": 0.2, "label_smoothing": 0.1, "nll_weight": 0.05}


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 0,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


def lora(model: Any, trained: bool, **changes: Any) -> Any:
    torch.manual_seed(5)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes
    model = get_peft_model(model, LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if trained and "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def rows(n: int = 5, seed: int = 0) -> list[dict[str, list[int]]]:
    """Pairs of unequal lengths: prompts of 1 to 9 tokens, responses of 1 to 12."""
    g = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        return torch.randint(3, WORDS, (int(torch.randint(low, high, (1,), generator=g)),), generator=g).tolist()

    return [{"prompt_ids": ids(1, 10), "chosen_ids": ids(1, 13), "rejected_ids": ids(1, 13)} for _ in range(n)]


def collate(pairs: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Rows [chosen; rejected], padded on the right, as the trainer's collator makes them; TRL takes seconds to import."""
    rows = [(pair["prompt_ids"], pair[side]) for side in ("chosen_ids", "rejected_ids") for pair in pairs]
    made = {
        "input_ids": [[*prompt, *response] for prompt, response in rows],
        "attention_mask": [[1] * (len(prompt) + len(response)) for prompt, response in rows],
        "completion_mask": [[0] * len(prompt) + [1] * len(response) for prompt, response in rows],
    }
    return {
        name: nn.utils.rnn.pad_sequence(list(map(torch.tensor, each)), batch_first=True) for name, each in made.items()
    }


def plain_loss(model: Any, pair: dict[str, list[int]], reference: Any, loss: dict[str, float]) -> Tensor:
    """The loss of one pair as methods.md has it: two sequences without padding, whole logits, double sums."""
    beta, epsilon, smoothing = loss["beta"], loss["epsilon"], loss["label_smoothing"]
    prompt, logps, refs, plus, minus = len(pair["prompt_ids"]), [], [], [], []
    for name in ("chosen_ids", "rejected_ids"):
        ids = torch.tensor([pair["prompt_ids"] + pair[name]])
        z = model(ids).logits[0, prompt - 1 : -1].float()
        with torch.no_grad():
            z_ref = z.detach() if reference is None else reference(ids).logits[0, prompt - 1 : -1].float()
        for logits, found in ((z, logps), (z_ref, refs), (z + epsilon * (z - z_ref), plus), (z - epsilon * (z - z_ref), minus)):  # fmt: skip
            found.append(logits.log_softmax(-1).gather(-1, ids[0, prompt:, None]).double().sum())
    q, q_ref, q_plus, q_minus = (chosen - rejected for chosen, rejected in (logps, refs, plus, minus))
    step = int(q_plus > q > q_minus) - int(q_minus > q > q_plus)
    u = beta / (1 + epsilon * step) * (q - q_ref)
    value = -(1 - smoothing) * nn.functional.logsigmoid(u) - smoothing * nn.functional.logsigmoid(-u)
    return value - loss["nll_weight"] * logps[0] / len(pair["chosen_ids"])


def one_by_one(
    model: Any, pairs: list[dict[str, list[int]]], dim: int, seed: int, layers: int | None = None,
    reference: Any = None, **loss: float,
) -> Tensor:  # fmt: skip
    """One backward a pair, weight gradients and all, then the projections: (B, dim)."""
    chosen = linear_layers(model, layers)
    weights = [layer.weight.requires_grad_() for layer in chosen.values()]
    found = []
    for pair in pairs:
        gradients = torch.autograd.grad(plain_loss(model, pair, reference, loss), weights)
        feature = torch.zeros(dim, dtype=torch.float64)
        for name, gradient in zip(chosen, gradients, strict=True):
            p_out, p_in = projection(seed, name, tuple(gradient.shape), dim)
            feature += (p_out.double() @ gradient.double() @ p_in.double().T).flatten()
        found.append(feature)
    return torch.stack(found)


def assert_equal(ours: Tensor, exact: Tensor, tolerance: float = 1e-4) -> None:
    assert ours.dtype == torch.float32 and ours.shape == exact.shape
    errors = (ours.double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert errors.max() < tolerance, errors


# --- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 7, 64, 600])
@pytest.mark.parametrize("layers", [None, 1, 2])
def test_dimensions_and_layers(dim: int, layers: int | None) -> None:
    model, pairs = llama(), rows()
    ours = pair_features(model, collate(pairs), dim, 3, layers=layers, **LOSS)
    assert_equal(ours, one_by_one(model, pairs, dim, 3, layers, **LOSS))


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"hidden_size": 48, "intermediate_size": 20, "num_hidden_layers": 3, "num_key_value_heads": 4},
        {"num_hidden_layers": 1, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
        {"attn_implementation": "eager"},
    ],
)
def test_shapes_of_models(changes: dict[str, Any]) -> None:
    model, pairs = llama(**changes), rows(4, seed=1)
    ours = pair_features(model, collate(pairs), 64, 0, reference=llama(7, **changes), **LOSS)
    assert_equal(ours, one_by_one(model, pairs, 64, 0, reference=llama(7, **changes), **LOSS))


def test_other_architectures() -> None:
    """Gemma: tied, scaled embeddings, soft-capped logits, norms everywhere; Qwen: biases of query, key and value."""
    torch.manual_seed(0)
    size = {"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "initializer_range": 0.2}  # fmt: skip
    gemma = Gemma2ForCausalLM(Gemma2Config(**size, head_dim=8, final_logit_softcapping=2.0, attn_logit_softcapping=5.0))
    for model in (gemma.eval(), Qwen2ForCausalLM(Qwen2Config(**size)).eval()):
        pairs = rows(3)
        ours = pair_features(model, collate(pairs), 64, 0, **LOSS)
        assert_equal(ours, one_by_one(model, pairs, 64, 0, **LOSS))


@pytest.mark.slow
@pytest.mark.parametrize("reference", [None, 7])
@pytest.mark.parametrize("trained", [False, True])
def test_lora(trained: bool, reference: int | None) -> None:
    """Fresh: B alone, since the gradient of every A is 0; trained: A and B."""
    model, pairs = lora(llama(), trained), rows()
    other = None if reference is None else llama(reference)
    assert {name.rpartition(".")[2] for name in linear_layers(model)} == (
        {"lora_A", "lora_B"} if trained else {"lora_B"}
    )
    assert len(linear_layers(model, 1)) == (14 if trained else 7)
    for layers in (None, 1):
        ours = pair_features(model, collate(pairs), 36, 3, layers=layers, reference=other, **LOSS)
        assert_equal(ours, one_by_one(model, pairs, 36, 3, layers, other, **LOSS))


def test_an_adapter_on_some_layers() -> None:
    model, pairs = lora(llama(tie_word_embeddings=True), True, target_modules=["q_proj", "down_proj"]), rows()
    assert len(linear_layers(model)) == 8
    assert_equal(pair_features(model, collate(pairs), 36, 3, **LOSS), one_by_one(model, pairs, 36, 3, **LOSS))


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, False, True])
@pytest.mark.parametrize("layers", [None, 1])
def test_gradient_checkpointing(layers: int | None, adapter: bool | None) -> None:
    model, pairs = llama() if adapter is None else lora(llama(), adapter), rows()
    exact = one_by_one(model, pairs, 64, 3, layers, **LOSS)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    assert_equal(pair_features(model, collate(pairs), 64, 3, layers=layers, **LOSS), exact)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        pair_features(model, collate(pairs), 64, 3, layers=layers, **LOSS)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [{}, {"beta": 2.0}, {"label_smoothing": 0.4, "beta": 3.0}, {"epsilon": 0.0}])
def test_the_coefficient_of_each_pair_is_that_of_its_loss(loss: dict[str, float]) -> None:
    """Against a reference far away: betas are split by the steps, and label smoothing turns some gradients round."""
    model, reference, pairs, settings = llama(), llama(11), rows(8, seed=4), LOSS | loss
    ours = pair_features(model, collate(pairs), 64, 3, reference=reference, **settings)
    assert_equal(ours, one_by_one(model, pairs, 64, 3, reference=reference, **settings))


def test_padding_does_not_show() -> None:
    model, pairs = llama(), rows()
    batch = collate(pairs)
    plain = pair_features(model, batch, 64, 3, **LOSS)
    more = {name: nn.functional.pad(values, (0, 9)) for name, values in batch.items()}
    more["input_ids"][more["attention_mask"] == 0] = 17
    assert_equal(pair_features(model, more, 64, 3, **LOSS), plain.double(), 1e-5)
    left = {name: nn.functional.pad(values, (6, 0)) for name, values in batch.items()}
    assert_equal(pair_features(model, left, 64, 3, **LOSS), plain.double(), 1e-4)


def test_bfloat16() -> None:
    """Of a bfloat16 model the features are those of its own gradients: to its rounding those of float32."""
    model, pairs = llama(), rows(8)
    exact = pair_features(model, collate(pairs), 256, 3, **LOSS)
    low = pair_features(llama().bfloat16(), collate(pairs), 256, 3, **LOSS)
    assert low.dtype == torch.float32
    assert (nn.functional.cosine_similarity(low, exact) > 0.998).all()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = pair_features(llama(), collate(pairs), 256, 3, **LOSS)
    assert (nn.functional.cosine_similarity(mixed, exact) > 0.998).all()


# --- manners ----------------------------------------------------------------------------------------------------------


def test_the_model_is_left_as_it_was() -> None:
    model, batch = llama(), collate(rows())
    model.model.norm.weight.requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    logits = model(batch["input_ids"]).logits
    with PairGradients(model, 64, 3) as gradients:
        first = gradients(batch, beta=0.1)
        assert torch.equal(first, gradients(batch, beta=0.1))
        assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(RuntimeError, match="mark"), PairGradients(model, 64, 3):
        raise RuntimeError("mark")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(model(batch["input_ids"]).logits, logits)


def test_equal_responses_have_no_gradient() -> None:
    pairs = rows(3)
    pairs[1]["rejected_ids"] = pairs[1]["chosen_ids"]
    found = pair_features(llama(), collate(pairs), 64, 3)
    assert found[1].norm() < 1e-6 * found[0].norm() and found[2].norm() > 1e-2 * found[0].norm()


def test_a_nan_stays_with_its_pair() -> None:
    """Token 4 has a NaN embedding; only the pairs that hold it may lose their features."""
    model, pairs = llama(), [p for p in rows(40, seed=2) if 4 not in sum(p.values(), [])][:5]
    pairs[2]["prompt_ids"] = [4, 5]
    with torch.no_grad():
        model.model.embed_tokens.weight[4] = float("nan")
    found = pair_features(model, collate(pairs), 64, 3)
    assert found.isfinite().all(dim=1).tolist() == [True, True, False, True, True]


def test_projections_keep_lengths_and_angles_on_average() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 20, 12), torch.randn(2, 20, 12)
    lengths, products = [], []
    for seed in range(400):
        p_out, p_in = projection(seed, "0.layer", (20, 12), 64)
        assert (p_out.shape, p_in.shape) == ((8, 20), (8, 12))
        pa, pb = ((p_out @ g @ p_in.T).flatten(1) for g in (a, b))
        lengths.append((pa * pa).sum(1) / (a * a).sum((1, 2)))
        products.append((pa * pb).sum(1) / (a * b).sum((1, 2)))
    assert torch.stack(lengths).mean(0).tolist() == pytest.approx([1.0, 1.0], abs=0.05)
    assert torch.stack(products).mean(0).tolist() == pytest.approx([1.0, 1.0], abs=0.4)


def test_projections_are_fixed_by_seed_name_and_shape() -> None:
    one = projection(3, "0.a", (20, 12), 30)
    assert (one[0].shape, one[1].shape) == ((5, 20), (6, 12))
    assert projection(3, "0.a", (20, 4), 30)[1].shape == (3, 4)
    assert projection(3, "0.a", (2, 2), 30)[0].shape == (5, 2)  # more dimensions than the layer has
    torch.testing.assert_close(projection(3, "0.a", (20, 12), 30), one, rtol=0, atol=0)
    assert not torch.equal(projection(4, "0.a", (20, 12), 30)[0], one[0])
    assert not torch.equal(projection(3, "0.b", (20, 12), 30)[0], one[0])
    assert torch.equal(projection(3, "0.b", (20, 12), 30)[1], one[1])
    assert not torch.equal(projection(3, "1.a", (20, 12), 30)[1], one[1])


def test_what_has_no_features() -> None:
    batch = collate(rows(2))
    with pytest.raises(ValueError, match="dim must be positive"):
        pair_features(llama(), batch, 0, 0)
    for layers in (0, 3):
        with pytest.raises(ValueError, match=r"layers must lie in \[1, 2\]"):
            pair_features(llama(), batch, 8, 0, layers=layers)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"no torch\.nn\.Linear"):
        pair_features(gpt2, batch, 8, 0)


def test_layers_that_mix_up_tokens_are_refused() -> None:
    model = llama()
    gate = model.model.layers[1].mlp.gate_proj
    model.model.layers[1].mlp.gate_proj = Routed(gate)
    with pytest.raises(ValueError, match=r"1\.mlp\.gate_proj\.expert gets tokens as \(\d+,\)"):
        pair_features(model, collate(rows(2)), 8, 0)


class Routed(nn.Module):
    """Calls its layer as an expert is called: with the tokens that were routed to it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.expert = layer

    def forward(self, x: Tensor) -> Tensor:
        flat: Tensor = self.expert(x.flatten(0, -2).flip(0)).flip(0)
        return flat.unflatten(0, x.shape[:-1])


def test_a_mixture_of_experts_has_features_of_what_is_not_routed() -> None:
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, pad_token_id=0)).eval()  # fmt: skip
    assert {name.split(".")[1] for name in linear_layers(model)} == {"self_attn"}
    pairs = rows(3)
    assert_equal(pair_features(model, collate(pairs), 16, 0, **LOSS), one_by_one(model, pairs, 16, 0, **LOSS))
