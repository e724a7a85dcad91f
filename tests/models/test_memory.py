"""What a trainer asks of its GPU before it begins."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from selfplay.errors import TrainError
from selfplay.models import weights

pytestmark = pytest.mark.service


def test_a_sharded_trainer_needs_its_share_and_what_is_gathered_at_a_time(monkeypatch):
    """Four processes: a quarter of policy, gradients, moments and reference, in fp32; two layers and both embeddings in bf16."""
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    count = sum(p.numel() for p in model.parameters())
    layer = (count - 2 * 50 * 16) / 3
    needed = count * 4 * 5 // 4 + int(2 * layer + 2 * 50 * 16) * 2
    monkeypatch.setattr(weights, "free_memory", lambda: needed)
    weights.require_memory(model, model, of_policy=4, processes=4)
    monkeypatch.setattr(weights, "free_memory", lambda: needed - 1)
    with pytest.raises(TrainError, match="out of memory"):
        weights.require_memory(model, model, of_policy=4, processes=4)
