import math

import pytest
import torch

from selfplay import epsilon_dpo as maths


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


def test_perturbed_logps_are_those_of_the_mixed_logits():
    generator = torch.Generator().manual_seed(1)
    z, z_ref = torch.randn(2, maths.CHUNK_TOKENS + 7, 11, generator=generator, dtype=torch.float64).unbind()
    targets = torch.randint(0, 11, (len(z),), generator=generator)
    plus, minus = maths.perturbed_logps(z, z_ref, targets, 0.05)
    for got, mixed in ((plus, 1.05 * z - 0.05 * z_ref), (minus, 0.95 * z + 0.05 * z_ref)):
        wanted = mixed.log_softmax(-1).gather(-1, targets[:, None])[:, 0].float()
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert not plus.requires_grad


def test_equal_logits_give_no_step():
    """Policy and reference agree at the start of a round: not even rounding may then move β."""
    z = torch.randn(40, 300, generator=torch.Generator().manual_seed(2)) * 10
    targets = torch.arange(40)
    logp = maths.chosen_logps(z, targets)
    plus, minus = maths.perturbed_logps(z, z.clone(), targets, 0.01)
    assert torch.equal(plus, logp) and torch.equal(minus, logp)


def test_bf16_logits_are_mixed_in_fp32():
    """Mixed in bf16 (8 bits), a shift of ε(z − z_ref) ≈ 0.01 on a logit near 8 would vanish."""
    z = torch.full((1, 4), 8.0, dtype=torch.bfloat16)
    z_ref = z.clone()
    z_ref[0, 0] = 7.0
    plus, minus = maths.perturbed_logps(z, z_ref, torch.tensor([0]), 0.01)
    even = -math.log(4)
    assert plus.item() == pytest.approx(0.01 - math.log(3 + math.exp(0.01)), abs=1e-6)
    assert plus.item() > even > minus.item()


def test_chosen_logps_gradient():
    """∂ log p_t / ∂z = onehot − softmax."""
    z = torch.randn(3, 5, generator=torch.Generator().manual_seed(3), requires_grad=True)
    targets = torch.tensor([0, 4, 2])
    (gradient,) = torch.autograd.grad(maths.chosen_logps(z, targets).sum(), z)
    wanted = torch.nn.functional.one_hot(targets, 5) - z.detach().softmax(-1)
    torch.testing.assert_close(gradient, wanted)
