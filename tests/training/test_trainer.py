import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from storage_world import flip
from trainer_world import CANARIES, bytes_of, checkpoint, job_of, run, write_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfplay.errors import TrainError
from selfplay.models.kept import Kept
from selfplay.models.weights import sequence_logps
from selfplay.storage import seals
from selfplay.training import pace
from selfplay.training.blend_job import blend
from selfplay.training.jobs import BlendJob, LoraJob
from selfplay.training.train_job import train

pytestmark = pytest.mark.service


# --- a job ----------------------------------------------------------------------------------------------------------


def test_full_training_exports_a_plain_policy(world: Path, tmp_path: Path) -> None:
    result, seen = run(job_of(world, tmp_path))
    assert (
        seen == [(0, 9)] * 6 + [(i, 9) for i in range(1, 10)] and result["steps"] == 9
    )  # the agreement check: 6 batches
    assert [entry["step"] for entry in result["history"]] == list(range(1, 10))
    assert result["history"][-1]["train/loss"] < result["history"][0]["train/loss"] - 0.05
    assert result["history"][-1]["train/beta"] == result["beta"] != 0.1
    assert result["agreement"]["mean"] < 1e-5 and result["agreement"]["tokens"] > 24
    assert result["update"]["share_changed"] > 0.5 and 1e-3 < result["update"]["relative_norm"] < 1
    assert set(result["seconds"]) == {"load", "train", "export"}

    out, start = tmp_path / "out", world / "policy"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (start / name).read_bytes(), name
    before, after = load_file(start / "model.safetensors"), load_file(out / "model.safetensors")
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    config, old = (json.loads((folder / "config.json").read_text()) for folder in (out, start))
    assert config == old | {"dtype": "float32"}
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1, "whoever may read one file may read all"
    served = AutoModelForCausalLM.from_pretrained(out)
    assert served.dtype == torch.float32
    assert sequence_logps(served, CANARIES) == result["canaries"]
    assert result["canaries"] != sequence_logps(AutoModelForCausalLM.from_pretrained(start), CANARIES)


def test_a_bf16_policy_keeps_its_masters_and_the_next_round_starts_from_them(world: Path, tmp_path: Path) -> None:
    """At this learning rate most updates are too small for bf16, and all of them survive in float32."""
    small = {"learning_rate": 1e-5, "epochs": 1, "serving_dtype": "bfloat16"}
    first, _ = run(job_of(world, tmp_path / "1", **small))
    out = tmp_path / "1" / "out"
    served, masters = (load_file(folder / "model.safetensors") for folder in (out, out / "masters"))
    assert {t.dtype for t in served.values()} == {torch.bfloat16}
    assert {t.dtype for t in masters.values()} == {torch.float32}
    assert all(torch.equal(served[k], masters[k].bfloat16()) for k in masters)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoTokenizer.from_pretrained(out).eos_token == "</s>"
    assert first["canaries"] == sequence_logps(AutoModelForCausalLM.from_pretrained(out), CANARIES)

    changes = {"policy": out, "reference": out, "agreement_mean": 0.1, "agreement_p99": None}
    second, _ = run(job_of(world, tmp_path / "2", **small, **changes))
    one, two = (load_file(tmp_path / i / "out" / "masters" / "model.safetensors") for i in ("1", "2"))
    moved = torch.cat([(two[k] - one[k]).flatten().abs() for k in one])
    assert 0 < moved.max() < 1e-4, "the second round went on from the float32 weights"
    assert second["history"][0]["train/epsilon_zero"] == 1.0, "and so did its reference"


@pytest.mark.parametrize("reference", ["policy", "other"])
def test_an_adapter_is_merged_into_a_plain_policy(world: Path, tmp_path: Path, reference: str) -> None:
    bounds = {"agreement_mean": None, "agreement_p99": None} if reference == "other" else {}
    lora = LoraJob(r=4, alpha=8)
    result, _ = run(job_of(world, tmp_path, lora=lora, reference=world / reference, **bounds))
    assert (result["agreement"] is None) == (reference == "other")
    assert (result["history"][0]["train/epsilon_zero"] == 1.0) == (reference == "policy")
    before, after = (load_file(folder / "model.safetensors") for folder in (world / "policy", tmp_path / "out"))
    assert set(before) == set(after)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed and all("proj" in k for k in changed)
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    for k in changed:
        a, b = (adapter[f"base_model.model.{k.removesuffix('.weight')}.lora_{ab}.weight"] for ab in "AB")
        torch.testing.assert_close(after[k], before[k] + 2 * b @ a, rtol=1e-6, atol=1e-6)


def test_a_repeated_job_resumes_and_another_job_does_not(world: Path, tmp_path: Path) -> None:
    for lora in (None, LoraJob(r=4, alpha=8)):
        folder = tmp_path / str(lora is None)
        job = job_of(world, folder, save_steps=2, epochs=2, lora=lora)
        run(job)
        whole = bytes_of(folder / "out")
        shutil.rmtree(job.work / "checkpoint-6")  # as a kill in step 5 would leave it: one whole save, one torn
        (job.work / "checkpoint-6").mkdir()
        (job.work / "checkpoint-6" / "model.safetensors").write_bytes(b"torn")
        result, seen = run(job)
        assert [step for step, _ in seen] == [5, 6] and len(result["history"]) == 6 and result["agreement"] is not None
        assert bytes_of(folder / "out") == whole
        _, seen = run(job.model_copy(update={"beta": 0.2}))
        assert [step for step, _ in seen] == [0] * 6 + [1, 2, 3, 4, 5, 6]


def test_training_goes_on_from_the_save_before_a_damaged_one(world: Path, tmp_path: Path) -> None:
    job = job_of(world, tmp_path, save_steps=2, epochs=2)
    run(job)
    whole = bytes_of(tmp_path / "out")
    seals.repairs()  # of other tests in this process
    flip(job.work / "checkpoint-6" / "optimizer.pt", 2000)
    result, seen = run(job)
    assert [step for step, _ in seen] == [5, 6] and bytes_of(tmp_path / "out") == whole
    (said,) = result["repairs"]
    assert "checkpoint-6/optimizer.pt is not what" in said
    (job.work / "job.json").write_text("{")
    result, seen = run(job)
    assert [step for step, _ in seen][-6:] == [1, 2, 3, 4, 5, 6] and bytes_of(tmp_path / "out") == whole
    assert ["job.json" in said for said in result["repairs"]] == [True]


def test_the_weight_of_the_chosens_likelihood_reaches_the_loss(world: Path, tmp_path: Path) -> None:
    """Policy and reference are one at first: the loss of step 1 is log 2, and the weight times the chosen's NLL a token."""
    first = run(job_of(world, tmp_path, nll_weight=0.5, epochs=1))[0]["history"][0]
    assert first["train/loss"] == pytest.approx(np.log(2) + 0.5 * first["train/nll_chosen"], rel=1e-5)
    assert first["train/logratios_chosen"] == pytest.approx(0, abs=1e-5) == first["train/chosen_drop"]


# --- what is told from within a step --------------------------------------------------------------------------------


def test_a_step_of_many_micro_batches_tells_of_them_and_of_what_is_left(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 pairs, 4 a step, one a micro-batch: the last of each step comes with the step's own report."""
    monkeypatch.setattr(pace, "SECONDS", 0.0)
    told: list[tuple[int, dict[str, float | None], dict[str, float]]] = []
    job = job_of(world, tmp_path, micro_batch_pairs=1, epochs=1)
    result = train(job, lambda step, steps, metrics, pace: told.append((step, metrics, pace)))
    assert result is not None
    compared = [p["compared"] for _, _, p in told if "compared" in p]
    assert compared == list(range(1, 13))
    places = [(step, p.get("micro_batch")) for step, _, p in told if "compared" not in p]
    assert places == [
        (0, 1),
        (0, 2),
        (0, 3),
        (1, None),
        (1, 1),
        (1, 2),
        (1, 3),
        (2, None),
        (2, 1),
        (2, 2),
        (2, 3),
        (3, None),
    ]
    assert all(p["micro_batches"] == 4 for _, _, p in told if "micro_batch" in p)
    assert all(bool(metrics) == ("micro_batch" not in p) for _, metrics, p in told if "compared" not in p)
    assert told[-1][2]["seconds_left"] == 0 and told[-1][2]["tokens_per_second"] > 0
    left = [p["seconds_left"] for _, _, p in told if "seconds_left" in p]
    assert left[0] > left[-1] and min(left) >= 0


# --- pairs of earlier rounds, and a reference that follows ------------------------------------------------------------


def test_pairs_of_earlier_rounds_are_trained_on_and_not_compared_with_the_generator(
    world: Path, tmp_path: Path
) -> None:
    """Their log-probabilities are those of another policy: 3 nats a token off, which the check would refuse."""
    replayed = write_pairs(tmp_path / "earlier.parquet", world / "policy", n=4, off=3.0, seed=9)
    one, _ = run(job_of(world, tmp_path / "one", replayed=replayed, epochs=1))
    assert one["steps"] == 4 and one["agreement"]["mean"] < 1e-5  # 12 + 4 pairs, 4 a step
    assert one["history"] != run(job_of(world, tmp_path / "without", epochs=1))[0]["history"]
    mark = json.loads((tmp_path / "one" / "work" / "job.json").read_text())
    assert (
        len(mark["replayed"]) == 64
    )  # by its content: a file that is written again under another name is the same job
    with pytest.raises(TrainError, match="differ from the generator's"):
        run(job_of(world, tmp_path / "two", pairs=replayed))


def test_a_reference_that_follows_is_the_average_of_all_weights(world: Path, tmp_path: Path) -> None:
    policy = checkpoint(tmp_path / "policy", seed=4)
    job = BlendJob(before=world / "policy", policy=policy, share=0.25, initial=world / "policy", out=tmp_path / "out")
    found = blend(job, Kept(keeps=False))
    before, after, made = (load_file(f / "model.safetensors") for f in (world / "policy", policy, tmp_path / "out"))
    for name, tensor in made.items():
        assert torch.allclose(tensor, 0.75 * before[name] + 0.25 * after[name], atol=1e-7), name
    apart = sum(float((made[n] - after[n]).norm()) ** 2 for n in made) / sum(
        float(t.norm()) ** 2 for t in after.values()
    )
    assert found["distance"] == pytest.approx(apart**0.5, rel=1e-5)
    again = job.model_copy(update={"out": tmp_path / "again"})
    blend(again, Kept())
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "out")
    other = checkpoint(tmp_path / "other", hidden_size=64)
    with pytest.raises(TrainError, match="the reference of before has no"):
        blend(job.model_copy(update={"before": other, "out": tmp_path / "none"}), Kept(keeps=False))
    assert not (tmp_path / "none").exists()
    trained, _ = run(
        job_of(world, tmp_path / "round", reference=tmp_path / "out", agreement_mean=None, agreement_p99=None)
    )
    assert trained["history"][0]["train/epsilon_zero"] < 1.0  # the policy is not its own reference
