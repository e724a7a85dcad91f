"""Headers of safetensors files: bounded before anything reads them."""

import pytest

from selfplay.errors import CheckpointError
from selfplay.storage import tensors


def test_a_header_larger_than_that_of_any_model_is_not_read(tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:  # a file with a hole: it takes no room on the disk, and a header would all the same
        stream.write((tensors.LARGEST_HEADER + 1).to_bytes(8, "little") + b"{")
        stream.truncate(200 << 20)
    monkeypatch.setattr(tensors, "safe_open", lambda *_, **__: pytest.fail("it is opened"))
    with pytest.raises(CheckpointError, match="its header has 33554433 bytes, and none needs more"):
        tensors.specs(file)
