import pytest
import torch
from torch import nn

from reward import onednn


class Quantised(nn.Linear):
    """Stands for a layer that computes in a way of its own."""


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 40, bias=False), Quantised(40, 1)).eval()


@pytest.mark.skipif(not onednn._works(), reason="this build of PyTorch has no oneDNN")
def test_products_are_the_same_but_for_rounding() -> None:
    own, usual = model(), model()
    assert onednn.take_over(own)
    assert [type(layer) for layer in own] == [onednn.Linear, nn.GELU, onednn.Linear, Quantised]
    for shape in [(1, 24), (3, 24), (5, 7, 24)]:
        x = torch.randn(shape)
        with torch.inference_mode():
            assert torch.allclose(own(x), usual(x), rtol=1e-5, atol=1e-6)
            assert torch.equal(own(x), own(x))


def test_a_model_of_another_precision_and_a_build_without_onednn_stay_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half = model().to(torch.bfloat16)
    assert not onednn.take_over(half)
    monkeypatch.setattr(onednn, "_product", lambda *_: torch.ops.mkldnn.no_such_thing)
    own = model()
    assert not onednn.take_over(own)
    assert {type(layer) for layer in [*half, *own]} == {nn.Linear, nn.GELU, Quantised}
