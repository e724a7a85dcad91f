"""How β moves, and that a resumed training goes on with it."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from epsilon_dpo_world import Recording, config, make, model, pairs, tokenizer, weights_of

from selfplay.training.epsilon_dpo import STATE_FILE

pytestmark = pytest.mark.service


def test_beta_moves_once_an_optimizer_step_by_the_mean_of_all_its_pairs(tmp_path: Path) -> None:
    """20 pairs in micro-batches of 4, two a step: 8, 8 and 4 pairs."""
    trainer = make(tmp_path, data=pairs(20), num_train_epochs=1)
    trainer.train()
    groups = [trainer.steps[0:2], trainer.steps[2:4], trainer.steps[4:]]
    assert trainer.used == [trainer.used[i] for i in (0, 0, 2, 2, 4)]
    beta, wanted = 0.1, []
    for group in groups:
        s = [one for micro in group for one in micro]
        beta = beta / (1 + 0.1 * sum(s) / len(s))
        wanted.append(beta)
    assert trainer.betas == pytest.approx(wanted, rel=1e-9)
    assert len(set(wanted)) > 1
    logged = trainer.state.log_history[:3]
    assert [log["beta"] for log in logged] == pytest.approx(wanted, rel=1e-9)
    assert [log["epsilon/up"] for log in logged] == [np.mean(np.concatenate(group) == 1) for group in groups]


def test_a_skipped_optimizer_step_leaves_beta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(tmp_path, num_train_epochs=1)
    monkeypatch.setattr(
        Accelerator, "optimizer_step_was_skipped", property(lambda self: trainer.state.global_step == 0)
    )
    trainer.train()
    assert trainer.betas[0] == 0.1
    s = [*trainer.steps[2], *trainer.steps[3]]
    assert trainer.betas[1] == pytest.approx(0.1 / (1 + 0.1 * sum(s) / len(s)))


def test_evaluation_touches_neither_steps_nor_beta(tmp_path: Path) -> None:
    plain = make(tmp_path)
    plain.train()
    evaluated = Recording(
        model(), model(7), args=config(tmp_path, eval_strategy="steps", eval_steps=1), train_dataset=pairs(),
        eval_dataset=pairs(6, seed=1), processing_class=tokenizer(),
    )  # fmt: skip
    before = evaluated.evaluate()
    assert evaluated.beta == 0.1 and before["eval_loss"] > 0 and "eval_epsilon/up" in before
    evaluated.train()
    assert evaluated.betas == plain.betas


def test_beta_stays_within_its_limits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    free = make(tmp_path)
    free.train()
    limit = (min(free.betas) + 0.1) / 2
    with caplog.at_level(logging.WARNING, logger="selfplay.training.epsilon_dpo"):
        limited = make(tmp_path, beta_min=limit, beta_max=0.1)
        limited.train()
    assert all(limit <= beta <= 0.1 for beta in limited.betas)
    assert any(log["beta_at_limit"] == 1 for log in limited.state.log_history[:-1])
    assert "held at" in caplog.text


def test_a_resumed_run_ends_with_the_same_bytes_and_beta(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole", save_strategy="steps", save_steps=1)
    whole.train()
    saved = [json.loads((tmp_path / f"whole/checkpoint-{i}" / STATE_FILE).read_text())["beta"] for i in (1, 2, 3, 4)]
    assert saved == whole.betas and len(set(saved)) > 1
    for i in (1, 2, 3):  # within an epoch and at its end
        resumed = make(tmp_path / "again")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"whole/checkpoint-{i}"))
        assert resumed.beta == whole.beta
        assert all(torch.equal(weights_of(whole)[name], tensor) for name, tensor in weights_of(resumed).items())
    last = make(tmp_path / "whole")
    last.train(resume_from_checkpoint=True)
    assert last.beta == whole.beta and last.losses == []


def test_a_checkpoint_without_beta_is_refused(tmp_path: Path) -> None:
    trainer = make(tmp_path, save_strategy="steps", save_steps=1, max_steps=1)
    trainer.train()
    (tmp_path / "checkpoint-1" / STATE_FILE).unlink()
    with pytest.raises(ValueError, match="not whole"):
        make(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="no checkpoint"):
        make(tmp_path / "empty").train(resume_from_checkpoint=True)
