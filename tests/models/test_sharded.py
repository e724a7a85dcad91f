"""What two processes export of a model that they share are the files of the whole model's export."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mini import ROOT
from safetensors.torch import save_file

from selfplay.models import streamed
from selfplay.models.streamed import StreamedFiles


@pytest.mark.slow
def test_a_shared_model_is_exported_as_a_whole_one(tmp_path: Path) -> None:
    """Tied and untied, with an adapter, and with experts that are stored in another form; in float32 and in bfloat16."""
    script = str(ROOT / "tests" / "sharded_world.py")
    argv = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        script,
        str(tmp_path),
    ]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=280, env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert (done.returncode, "the same files" in done.stdout) == (0, True), done.stderr[-3000:]


def test_rows_are_written_in_any_order_to_the_files_of_safetensors(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(5, 3),
        "a": torch.randn(4).bfloat16(),
        "step": torch.tensor(7),
        "é/1": torch.randn(2, 2, 2).double(),
        "flags": torch.tensor([True, False, True]),
    }
    specs = {name: tensor.to("meta") for name, tensor in tensors.items()}
    with StreamedFiles(tmp_path, specs, 0) as files:
        for name, tensor in tensors.items():
            rows = tensor if tensor.dim() else tensor[None]
            for row in reversed(range(len(rows))):
                files.write(name, row, rows[row : row + 1])
    save_file(tensors, tmp_path / "whole", {"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "whole").read_bytes()
    assert streamed.LARGEST == "50GB", "that of transformers, so that others find the same files"
