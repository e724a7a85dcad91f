import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from largest import Largest
from plain_epsilon_dpo import plain_logps
from torch import Tensor

from selfplay.methods import epsilon_dpo as maths
from selfplay.methods.tiles import Tile


def test_steps_need_a_strict_monotone_order():
    q = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, math.nan])
    plus = torch.tensor([2.0, 0.0, 2.0, 1.0, 2.0, 2.0])
    minus = torch.tensor([0.0, 2.0, 2.0, 0.0, 1.0, 0.0])
    steps = maths.epsilon_steps(q, plus, minus)
    assert steps.tolist() == [1, -1, 0, 0, 0, 0]
    assert not steps.is_floating_point()


def test_steps_do_not_depend_on_a_common_offset():
    q, plus, minus = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).unbind()
    assert torch.equal(maths.epsilon_steps(q, plus, minus), maths.epsilon_steps(q * 0, plus - q, minus - q))


def test_next_beta_by_hand():
    """0.1 / (1 + 0.05 · 0.5) = 0.1 / 1.025; a mean step of 0 or an ε of 0 leaves it."""
    assert maths.next_beta(0.1, 0.5, 0.05) == pytest.approx(0.0975609756, rel=1e-9)
    assert maths.next_beta(0.1, -1.0, 0.05) == pytest.approx(0.1 / 0.95)
    assert maths.next_beta(0.1, 0.0, 0.05) == 0.1
    assert maths.next_beta(0.1, 1.0, 0.0) == 0.1


def test_pair_betas_by_hand():
    betas = maths.pair_betas(0.1, torch.tensor([1, 0, -1]), 0.25)
    assert betas.tolist() == pytest.approx([0.08, 0.1, 0.1 / 0.75])


def test_loss_with_label_smoothing_by_hand():
    """u = 0.5 · 2 = 1: −log σ(1) = 0.3132617, −log σ(−1) = 1.3132617; λ = 0.1 mixes 0.9 and 0.1 of them."""
    margins, betas = torch.tensor([2.0]), torch.tensor([0.5])
    assert maths.pair_losses(margins, betas).item() == pytest.approx(0.3132617, rel=1e-6)
    assert maths.pair_losses(margins, betas, 0.1).item() == pytest.approx(0.9 * 0.3132617 + 0.1 * 1.3132617, rel=1e-6)


def test_chosen_logps_gradient():
    """∂ log p_t / ∂z = onehot − softmax."""
    z = torch.randn(3, 5, generator=torch.Generator().manual_seed(3), requires_grad=True)
    targets = torch.tensor([0, 4, 2])
    (gradient,) = torch.autograd.grad(maths.chosen_logps(z, targets).sum(), z)
    wanted = torch.nn.functional.one_hot(targets, 5) - z.detach().softmax(-1)
    torch.testing.assert_close(gradient, wanted)


def test_chosen_drop_is_what_both_sides_have_lost():
    """Means of the two steps: chosen −3, rejected −7, so both lie 3 nats or more below; one that rises clears it."""
    assert maths.chosen_drop([[-2.0, -6.0], [-4.0, -8.0]]) == 3.0
    assert maths.chosen_drop([[-4.0, -1.0]]) == 1.0
    assert maths.chosen_drop([[1.0, -50.0]]) == 0.0


# --- from hidden states -----------------------------------------------------------------------------------------------

SMALL = Tile(tokens=7, words=11)  # several of them, none full at the end


def case(n: int = 40, words: int = 57, width: int = 16, apart: float = 0.1, bias: bool = False) -> dict[str, Any]:
    """Arguments of `fused_logps`: a policy and, `apart` from it, a reference."""
    generator = torch.Generator().manual_seed(n * words)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    hidden, weight, offset = normal(n, width), normal(words, width) * 0.5, normal(words)
    arguments = {
        "hidden": hidden, "weight": weight, "ref_hidden": hidden + apart * normal(n, width),
        "ref_weight": weight + apart * 0.5 * normal(words, width),
        "targets": torch.randint(0, words, (n,), generator=generator),
    }  # fmt: skip
    if bias:
        arguments |= {"bias": offset, "ref_bias": offset + apart * normal(words)}
    return arguments


def with_gradients(function: Callable[..., Any], arguments: dict[str, Any], **more: Any) -> tuple[Any, list[Tensor]]:
    """What `function` gives, and the gradients of Σ c·log π to hidden, weight and bias, c irregular."""
    leaves = {
        name: arguments[name].clone().requires_grad_() for name in ("hidden", "weight", "bias") if name in arguments
    }
    out = function(**(arguments | leaves), **more)
    factors = torch.linspace(-2, 3, len(out[0]), dtype=out[0].dtype, device=out[0].device)
    (out[0] * factors).sum().backward()
    return out, [leaf.grad for leaf in leaves.values()]


def doubled(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: t.double() if t.is_floating_point() else t for name, t in arguments.items()}


@pytest.mark.parametrize("epsilon", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("tile", [None, SMALL], ids=["one tile", "many tiles"])
@pytest.mark.parametrize(
    "options", [{}, {"bias": True}, {"logit_scale": 0.3, "softcap": 4.0, "bias": True}], ids=["bare", "bias", "capped"]
)
def test_fused_logps_equal_the_plain_ones(epsilon: float, tile: Tile | None, options: dict[str, Any]) -> None:
    arguments = case(bias=options.get("bias", False))
    options = {name: value for name, value in options.items() if name != "bias"} | {"epsilon": epsilon}
    got, gradients = with_gradients(maths.fused_logps, arguments, tile=tile, **options)
    wanted, exact = with_gradients(plain_logps, doubled(arguments), **options)
    for ours, theirs in zip([*got, *gradients], [*wanted, *exact], strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    assert [one.requires_grad for one in got] == [True, False, False, False]


def test_shifts_are_exact_where_differences_of_logps_are_noise() -> None:
    """A policy one small step from its reference: |log π⁺ − log π| ≈ 1e-6, below the rounding of log π itself."""
    arguments = case(n=300, words=5000, width=64, apart=1e-4)
    _, _, plus, minus = maths.fused_shifts(**arguments, epsilon=0.01)
    logp, _, exact_plus, exact_minus = plain_logps(**doubled(arguments), epsilon=0.01)
    rounded = plain_logps(**arguments, epsilon=0.01)
    for ours, exact, theirs in ((plus, exact_plus, rounded[2]), (minus, exact_minus, rounded[3])):
        size = (exact - logp).abs().mean()
        assert (ours - (exact - logp)).abs().mean() < 0.01 * size
        assert (theirs - rounded[0] - (exact - logp)).abs().mean() > 0.1 * size


@pytest.mark.parametrize("apart", [3.0, 100.0])
def test_shifts_too_wide_for_expm1(apart: float) -> None:
    """ε·|z − z_ref| from 2 to 1000 nats: the sums would cancel, then overflow."""
    arguments = case(apart=apart)
    got = maths.fused_shifts(**arguments, epsilon=0.9, tile=SMALL)
    wanted = plain_logps(**doubled(arguments), epsilon=0.9)
    assert (wanted[2] - wanted[0]).abs().max() > 2
    for ours, theirs in zip(got[2:], wanted[2:], strict=True):
        torch.testing.assert_close(ours.double(), theirs - wanted[0], rtol=1e-5, atol=1e-5 * max(1.0, apart))


def test_equal_models_give_no_step() -> None:
    """Policy and reference agree at the start of a round: not even rounding may then move β."""
    arguments = case(apart=0.0)
    _, _, plus, minus = maths.fused_shifts(**arguments, epsilon=0.01, tile=SMALL)
    assert not plus.any() and not minus.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_are_multiplied_as_they_are_and_summed_in_float32(dtype: torch.dtype) -> None:
    arguments = {name: t.to(dtype) if t.is_floating_point() else t for name, t in case(bias=True).items()}
    got, gradients = with_gradients(maths.fused_logps, arguments, epsilon=0.01, tile=SMALL)
    wanted, exact = with_gradients(plain_logps, doubled(arguments), epsilon=0.01)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients, exact, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


def test_under_autocast_products_are_in_its_dtype() -> None:
    arguments = case()
    lowered = {name: t.bfloat16() if t.is_floating_point() else t for name, t in arguments.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, gradients = with_gradients(maths.fused_logps, arguments, epsilon=0.01)
    wanted, exact = with_gradients(maths.fused_logps, lowered, epsilon=0.01)
    for ours, theirs in zip([*got, *gradients], [*wanted, *exact], strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-2, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("epsilon", "tiles"), [(0.1, 3), (0.0, 2)])
def test_logits_never_exist_whole(epsilon: float, tiles: int) -> None:
    arguments = case(n=400, words=600, width=4)
    with Largest() as largest:
        with_gradients(maths.fused_logps, arguments, epsilon=epsilon, tile=Tile(50, 60))
    assert largest.elements == tiles * 50 * 60 < 400 * 600 / 20  # and more than the gradient of the weight


def test_a_frozen_head_gets_no_gradient_and_costs_none() -> None:
    arguments = case(n=20, words=600, width=50)
    (*_, exact) = with_gradients(plain_logps, arguments, epsilon=0.1)[1][:1]
    hidden = arguments["hidden"].clone().requires_grad_()
    with Largest() as largest:
        logp = maths.fused_logps(**arguments | {"hidden": hidden}, epsilon=0.1, tile=Tile(20, 60))[0]
        (logp * torch.linspace(-2, 3, 20)).sum().backward()
    torch.testing.assert_close(hidden.grad, exact, rtol=1e-5, atol=1e-5)
    assert largest.elements < 600 * 50


def test_no_tokens_give_zero_gradients() -> None:
    got, gradients = with_gradients(maths.fused_logps, case(n=0, bias=True), epsilon=0.1)
    assert [len(one) for one in got] == [0] * 4
    assert not any(gradient.any() for gradient in gradients)


def test_lean_logps_are_those_of_one_model() -> None:
    arguments = case(bias=True)
    own = {name: arguments[name] for name in ("hidden", "weight", "targets", "bias")}
    got, gradients = with_gradients(lambda **a: [maths.lean_logps(**a, softcap=3.0, tile=SMALL)], own)
    wanted, exact = with_gradients(plain_logps, doubled(arguments), epsilon=0.0, softcap=3.0)
    for ours, theirs in zip([*got, *gradients], [wanted[0], *exact], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_compared_is_refused() -> None:
    arguments = case()
    with pytest.raises(ValueError, match="57 words and the reference 56"):
        maths.fused_logps(**arguments | {"ref_weight": arguments["ref_weight"][1:]}, epsilon=0.1)
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        maths.fused_logps(**arguments, epsilon=1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_it_gives_what_the_cpu_gives(dtype: torch.dtype) -> None:
    arguments = {name: t.to(dtype) if t.is_floating_point() else t for name, t in case(bias=True).items()}
    there = {name: t.cuda() for name, t in arguments.items()}
    got, gradients = with_gradients(maths.fused_shifts, there, epsilon=0.01, tile=SMALL)
    wanted, exact = with_gradients(maths.fused_shifts, arguments, epsilon=0.01, tile=SMALL)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients, exact, strict=True):
        rounding = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours.cpu(), theirs, rtol=rounding, atol=rounding)
