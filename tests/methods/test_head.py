import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from selfplay.methods import head
from selfplay.methods.epsilon_dpo import chosen_logps, lean_logps

WORDS = 60
LLAMA = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 8, "max_position_embeddings": 64}  # fmt: skip
# A model family, and what it does between its body and its logits.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": LLAMA,
    "Qwen2": LLAMA | {"tie_word_embeddings": True},
    "Phi": LLAMA,  # bias
    "Cohere": LLAMA | {"logit_scale": 0.3},
    "Granite": LLAMA | {"logits_scaling": 4.0},
    "HyperCLOVAX": LLAMA | {"logits_scaling": 4.0},
    "Gemma2": LLAMA | {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "FalconH1": LLAMA | {"lm_head_multiplier": 0.2, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
                         "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8},
    "Mixtral": LLAMA | {"num_local_experts": 2},
    "GPT2": {"n_layer": 2, "n_head": 4, "n_positions": 64},
    "GPTNeoX": {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
}  # fmt: skip


def build(family: str = "Llama", **changes: Any) -> Any:
    settings = {"vocab_size": WORDS, "hidden_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{family}Config")(**settings | FAMILIES[family] | changes)
    suffix = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, f"{family}{suffix}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


IDS = torch.arange(3, 19).view(2, 8)


def lean(model: Any, head_of: Any) -> Tensor:
    """log π of each next token of IDS, read before the head, which is `head_of(hidden, head)`'s to use."""

    def at_head(hidden: Tensor, own: head.Head) -> Tensor:
        weight, bias, logit_scale, softcap = head_of or own
        return lean_logps(hidden[:, :-1].reshape(-1, hidden.size(-1)), weight, IDS[:, 1:].reshape(-1),
                          bias=bias, logit_scale=logit_scale, softcap=softcap)  # fmt: skip

    logps, aux_loss = model(input_ids=IDS, use_cache=False, at_head=at_head)
    assert aux_loss is None
    return logps


def whole(model: Any) -> Tensor:
    return chosen_logps(model(input_ids=IDS, use_cache=False).logits[:, :-1].reshape(-1, WORDS), IDS[:, 1:].reshape(-1))


@pytest.mark.parametrize("family", FAMILIES)
def test_lean_log_probabilities_and_gradients_are_the_models_own(family: str) -> None:
    model = build(family)
    logps = whole(model)
    logps.sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    head.make_lean(model)
    assert head.agrees(model, IDS[:1])
    ours = lean(model, None)
    ours.sum().backward()
    torch.testing.assert_close(ours, logps, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lean(model, head.read(model)), logps, rtol=1e-5, atol=1e-5)
    assert torch.equal(whole(model), logps), "without at_head the model is as it was"
    assert model.generate(IDS[:1], max_new_tokens=2, do_sample=False).shape == (1, 10)


def test_a_model_that_does_more_to_its_logits_is_found_out() -> None:
    class Shifted(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 1.1
            return out

    model = Shifted(build().config).eval()
    head.make_lean(model)
    assert not head.agrees(model, IDS[:1])


def test_a_head_that_is_no_linear_layer_is_refused() -> None:
    model = build()
    model.set_output_embeddings(torch.nn.Sequential(model.get_output_embeddings()))
    with pytest.raises(ValueError, match="Sequential, not a plain linear layer"):
        head.make_lean(model)


def test_an_adapter_on_the_head_is_refused() -> None:
    model = get_peft_model(build(), LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="take lm_head out of target_modules"):
        head.make_lean(model.get_base_model())


def test_a_head_that_an_adapter_saves_is_read_as_it_is_active() -> None:
    model = get_peft_model(
        build(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    ).eval()
    base = model.get_base_model()
    head.make_lean(base)
    (trained,) = base.get_output_embeddings().modules_to_save.values()
    trained.weight.data.mul_(1.5)
    for disabled in (False, True):
        if disabled:
            base.get_output_embeddings().enable_adapters(False)
        assert head.agrees(model, IDS[:1])
        for own in (None, head.read(base)):
            torch.testing.assert_close(lean(model, own), whole(model), rtol=1e-5, atol=1e-5)
    base.get_output_embeddings().enable_adapters(True)
    lean(model, None).sum().backward()
    assert trained.weight.grad.any()


@pytest.mark.slow
def test_sharded_by_fsdp2_it_is_the_same_head() -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = Path(__file__).parents[1] / "fsdp_world.py"
    done = subprocess.run([*launcher, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the sharded gradients are those of one process" in done.stdout
