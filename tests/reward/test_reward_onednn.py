import os
import subprocess
import sys

import pytest
import torch
from mini import ROOT
from torch import nn

from reward import onednn

pytestmark = pytest.mark.service

MANY_SHAPES = """
import resource, sys
import torch
from reward import onednn
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 96), torch.nn.Linear(96, 64)).to(getattr(torch, sys.argv[1]))
onednn.take_over(model)
def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
with torch.inference_mode():
    model(torch.ones(1, 64, dtype=model[0].weight.dtype))
    before = peak_mib()
    for tokens in range(2, 300):
        model(torch.ones(tokens, 64, dtype=model[0].weight.dtype))
print(peak_mib() - before)
"""


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
    for shape in [(1, 24), (5, 7, 24), (256, 24), (3, 100, 24)]:
        x = torch.randn(shape)
        with torch.inference_mode():
            assert torch.allclose(own(x), usual(x), rtol=1e-5, atol=1e-6)
            assert torch.equal(own(x), own(x))
            if len(x) > 1:  # what else is in the batch changes no bit
                assert torch.equal(own[:3](torch.cat([x, x + 1]))[: len(x)], own[:3](x))


def test_a_model_of_another_precision_and_a_build_without_onednn_stay_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half = model().to(torch.bfloat16)
    assert not onednn.take_over(half)
    monkeypatch.setattr(onednn, "_product", lambda *_: torch.ops.mkldnn.no_such_thing)
    own = model()
    assert not onednn.take_over(own)
    assert {type(layer) for layer in [*half, *own]} == {nn.Linear, nn.GELU, Quantised}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batches_of_many_lengths_do_not_fill_the_memory_with_kernels(dtype: str) -> None:
    ours = {name: value for name, value in os.environ.items() if name not in onednn.FEW_KERNELS}
    done = subprocess.run(
        [sys.executable, "-c", MANY_SHAPES, dtype], cwd=ROOT, env=ours | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert float(done.stdout) < 64
