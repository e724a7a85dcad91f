"""Tokenizer, templates and generation settings come from the initial policy, and go into every policy that is made."""

import pytest
from steps_world import LINE, Opened
from test_policies import checkpoint, export

from selfplay.errors import CheckpointError
from selfplay.rounds.steps import Steps
from selfplay.storage.policies import Policies

FILES = ("tokenizer.json", "generation_config.json", "additional_chat_templates/short.jinja")


@pytest.fixture
def run(tmp_path):
    """A run in its second round, which policy 1 was the champion of."""
    source = checkpoint(tmp_path / "source")
    for name in FILES:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
    run = Opened(tmp_path / "run", "train.reference=previous")
    run.trainer, run.policies = None, Policies(run.dir)
    run.policies.import_initial(source, {}, "f", {})
    run.policies.adopt(1, export(tmp_path / "exported", 1))
    for index, champion in ((1, 0), (2, 1)):
        run.store.open_round(index, champion, (0, 0), "f", {})
    return run


@pytest.mark.parametrize("name", FILES)
def test_one_that_has_changed_is_neither_trained_on_nor_rendered_with(run, tmp_path, name):
    assert run.tokenizer["policy"] == str(tmp_path / "source")
    (tmp_path / "source" / name).write_text("{ }")
    with pytest.raises(CheckpointError, match=f"{name} is not what its manifest says"):
        Steps(run, 2, 1).train(tmp_path / "out", LINE)
    with pytest.raises(CheckpointError, match=f"{name} is not what its manifest says"):
        run.tokenizer  # noqa: B018


def test_weights_are_not_read_for_them(run, tmp_path):
    (tmp_path / "source" / "model.safetensors").write_bytes(b"")
    assert run.policies.tokenizing(0).path == str(tmp_path / "source")
