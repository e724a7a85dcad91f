import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from storage_world import flip
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from selfplay.errors import TrainError
from selfplay.models import weights
from selfplay.models.kept import Kept
from selfplay.models.weights import sequence_logps
from selfplay.processes.child import Child, ChildDied, ChildError
from selfplay.processes.reaping import descendants, marked
from selfplay.storage import seals
from selfplay.training import pace
from selfplay.training.blend_job import blend
from selfplay.training.epsilon_dpo import STATE_FILE, EpsilonDPOTrainer
from selfplay.training.jobs import BlendJob, CanaryJob, LoraJob, TrainJob
from selfplay.training.train_job import agreement, canaries, train

pytestmark = pytest.mark.service

WORDS = 60
CANARIES = [[1, 5, 9, 13, 2], [7, 8, 9]]


def checkpoint(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A small random Llama with its tokenizer, chat template and generation config."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": WORDS,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
    }
    model = LlamaForCausalLM(LlamaConfig(**(settings | changes)))
    model.generation_config.temperature, model.generation_config.do_sample = 0.7, True
    model.save_pretrained(folder)
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, WORDS)}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def write_pairs(path: Path, policy: Path, n: int = 12, off: float = 0.0, seed: int = 0, **more: Any) -> Path:
    """Random pairs with the policy's own log-probabilities, `off` nats a token wrong, and the same in `more` columns."""
    rng = np.random.default_rng(seed)
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    rows = []
    for i in range(n):
        prompt, chosen, rejected = (rng.integers(3, WORDS, rng.integers(2, 10)).tolist() for _ in range(3))
        row: dict[str, Any] = {"prompt_id": f"p{i}", "prompt_ids": prompt} | more
        for name, ids in (("chosen", [*chosen, 2]), ("rejected", [*rejected, 2])):
            whole, before = sequence_logps(model, [prompt + ids, prompt])
            row |= {f"{name}_ids": ids, f"{name}_logp": whole - before + off * len(ids)}
        rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    checkpoint(root / "policy")
    checkpoint(root / "other", seed=5)
    write_pairs(root / "pairs.parquet", root / "policy")
    return root


def job_of(world: Path, folder: Path, **changes: Any) -> TrainJob:
    settings: dict[str, Any] = {
        "pairs": world / "pairs.parquet",
        "policy": world / "policy",
        "reference": world / "policy",
        "initial": world / "policy",
        "work": folder / "work",
        "out": folder / "out",
        "beta": 0.1,
        "epsilon": 0.1,
        "learning_rate": 1e-2,
        "epochs": 3,
        "batch_pairs": 4,
        "micro_batch_pairs": 2,
        "max_length": 64,
        "seed": 2**63 + 5,
        "agreement_mean": 1e-4,
        "agreement_p99": 1e-3,
        "canary_ids": CANARIES,
        "schedule": "constant",
        "warmup_ratio": 0.0,
    }
    return TrainJob(**(settings | changes))


def run(job: TrainJob) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    seen: list[tuple[int, int]] = []

    def report(step: int, steps: int, metrics: dict[str, Any], pace: dict[str, float]) -> None:
        if "micro_batch" not in pace:  # a step that takes longer than a second, on a busy machine
            seen.append((step, steps))

    result = train(job, report)
    assert result is not None
    json.dumps(result, allow_nan=False)
    return result, seen


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


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


# --- what is refused ------------------------------------------------------------------------------------------------


def fails(job: TrainJob, kind: str, words: str) -> None:
    with pytest.raises(TrainError, match=words) as error:
        run(job)
    assert (error.value.kind, bool(error.value.hint)) == (kind, True)
    assert not job.out.exists()


def test_pairs_of_another_policy_do_not_pass_the_agreement_check(world: Path, tmp_path: Path) -> None:
    fails(job_of(world, tmp_path, reference=world / "other"), "agreement", "bound on the mean is 0.0001")
    off = write_pairs(tmp_path / "off.parquet", world / "policy", off=0.01)
    fails(job_of(world, tmp_path, pairs=off), "agreement", "differ from the generator's by 0.01 nats")
    assert not list((tmp_path / "work").glob("checkpoint-*"))


def test_agreement_by_hand() -> None:
    """|Δ| a token: 0.5/1, 1/4, 0/2 → mean 0.25; the 99th percentile lies 98 % of the way from 0.25 to 0.5."""
    found = agreement(np.array([1.0, 2.0, 3.0]), np.array([1.5, 1.0, 3.0]), np.array([1, 4, 2]))
    assert found == {"mean": pytest.approx(0.25), "p99": pytest.approx(0.495), "tokens": 7}


def test_a_seeded_sample_of_the_pairs_is_compared_where_there_are_more(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five of twelve pairs in batches of two. The job goes on where it was although another number is compared now."""
    everything = [row["prompt_ids"] for row in pq.read_table(world / "pairs.parquet").to_pylist()]
    compared: list[list[list[int]]] = []
    reference_logps = EpsilonDPOTrainer.reference_logps

    def record(self: EpsilonDPOTrainer, pairs: Any, *rest: Any) -> Any:
        compared.append(pairs["prompt_ids"][:])
        return reference_logps(self, pairs, *rest)

    monkeypatch.setattr(EpsilonDPOTrainer, "reference_logps", record)

    def sampled(name: str, **changes: Any) -> tuple[list[int], dict[str, Any], list[tuple[int, int]]]:
        result, seen = run(job_of(world, tmp_path / name, epochs=1, save_steps=1, **changes))
        return [everything.index(ids) for ids in compared.pop()], result, seen

    rows, result, seen = sampled("one", agreement_pairs=5)
    assert len(set(rows)) == 5 and rows == sorted(rows)
    assert [step for step, _ in seen] == [0] * 3 + [1, 2, 3]
    of_rows = pq.read_table(world / "pairs.parquet").take(rows).to_pylist()
    assert result["agreement"]["tokens"] == sum(len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in of_rows)
    assert result["agreement"]["mean"] < 1e-5
    assert sampled("again", agreement_pairs=5)[0] == rows
    assert sampled("other", agreement_pairs=5, seed=6)[0] != rows
    assert sampled("all", agreement_pairs=99)[0] == list(range(12))
    shutil.rmtree(tmp_path / "one" / "work" / "checkpoint-3")
    more = job_of(world, tmp_path / "one", epochs=1, save_steps=1, agreement_pairs=7)
    again, seen = run(more)
    assert ([step for step, _ in seen], compared, again["agreement"]) == ([3], [], result["agreement"])


def test_pairs_that_disagree_are_found_by_the_sample(world: Path, tmp_path: Path) -> None:
    off = write_pairs(tmp_path / "off.parquet", world / "policy", off=0.01)
    fails(
        job_of(world, tmp_path, pairs=off, agreement_pairs=1), "agreement", "differ from the generator's by 0.01 nats"
    )


def test_training_that_changes_nothing_is_an_error(world: Path, tmp_path: Path) -> None:
    fails(job_of(world, tmp_path, learning_rate=1e-7, epochs=1, min_update=1e-3), "no_update", "moved the weights by")


def test_a_policy_with_a_nan_is_an_error(world: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(world / "policy", tmp_path / "nan"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    fails(job_of(world, tmp_path, policy=broken, agreement_mean=None, agreement_p99=None), "nonfinite", "loss is nan")
    fails(job_of(world, tmp_path, reference=broken), "agreement", "differ")


def test_checkpoints_that_are_not_whole(world: Path, tmp_path: Path) -> None:
    fails(job_of(world, tmp_path, policy=tmp_path / "nowhere"), "input", "nowhere holds no checkpoint")

    def broken(name: str) -> tuple[Path, dict[str, torch.Tensor]]:
        folder = Path(shutil.copytree(world / "policy", tmp_path / name))
        return folder, load_file(folder / "model.safetensors")

    truncated, _ = broken("truncated")
    file = truncated / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    missing, tensors = broken("missing")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, missing / "model.safetensors", metadata={"format": "pt"})
    shape, tensors = broken("shape")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(32, 32)
    save_file(tensors, shape / "model.safetensors", metadata={"format": "pt"})
    for folder in (truncated, missing, shape):
        fails(job_of(world, tmp_path, policy=folder), "input", folder.name)
        fails(job_of(world, tmp_path, reference=folder), "input", folder.name)


def test_the_weight_of_the_chosens_likelihood_reaches_the_loss(world: Path, tmp_path: Path) -> None:
    """Policy and reference are one at first: the loss of step 1 is log 2, and the weight times the chosen's NLL a token."""
    first = run(job_of(world, tmp_path, nll_weight=0.5, epochs=1))[0]["history"][0]
    assert first["train/loss"] == pytest.approx(np.log(2) + 0.5 * first["train/nll_chosen"], rel=1e-5)
    assert first["train/logratios_chosen"] == pytest.approx(0, abs=1e-5) == first["train/chosen_drop"]


def test_settings_and_pairs_that_cannot_be_trained_on(world: Path, tmp_path: Path) -> None:
    fails(job_of(world, tmp_path, batch_pairs=5), "input", "not a multiple")
    fails(job_of(world, tmp_path, processes=2), "input", "asks for 2 processes, and the launcher started 1")
    fails(job_of(world, tmp_path, max_length=8), "input", "never truncates")
    fails(job_of(world, tmp_path, max_length=65), "input", "context of 64")
    fails(job_of(world, tmp_path, beta_min=0.2), "input", "beta_min")
    fails(job_of(world, tmp_path, lora=LoraJob(target_modules=["nothing"])), "input", "nothing")
    fails(job_of(world, tmp_path, lora=LoraJob(target_modules=["lm_head"])), "input", "lm_head")
    (tmp_path / "text.parquet").write_text("no parquet")
    fails(job_of(world, tmp_path, pairs=tmp_path / "text.parquet"), "input", "no Parquet file")
    pq.write_table(pq.read_table(world / "pairs.parquet").drop_columns(["chosen_logp"]), tmp_path / "less.parquet")
    fails(job_of(world, tmp_path, pairs=tmp_path / "less.parquet"), "input", "lacks chosen_logp")
    pq.write_table(pq.read_table(world / "pairs.parquet").slice(0, 0), tmp_path / "empty.parquet")
    fails(job_of(world, tmp_path, pairs=tmp_path / "empty.parquet"), "input", "no pairs")


# --- the process ----------------------------------------------------------------------------------------------------


def start(folder: Path, *argv: str) -> Child:
    child = Child(
        "trainer", [*(argv or (sys.executable, "-m", "selfplay.training.trainer"))], run_dir=folder, log=folder / "trainer.log",
        env={"OMP_NUM_THREADS": "1"}, silence=240,
    )  # fmt: skip
    child.start()
    return child


@pytest.fixture(scope="module", autouse=True)
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Child]]:
    """Two children that import while the tests without a child run."""
    children = [start(tmp_path_factory.mktemp("child")) for _ in range(2)]
    yield children
    for one in children:
        one.stop()


@pytest.fixture(scope="module")
def child(started: list[Child]) -> Child:
    started[0].wait_for("ready")
    return started[0]


def order(child: Child, job: TrainJob, **kwargs: Any) -> Any:
    return child.order("train", job=job.model_dump(mode="json"), **kwargs)


def test_a_killed_trainer_resumes_to_the_same_bytes(
    world: Path, tmp_path: Path, child: Child, started: list[Child]
) -> None:
    victim = started[1]
    calm, job = (job_of(world, tmp_path / name, save_steps=2, epochs=4) for name in ("calm", "killed"))
    undisturbed = order(child, calm)
    victim.wait_for("ready")
    pid = descendants(victim.pid)[0]

    def kill(event: dict[str, Any]) -> None:
        if event["step"] == 7:
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(ChildDied, match="SIGKILL"):
        order(victim, job, on_event=kill)
    assert not job.out.exists() and (job.work / "checkpoint-6" / STATE_FILE).is_file()
    seen: list[int] = []
    resumed = order(child, job, on_event=lambda event: seen.append(event["step"]) if event["metrics"] else None)
    assert seen[0] in (7, 9) and seen[-1] == 12  # from the save after step 6, or 8 where it was faster than the kill
    assert bytes_of(job.out) == bytes_of(calm.out)
    for name in ("beta", "canaries", "update", "agreement"):
        assert resumed[name] == undisturbed[name]
    strip = [{k: v for k, v in entry.items() if "runtime" not in k} for entry in resumed["history"]]
    assert strip == undisturbed["history"]


def test_the_child_survives_bad_orders_and_answers_canaries(world: Path, tmp_path: Path, child: Child) -> None:
    for sent, kind, words in (
        ({"order": "train", "job": {"beta": -1}}, "input", "beta"),
        (
            {"order": "train", "job": job_of(world, tmp_path, policy=tmp_path).model_dump(mode="json")},
            "input",
            "holds no checkpoint",
        ),
        (
            {
                "order": "train",
                "job": job_of(world, tmp_path).model_dump(mode="json"),
                "files": {str(world / "pairs.parquet"): "0" * 64},
            },
            "internal",
            "seen from .*pairs.parquet is not what its manifest says",
        ),
        ({"order": "nonsense", "job": {}}, "input", "unknown order"),
    ):
        with pytest.raises(ChildError, match=words) as error:
            child.order(**sent)
        assert error.value.kind == kind and (error.value.hint or kind == "internal")
    answers = {
        dtype: child.order("canaries", job={"policy": str(world / "policy"), "dtype": dtype, "canary_ids": CANARIES})
        for dtype in ("float32", "bfloat16")
    }
    model = AutoModelForCausalLM.from_pretrained(world / "policy", dtype=torch.float32)
    by_hand = []
    for ids in CANARIES:
        logp = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        by_hand.append(sum(logp[i, token].item() for i, token in enumerate(ids[1:])))
    assert answers["float32"]["canaries"] == pytest.approx(by_hand, rel=1e-5)
    assert answers["bfloat16"]["canaries"] == pytest.approx(answers["float32"]["canaries"], abs=0.5)
    assert answers["bfloat16"] != answers["float32"]
    assert answers["float32"] == canaries(CanaryJob(policy=world / "policy", canary_ids=CANARIES))


def test_out_of_memory_is_said_and_survived(world: Path, tmp_path: Path, child: Child) -> None:
    pid = descendants(child.pid)[0]
    size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    big = checkpoint(tmp_path / "big", hidden_size=1024, intermediate_size=8192)
    resource.prlimit(pid, resource.RLIMIT_AS, (size + 200_000_000, resource.RLIM_INFINITY))
    with pytest.raises(ChildError, match="out of memory") as error:
        order(child, job_of(world, tmp_path, policy=big, agreement_mean=None, agreement_p99=None))
    assert error.value.kind == "oom" and "micro_batch_pairs" in error.value.hint
    resource.prlimit(pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert order(child, job_of(world, tmp_path, epochs=1))["steps"] == 3


def test_a_gpu_that_others_fill_is_noticed_before_training(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Policy with gradient and two moments, and a reference of its own; with an adapter the policy is all."""
    elements = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(world / "policy").parameters())
    monkeypatch.setattr(weights, "free_memory", lambda: elements * 4 * 5 - 1)
    with pytest.raises(TrainError, match="the GPU has .* GiB free") as error:
        train(job_of(world, tmp_path), lambda *_: None)
    assert error.value.kind == "oom" and "nvidia-smi" in error.value.hint
    monkeypatch.setattr(weights, "free_memory", lambda: elements * 4)
    run(job_of(world, tmp_path, lora=LoraJob(r=2), epochs=1))


@pytest.mark.slow
def test_behind_accelerates_launcher_the_trainer_works_and_dies_with_its_guard(world: Path, tmp_path: Path) -> None:
    """That it dies with its launcher is seen in test_depth_job.py, where one is left."""
    config = Path(__file__).parents[2] / "configs" / "accelerate" / "single.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    child = start(tmp_path / "launched", *launcher, "-m", "selfplay.training.trainer")
    child.wait_for("ready")
    result = order(child, job_of(world, tmp_path, epochs=1))
    assert result["steps"] == 3
    assert len(descendants(child.pid)) == 2  # the launcher and the trainer
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(ChildDied):
        order(child, job_of(world, tmp_path, epochs=1))
    deadline = time.monotonic() + 20
    while (left := marked(tmp_path / "launched")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


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
