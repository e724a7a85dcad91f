"""The initial policy of a run: an adapter is merged with its base, and of a mixed folder the run has the checkpoint alone."""

import dataclasses
import json
import shutil
from datetime import date

import numpy as np
import pytest
import torch
from engine_world import tokenizer, write_policy
from mini import TINY
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import save_file

from selfplay.config import PolicyConfig, load
from selfplay.errors import CheckpointError, InputError
from selfplay.models import initial, weights
from selfplay.models.rendering import Template
from selfplay.prompts import importer, pool
from selfplay.prompts.pool import Pool
from selfplay.storage import checkpoints, policies, seals
from selfplay.storage.policies import Policies

TEMPLATE = "{% for m in messages %}<bos>{{ m['content'] }}<eos>{% endfor %}"
IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base model without a chat template, and an adapter of it with one; its weights are random, not 0."""
    folder = tmp_path_factory.mktemp("world")
    base = folder / "base"
    shutil.copytree(write_policy(folder, 1, 1).path, base)
    (base / "manifest.json").unlink()
    torch.manual_seed(5)
    settings = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )
    model = get_peft_model(weights.load(base), settings)
    for config in model.peft_config.values():
        config.base_model_name_or_path = str(base)
    model.save_pretrained(folder / "adapter")
    own = tokenizer()
    own.chat_template = TEMPLATE
    own.save_pretrained(folder / "adapter")
    return folder


def renamed(world, tmp_path, base):
    """A copy of the adapter that names another base."""
    copy = shutil.copytree(world / "adapter", tmp_path / "adapter")
    told = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(told | {"base_model_name_or_path": str(base)}))
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_becomes_the_policy_that_it_is_with_its_base(world, tmp_path, dtype):
    settings = PolicyConfig(model=str(world / "adapter"), dtype=dtype)
    found = initial.prepare(settings, tmp_path / "policy")
    assert found.adapter is not None and "merged with its base" in found.said
    assert (found.folder / "chat_template.jinja").read_text() == TEMPLATE, "the adapter's own tokenizer"
    initial.merge(found, getattr(torch, dtype), trust_remote_code=False)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(weights.load(world / "base"), str(world / "adapter"))(IDS).logits
        base = weights.load(world / "base")(IDS).logits
        masters = weights.load(weights.masters(found.folder))(IDS).logits
    torch.testing.assert_close(masters, expected, atol=1e-5, rtol=1e-5)
    assert (expected - base).abs().max() > 0.1, "the adapter does something"
    read = checkpoints.read(found.folder)
    assert {kind for kind, _ in read.tensors.values()} == {"F32" if dtype == "float32" else "BF16"} and not read.beside
    run = Policies(tmp_path)
    run.import_initial(found.source, {}, "f", {}, found.folder)
    manifest = policies.verify(run.folder(0))
    assert manifest.source is None and run.get(0).path == str(run.folder(0)) and not found.folder.exists()
    assert ("masters/model.safetensors" in manifest.files) == (dtype == "bfloat16")


def test_an_adapter_that_does_not_fit_its_base_and_one_without(world, tmp_path):
    missing = renamed(world, tmp_path / "1", tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"cannot be merged with its base: .*there is no folder .*nowhere"):
        initial.prepare(PolicyConfig(model=str(missing)), tmp_path / "policy")
    itself = renamed(world, tmp_path / "2", world / "adapter")
    with pytest.raises(InputError, match="an adapter alone"):
        initial.prepare(PolicyConfig(model=str(itself)), tmp_path / "policy")
    for shape in ({"hidden_size": 32}, {"num_hidden_layers": 1}):
        other = write_policy(tmp_path / str(shape), 1, 1, **shape).path
        found = initial.prepare(
            PolicyConfig(model=str(renamed(world, tmp_path / f"of {shape}", other))), tmp_path / f"p{shape}"
        )
        with pytest.raises(InputError, match="does not fit its base") as error:
            initial.merge(found, torch.float32, trust_remote_code=False)
        assert "base_model_name_or_path" in error.value.hint


def test_quantised_weights_are_refused_as_a_policy_and_as_a_base(world, tmp_path):
    small = shutil.copytree(world / "base", tmp_path / "small")
    told = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(told | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(InputError, match=r"small has quantised weights \(fp8\), which cannot be trained") as error:
        initial.prepare(PolicyConfig(model=str(small)), tmp_path / "policy")
    assert "take the model that it was made from" in error.value.hint
    with pytest.raises(InputError, match=r"cannot be merged with its base: .*quantised"):
        initial.prepare(PolicyConfig(model=str(renamed(world, tmp_path / "1", small))), tmp_path / "policy")


def test_of_a_mixed_folder_the_run_has_the_checkpoint_alone(world, tmp_path):
    """Other weights and an adapter lie beside the model: transformers would put the adapter on top."""
    source = shutil.copytree(world / "base", tmp_path / "mixed")
    for file in (world / "adapter").glob("adapter_*"):
        shutil.copy(file, source)
    save_file({"layers.0.attention.wq.weight": np.zeros((4, 4), "float32")}, source / "consolidated.safetensors")
    found = initial.prepare(PolicyConfig(model=str(source)), tmp_path / "policy")
    assert found.adapter is None and "consolidated.safetensors" in found.said and "adapter_config.json" in found.said
    run = Policies(tmp_path)
    run.import_initial(found.source, {}, "f", {}, found.folder)
    policies.verify(run.folder(0))
    with torch.no_grad():
        served, base = weights.load(run.folder(0))(IDS).logits, weights.load(world / "base")(IDS).logits
    assert torch.equal(served, base)
    assert dataclasses.asdict(run.get(0))["path"] == str(run.folder(0))
    (source / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="weights of policy 0 are gone"):
        run.get(0)


def test_an_import_begins_a_run_with_an_adapter(world, tmp_path):
    """Prompts are rendered by the adapter's template, and the canaries are those of the merged model."""
    rows = [{"prompt": f"the quick brown fox {i}"} for i in range(40)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [f"prompts.source={tmp_path / 'prompts.jsonl'}", "prompts.heldout=null", "prompts.heldout_fraction=0.3"]
    settings = load(TINY, [f"policy.model={world / 'adapter'}", "policy.dtype=float32", *files])
    (out := tmp_path / "pool").mkdir()
    template = Template(today=date(2026, 11, 28))
    seals.repairs()  # of other tests in this process
    seals.note_repair("a part is made again")
    told = importer.run_import(settings, template, out, tmp_path / "work", lambda *_: None)
    assert told["said"][-1] == ("repaired", "a part is made again")
    assert told["said"][0][1].endswith(f"is an adapter, merged with its base {world / 'base'}")
    (prompt, *_) = Pool(out)
    assert tokenizer().decode(prompt.prompt_ids) == f"<bos>{prompt.messages[0]['content']}<eos>"
    canaries = json.loads((out / importer.INITIAL).read_text())["canaries"]
    model = PeftModel.from_pretrained(weights.load(world / "base"), str(world / "adapter"))
    expected = weights.sequence_logps(model.eval(), canaries["token_ids"])
    assert canaries["logps"] == pytest.approx(expected, abs=1e-3)
    assert checkpoints.read(out / pool.POLICY).files() == sorted(p.name for p in (out / pool.POLICY).iterdir())


def test_a_plain_folder_stays_where_it_is(world, tmp_path):
    found = initial.prepare(PolicyConfig(model=str(world / "base")), tmp_path / "policy")
    assert (found.folder, found.said) == (world / "base", "") and not (tmp_path / "policy").exists()
