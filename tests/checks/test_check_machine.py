"""Looks at the processor."""

import pytest
from check_world import model, settings

from selfplay.checks import machine

FLAGS = "processor: 0\nflags: fpu sse2 avx2{}\n"


@pytest.mark.parametrize(
    ("flag", "sets", "named"),
    [
        ("", ["policy.dtype=bfloat16", "train.bf16=true"], "set policy.dtype: float32 and train.bf16: false"),
        ("", ["policy.dtype=bfloat16"], "set policy.dtype: float32"),
        ("", ["policy.dtype=float32"], None),
        (" avx512_bf16", ["policy.dtype=bfloat16", "train.bf16=true"], None),
        (" amx_bf16", ["policy.dtype=bfloat16"], None),
    ],
)
def test_a_processor_that_does_not_compute_in_bfloat16_is_told(tmp_path, monkeypatch, flag, sets, named):
    (tmp_path / "cpuinfo").write_text(FLAGS.format(flag))
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    config = settings(tmp_path, model(tmp_path / "model"), *sets)
    found = [(finding.level, finding.text) for finding in machine.precision(config, tmp_path)]
    assert [level for level, _ in found] == ["warning"] * (named is not None)
    assert all(text.endswith(named) for _, text in found)
    monkeypatch.setattr(machine.shutil, "which", lambda name: f"/usr/bin/{name}")  # GPUs do
    assert list(machine.precision(config, tmp_path)) == []
