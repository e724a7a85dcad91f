from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import pytest
from pydantic import TypeAdapter, ValidationError
from selfplay.training.orders import TRAINER_STARTS, alarms, order

from selfplay.config import TrainConfig
from selfplay.errors import TrainError
from selfplay.processes.child import ChildDied, ChildError
from selfplay.training.jobs import CanaryJob, TrainJob

QUIET = {"train/beta": 0.1, "train/beta_at_limit": 0.0, "train/chosen_drop": 49.0}


def test_a_quiet_step_alarms_nobody() -> None:
    assert alarms(QUIET, TrainConfig()) == {}
    assert alarms({}, TrainConfig()) == {}


@pytest.mark.parametrize("limit", [50.0, 20.0, None])
def test_a_drop_of_the_chosen_alarms_past_its_limit(limit: float | None) -> None:
    found = alarms(QUIET | {"train/chosen_drop": 50.5}, TrainConfig(max_chosen_drop=limit))
    assert set(found) == (set() if limit is None else {"chosen_drop"})
    if limit is not None:
        assert "lost 50.5 nats" in found["chosen_drop"] and f"is {limit:g}" in found["chosen_drop"]


def test_a_beta_at_its_limit_alarms() -> None:
    found = alarms(QUIET | {"train/beta": 1e-4, "train/beta_at_limit": 1.0}, TrainConfig())
    assert set(found) == {"beta_at_limit"} and "0.0001" in found["beta_at_limit"]


class Trainer:
    """Stands in for a run whose trainer ends as told: a result, or an exception, for each order."""

    def __init__(self, *ends: object) -> None:
        self.ends, self.events, self.living = list(ends), [], False
        self.config = SimpleNamespace(placement=SimpleNamespace(colocated=False))
        self.run = self

    def trainer(self) -> "Trainer":
        if self.living:
            self.event("trainer_restart", "died while it waited")
        self.living = True
        return self

    def stop_trainer(self) -> None:
        self.living = False

    def event(self, kind: str, text: str) -> None:
        self.events.append((kind, text))

    def send(self, name: str, job: object) -> int:
        return 1

    def result(self, number: int, on_progress: object) -> object:
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end


JOB = CanaryJob(policy=Path("p"), canary_ids=[])


def test_a_trainer_that_dies_is_started_once_more_and_told_once(tmp_path: Path) -> None:
    log = tmp_path / "trainer.log"
    log.write_text("loading\nout of patience\n")
    died = ChildDied("trainer", "was killed by SIGKILL", log)
    r = Trainer(died, {"steps": 3})
    assert order(r, "canaries", JOB) == {"steps": 3}  # type: ignore[arg-type]
    assert [kind for kind, _ in r.events] == ["trainer_restart"]
    assert "resumes from its last save" in r.events[0][1]
    with pytest.raises(TrainError, match=r"SIGKILL; the last it said: out of patience") as error:
        order(Trainer(*[died] * TRAINER_STARTS), "canaries", JOB)  # type: ignore[arg-type]
    assert error.value.kind == "died" and "same command" in error.value.hint


def test_an_order_that_fails_is_no_reason_for_a_second_try(tmp_path: Path) -> None:
    r = Trainer(ChildError("trainer", "oom", "out of memory: 3 GiB", "lower micro_batch_pairs", tmp_path / "x"), {})
    with pytest.raises(TrainError, match="out of memory") as error:
        order(r, "canaries", JOB)  # type: ignore[arg-type]
    assert (error.value.kind, error.value.hint, r.events) == ("oom", "lower micro_batch_pairs", [])


def test_what_the_configuration_takes_the_trainers_job_takes() -> None:
    """Otherwise it would be refused after a round has sampled."""

    def takes(model: Any, name: str, value: object) -> bool:
        field = model.model_fields[name]
        try:
            TypeAdapter(Annotated[field.annotation, field]).validate_python(value)
        except ValidationError:
            return False
        return True

    numbers = [n for n, f in TrainConfig.model_fields.items() if n in TrainJob.model_fields and n != "lora"]
    assert "warmup_ratio" in numbers and "beta" in numbers
    for name in numbers:
        for value in (-1, 0, 1e-6, 0.4, 0.5, 0.99, 1, 2, 1_000_000, None):
            assert not takes(TrainConfig, name, value) or takes(TrainJob, name, value), (name, value)
