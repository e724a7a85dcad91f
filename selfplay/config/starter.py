"""The configuration that `selfplay init` writes."""

from __future__ import annotations

import json


def starter(name: str, model: str, reward: str, prompts: str) -> str:
    """YAML with what a user has to decide, each with a word on it; everything else keeps its default."""
    source = (
        f"url: [{json.dumps(reward)}]" if reward.startswith(("http://", "https://")) else f"model: {json.dumps(reward)}"
    )
    return f"""# Self-play rounds for {model}. Every setting, with its documentation, is in selfplay/config/.
run: {{name: {json.dumps(name)}}}
policy:
  model: {json.dumps(model)}
  dtype: bfloat16           # serving precision; float32 on a CPU
prompts:
  source: {json.dumps(prompts)}
  per_round: 2048           # prompts of a round
  max_tokens: 1024          # longer prompts are set aside; with generate.max_tokens they must fit train.max_length
generate:
  candidates: 5             # responses to a prompt
  max_tokens: 1024
reward: {{{source}}}
pairs: {{selection: potential, keep: 0.4}}
train:
  lora: {{r: 64, alpha: 128}} # remove for full fine-tuning, with a learning rate near 7e-7
  learning_rate: 5.0e-6
  batch_pairs: 64
  micro_batch_pairs: 1
  max_length: 2048
  bf16: true
  gradient_checkpointing: true
evaluate: {{prompts: 512}}
placement: {{colocated: true}} # generator and trainer take turns on one GPU
schedule: {{mode: continuous}} # or interval, or cron: a line such as "0 1 * * *"
"""
