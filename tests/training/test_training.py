"""The stage `train`, over a child that only answers as told."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
from fake_trainer import COLOCATED, FakeChild, World
from pairs_world import Told
from pydantic import TypeAdapter, ValidationError

from selfplay.config import TrainConfig
from selfplay.errors import Interrupted
from selfplay.storage import folders, hashes, policies, tables
from selfplay.training import service
from selfplay.training.gradients import gradients
from selfplay.training.jobs import STOP, FeaturesJob, TrainJob
from selfplay.training.stage import REPLAYED, TRAIN, train, warnings, words
from selfplay.types import Pair, Policy, Reference

QUIET = {"train/beta": 0.1, "train/beta_at_limit": 0.0, "train/chosen_drop": 49.0}


def test_a_quiet_step_warns_nobody() -> None:
    assert warnings(QUIET, TrainConfig()) == {}
    assert warnings({}, TrainConfig()) == {}


@pytest.mark.parametrize("limit", [50.0, 20.0, None])
def test_a_drop_of_the_chosen_is_a_warning_past_its_limit(limit: float | None) -> None:
    found = warnings(QUIET | {"train/chosen_drop": 50.5}, TrainConfig(max_chosen_drop=limit))
    assert set(found) == (set() if limit is None else {"chosen_drop"})
    if limit is not None:
        assert "lost 50.5 nats" in found["chosen_drop"] and f"is {limit:g}" in found["chosen_drop"]


def test_a_beta_at_its_limit_is_a_warning() -> None:
    found = warnings(QUIET | {"train/beta": 1e-4, "train/beta_at_limit": 1.0}, TrainConfig())
    assert set(found) == {"beta_at_limit"} and "0.0001" in found["beta_at_limit"]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., World]:
    monkeypatch.setattr(service, "Child", FakeChild)
    return lambda *settings: World(tmp_path, *settings)


# --- the stage ------------------------------------------------------------------------------------------------------


def policy(version: int, beta: float | None = None) -> Policy:
    return Policy(version=version, path=f"/p/{version}", parent=None, round=version, beta=beta, reference=None)


def reference(version: int | None) -> Reference:
    return Reference(version=version, path=f"/p/{version}", sha256="abc")


def trained(*steps: dict[str, Any], **changes: Any) -> Any:
    """An end of the order `train`: it tells its steps, exports a policy and answers."""

    def end(order: str, fields: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        assert order == "train"
        job = TrainJob(**fields["job"])
        for number, metrics in enumerate(steps, 1):
            tell({"step": number, "steps": len(steps), "metrics": metrics})
            if (job.work / STOP).is_file():
                return {"stopped": number}
        job.out.mkdir(parents=True)
        (job.out / "model.safetensors").write_bytes(b"weights")
        history = [{"step": i, **m} for i, m in enumerate(steps, 1)]
        return {
            "history": history, "steps": len(steps), "beta": 0.07, "agreement": {"mean": 1e-5, "p99": 1e-4, "tokens": 9},
            "canaries": [-1.5], "update": {"share_changed": 0.9, "relative_norm": 0.01},
            "seconds": {"load": 1.0, "train": 2.0, "export": 3.0}, **changes,
        }  # fmt: skip

    return end


def stage(w: World, out: Path, **changes: Any) -> tuple[dict[str, float], list[str], str]:
    out.mkdir(parents=True)
    warned: list[str] = []
    line = Told()
    given: dict[str, Any] = {
        "trainer": w.trainer, "pairs": out / "none.parquet", "earlier": [], "work": out.parent / "train.work",
        "policy": policy(3), "reference": reference(3), "initial": policy(0), "version": 4, "beta": 0.1, "canary_ids": [[1, 2]], "packages": {"trl": "1"}, "config": w.config, "seed": 11, "meanwhile": lambda: None,
        "breathe": lambda where: None, "warn": warned.append,
    }  # fmt: skip
    metrics = train(out, line, **{**given, **changes})
    assert all((out / name).is_file() for name in TRAIN.writes)
    return metrics, warned, line.text


STEPS = [
    {"train/loss": 0.7, "train/beta": 0.09, "train/epsilon_zero": 1.0},
    {"train/loss": 0.5, "train/beta": 0.07, "train/epsilon_zero": None, "train/chosen_drop": 2.0},
]


def test_a_trained_policy_lies_in_the_folder_with_its_manifest_and_its_history(world: Any, tmp_path: Path) -> None:
    w = world().ends(trained(*STEPS))
    out = tmp_path / "train"
    metrics, warned, said = stage(w, out)
    manifest = policies.read(out / "policy")
    assert (manifest.version, manifest.parent, manifest.round, manifest.reference) == (4, 3, 4, 3)
    assert (manifest.beta, manifest.reference_sha256, manifest.packages) == (0.07, "abc", {"trl": "1"})
    assert manifest.files == {"model.safetensors": hashes.sha256(out / "policy" / "model.safetensors")}
    assert manifest.canaries == {"token_ids": [[1, 2]], "logps": [-1.5]}
    assert [step["train/loss"] for step in folders.read_json(out / "history.json")] == [0.7, 0.5]
    # the mean of a metric is over the steps that have it
    assert (metrics["loss"], metrics["last_loss"], metrics["epsilon_zero"]) == (pytest.approx(0.6), 0.5, 1.0)
    assert (metrics["beta_start"], metrics["beta"], metrics["steps"], metrics["chosen_drop"]) == (0.1, 0.07, 2, 2.0)
    assert (metrics["agreement_mean"], metrics["seconds_train"], "agreement_tokens" in metrics) == (1e-5, 2.0, False)
    assert warned == [] and said == "β 0.1 → 0.07, update 1.00e-02"


def test_the_job_follows_the_configuration_and_is_checked_only_against_a_reference_that_sampled(
    world: Any, tmp_path: Path
) -> None:
    jobs: list[dict[str, Any]] = []

    def end(order: str, fields: dict[str, Any], tell: Any) -> Any:
        jobs.append(fields["job"])
        return trained(*STEPS)(order, fields, tell)

    w = world("train.agreement_pairs=7", "policy.dtype=bfloat16", "train.epsilon=0.02").ends(end, end)
    stage(w, tmp_path / "one")
    stage(w, tmp_path / "two", reference=reference(1))
    assert [job["agreement_pairs"] for job in jobs] == [7, 7]
    assert (jobs[0]["agreement_mean"], jobs[0]["agreement_p99"]) == (5e-2, 2.5e-1)
    assert (jobs[1]["agreement_mean"], jobs[1]["agreement_p99"]) == (None, None)
    assert (jobs[0]["policy"], jobs[1]["reference"], jobs[1]["initial"]) == ("/p/3", "/p/1", "/p/0")
    assert (jobs[0]["seed"], jobs[0]["beta"], jobs[0]["epsilon"]) == (11, 0.1, 0.02)


def pairs_of(path: Path, index: int, count: int) -> Path:
    """A file of pairs as a round trained on them."""
    rows = [
        Pair(
            prompt_id=f"r{index}p{i}", chosen_index=0, rejected_index=1, chosen_reward=1.0, rejected_reward=0.0,
            chosen_logp=-1.0 - index, rejected_logp=-2.0, explicit_margin=1.0, implicit_margin=0.5, implicit_signed=0.5,
            prompt_ids=[1], chosen="a", rejected="b", chosen_ids=[5, 2], rejected_ids=[6, 2],
        )
        for i in range(count)
    ]  # fmt: skip
    tables.write_rows(path, rows, Pair)
    return path


def test_pairs_of_earlier_rounds_are_trained_on_again_the_same_ones_at_every_start(world: Any, tmp_path: Path) -> None:
    jobs: list[TrainJob] = []

    def end(order: str, fields: dict[str, Any], tell: Any) -> Any:
        jobs.append(TrainJob(**fields["job"]))
        return trained(*STEPS)(order, fields, tell)

    w = world("train.replay=0.25").ends(end, end, end, end)
    own = pairs_of(tmp_path / "own.parquet", 3, 40)
    earlier = [pairs_of(tmp_path / f"{i}.parquet", i, 300) for i in (1, 2)]
    found, _, _ = stage(w, tmp_path / "one", pairs=own, earlier=earlier)
    assert found["replayed"] == 10 and jobs[0].pairs == own
    written = tables.read_rows(tmp_path / "one" / REPLAYED, Pair)
    assert jobs[0].replayed == tmp_path / "one" / REPLAYED and len({p.prompt_id for p in written}) == 10
    assert {p.prompt_id[:2] for p in written} == {"r1", "r2"}  # by the seed of this test
    assert all(p.chosen_logp == -1.0 - int(p.prompt_id[1]) for p in written)
    stage(w, tmp_path / "two", pairs=own, earlier=earlier)
    assert (tmp_path / "two" / REPLAYED).read_bytes() == (tmp_path / "one" / REPLAYED).read_bytes()
    stage(w, tmp_path / "other", pairs=own, earlier=earlier, seed=12)
    assert tables.read_rows(tmp_path / "other" / REPLAYED, Pair) != written
    found, _, _ = stage(w, tmp_path / "first", pairs=own, earlier=[])
    assert found["replayed"] == 0 and jobs[-1].replayed is None and not (tmp_path / "first" / REPLAYED).exists()


def test_an_average_of_policies_is_a_reference_that_no_generator_sampled_from(world: Any, tmp_path: Path) -> None:
    jobs: list[TrainJob] = []

    def end(order: str, fields: dict[str, Any], tell: Any) -> Any:
        jobs.append(TrainJob(**fields["job"]))
        return trained(*STEPS)(order, fields, tell)

    stage(world("train.reference={ema: 0.6}").ends(end), tmp_path / "train", reference=reference(None))
    manifest = policies.read(tmp_path / "train" / "policy")
    assert (manifest.reference, manifest.reference_sha256) == (None, "abc")
    assert (jobs[0].agreement_mean, jobs[0].agreement_p99) == (None, None)


def test_a_long_step_tells_where_it_is_and_how_long_it_will_take() -> None:
    pace = {"tokens_per_second": 1234.4, "seconds_left": 185.0}
    assert (
        words({}, {"micro_batch": 12, "micro_batches": 64, **pace})
        == "micro-batch 12 of 64, 1,234 tokens/s, 3 min left"
    )
    assert words({"train/loss": 0.5, "train/beta": 0.1}, pace) == "loss 0.500, β 0.1, 1,234 tokens/s, 3 min left"
    assert words({}, {"compared": 8, "to_compare": 256}) == "compares itself with the engine: 8 of 256 pairs"
    assert words({"train/loss": None}, {}) == ""


def test_the_stage_shows_what_it_waits_for_and_then_the_micro_batches(world: Any, tmp_path: Path) -> None:
    shown: list[str] = []

    def end(order: str, fields: dict[str, Any], tell: Any) -> Any:
        shown.append(line.text)
        tell({"step": 0, "steps": 2, "metrics": {}, "pace": {"micro_batch": 1, "micro_batches": 8}})
        shown.append(line.text)
        return trained(*STEPS)(order, fields, tell)

    line = Told()
    w = world().ends(end)
    out = tmp_path / "train"
    out.mkdir()
    train(
        out, line, trainer=w.trainer, pairs=out / "none.parquet", earlier=[], work=tmp_path / "train.work", policy=policy(3),
        reference=reference(3), initial=policy(0), version=4, beta=0.1, canary_ids=[[1, 2]], packages={}, config=w.config,
        seed=11, meanwhile=lambda: None, breathe=lambda where: None, warn=lambda text: None,
    )  # fmt: skip
    assert shown == ["waits for the trainer", "micro-batch 1 of 8"]


def test_what_a_person_should_know_of_a_step_is_told_once_a_round(world: Any, tmp_path: Path) -> None:
    limit = {"train/beta": 1e-4, "train/beta_at_limit": 1.0}
    w = world().ends(trained(QUIET, limit, limit | {"train/chosen_drop": 99.0}, limit))
    _, warned, _ = stage(w, tmp_path / "train")
    assert [text.split(":")[0] for text in warned] == ["training step 2", "training step 3"]


def test_a_stop_waits_for_the_trainers_save(world: Any, tmp_path: Path) -> None:
    """Asked at a step, or by what the engine does meanwhile: the trainer is told by a file, and the stop goes on after it."""
    for name in ("breathe", "meanwhile"):
        stop = Interrupted("stop after this step")

        def interrupt(*where: str, stop: Interrupted = stop) -> None:
            raise stop

        w = world().ends(trained(*STEPS))
        with pytest.raises(Interrupted) as found:
            stage(w, tmp_path / name / "train", **{name: interrupt})
        assert found.value is stop
        assert (tmp_path / name / "train.work" / STOP).is_file()
        assert not (tmp_path / name / "train" / "policy").exists()


def test_a_stop_at_once_waits_for_nothing(world: Any, tmp_path: Path) -> None:
    w = world().ends(trained(*STEPS))

    def interrupt(where: str) -> None:
        raise Interrupted("now", now=True)

    with pytest.raises(Interrupted):
        stage(w, tmp_path / "train", breathe=interrupt)
    assert not (tmp_path / "train.work" / STOP).exists()


def test_gradients_of_the_kept_pairs_leave_the_trainer_to_the_training(world: Any, tmp_path: Path) -> None:
    """25 kept pairs are put into 5 clusters; a number that is none is NaN."""
    jobs: list[FeaturesJob] = []
    line = Told()

    def end(order: str, fields: dict[str, Any], tell: Any) -> Any:
        jobs.append(FeaturesJob(**fields["job"]))
        tell({"done": 10})
        return {"clusters": 5, "closeness": None}

    w = world(*COLOCATED, "depth.method=gradient").ends(end)
    found = gradients(
        tmp_path / "out.parquet", 25, line, trainer=w.trainer, pairs=tmp_path / "pairs.parquet", policy=policy(2),
        reference=reference(1), beta=0.2, config=w.config, seed=3, meanwhile=lambda: w.log.append("engine works"),
        breathe=lambda where: None,
    )  # fmt: skip
    assert found["clusters"] == 5 and found["closeness"] != found["closeness"]
    assert (jobs[0].clusters, jobs[0].policy, jobs[0].reference, jobs[0].beta) == (5, Path("/p/2"), Path("/p/1"), 0.2)
    assert w.log == ["engine works", "engine sleeps", "start", "send features"]  # it goes on with the training
    assert line.text == "gradients of 10 of 25 base pairs"


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
    assert "warmup_ratio" in numbers and "beta" in numbers and "agreement_pairs" in numbers
    for name in numbers:
        for value in (-1, 0, 1e-6, 0.4, 0.5, 0.99, 1, 2, 1_000_000, None):
            assert not takes(TrainConfig, name, value) or takes(TrainJob, name, value), (name, value)
