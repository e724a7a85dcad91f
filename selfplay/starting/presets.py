"""Numbers to begin with, by the size of the model: each with the reason why it is what it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Settings = dict[str, tuple[Any, str]]
"""A setting by its place in the configuration, such as `train.lora.r` → its value, and why."""

SKYWORK_8B = "Skywork/Skywork-Reward-V2-Llama-3.1-8B"
ULTRAFEEDBACK = {"source": "HuggingFaceH4/ultrafeedback_binarized", "split": "train_prefs", "columns.prompt": "prompt"}
PAPER = "that of the papers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    about: str
    model: str
    reward: str
    billions: float
    """Parameters of the models that it is for, at most."""
    settings: Settings
    prompts: Mapping[str, str] = field(default_factory=lambda: ULTRAFEEDBACK)


SAMPLING: Settings = {
    "prompts.per_round": (2048, "enough pairs for some tens of optimizer steps"),
    "prompts.max_tokens": (1024, "longer prompts are set aside"),
    "generate.candidates": (5, "as many answers to a prompt as in the papers; the best and the worst make its pair"),
    "generate.max_tokens": (1024, "longer answers are cut off, and are never chosen"),
    "generate.shard_prompts": (128, "what a kill can lose of the sampling"),
    "generate.engines": (1, "one engine"),
    "generate.engine.gpu_memory_utilization": (0.9, "share of a GPU for weights and cache while the engine samples"),
    "generate.engine.tensor_parallel": (1, "its weights fit on one GPU"),
    "generate.engine.max_num_seqs": (256, "answers that are decoded at a time"),
    "pairs.selection": ("potential", "alignment potential: high reward margin, low margin of the policy"),
    "pairs.keep": (0.4, PAPER),
}
STEPS: Settings = {
    "train.schedule": ("cosine", PAPER),
    "train.warmup_ratio": (0.1, PAPER),
    "train.batch_pairs": (64, "pairs in an optimizer step"),
    "train.micro_batch_pairs": (4, "pairs that a GPU holds at a time: what its memory has room for"),
    "train.max_length": (2048, "prompts.max_tokens + generate.max_tokens: training never truncates"),
    "train.beta": (0.01, PAPER),
    "train.epsilon": (0.01, PAPER),
    "train.bf16": (True, "products in bf16; weights, optimizer and losses stay in fp32"),
    "train.gradient_checkpointing": (True, "less memory for a third more time"),
}
DECIDING: Settings = {
    "evaluate.prompts": (512, "held-out prompts of the gate: `selfplay check` says what it can tell with them"),
    "evaluate.audit_prompts": (512, "prompts that never gate, for the comparison with the initial policy"),
    "retention.candidates_rounds": (20, "older rounds keep pairs and verdicts, and lose their other answers"),
    "retention.pair_rows_rounds": (200, "older rounds leave the lists of the page; their pairs stay in their folders"),
    "schedule.mode": ("continuous", "a round follows a round; or interval, or cron"),
}
LORA: Settings = {
    "train.lora.r": (64, "an adapter: without its section all weights are trained"),
    "train.lora.alpha": (128, "twice the rank"),
    "train.learning_rate": (5.0e-6, "an adapter wants more than the 7e-7 of full fine-tuning"),
}
FULL: Settings = {
    "train.learning_rate": (7.0e-7, "that of the papers, for full fine-tuning of an instruct model"),
    "service.drain_seconds": (600.0, "a save of the trainer is 12 bytes a parameter, and gets the time to finish"),
}
DEPTH: Settings = {
    "depth.method": ("gradient", "further pairs for prompts whose gradient agrees with others (BPO)"),
    "depth.pairs_per_prompt": (2.0, "pairs that are trained on for each kept prompt, on average"),
}

PRESETS = {
    "0.5b": Preset(
        about="0.5B, all weights, one GPU of 24 GB",
        model="Qwen/Qwen2.5-0.5B-Instruct",
        reward="Skywork/Skywork-Reward-V2-Qwen3-0.6B",
        billions=1.0,
        settings=SAMPLING | DEPTH | FULL | STEPS | DECIDING,
    ),
    "8b-lora": Preset(
        about="8B, an adapter, one GPU of 80 GB",
        model="meta-llama/Llama-3.1-8B-Instruct",
        reward=SKYWORK_8B,
        billions=16.0,
        settings=SAMPLING | DEPTH | LORA | STEPS | DECIDING,
    ),
    "8b-full": Preset(
        about="8B, all weights, eight GPUs of 80 GB",
        model="meta-llama/Llama-3.1-8B-Instruct",
        reward=SKYWORK_8B,
        billions=16.0,
        settings=SAMPLING | DEPTH | FULL | STEPS | DECIDING
        | {
            "prompts.per_round": (8192, "eight engines sample them in minutes"),
            "generate.shard_prompts": (256, "what a kill can lose of the sampling"),
            "train.batch_pairs": (128, PAPER),
        },
    ),
    "70b-lora": Preset(
        about="70B, an adapter, eight GPUs of 80 GB and 700 GB of main memory",
        model="meta-llama/Llama-3.1-70B-Instruct",
        reward=SKYWORK_8B,
        billions=1000.0,
        settings=SAMPLING | LORA | STEPS | DECIDING
        | {
            "generate.engine.max_num_seqs": (128, "answers that are decoded at a time"),
            "depth.method": ("none", "gradient depth holds the whole policy on each GPU"),
        },
    ),
}  # fmt: skip

CPU: Settings = {
    "prompts.per_round": (64, "what two cores sample in minutes"),
    "generate.candidates": (4, "answers to a prompt; the best and the worst make its pair"),
    "generate.shard_prompts": (16, "what a kill can lose of the sampling"),
    "generate.engines": (1, "one engine"),
    "generate.engine.max_num_seqs": (64, "answers that are decoded at a time"),
    "generate.engine.cpu_kv_cache_gib": (0.5, "memory for the keys and values of these answers"),
    "train.batch_pairs": (16, "pairs in an optimizer step: few, so that a small round has several"),
    "train.bf16": (False, "most CPUs are slower in bf16"),
    "train.gradient_checkpointing": (False, "main memory is large enough"),
}
SMALL: Settings = {
    "train.learning_rate": (1.0e-4, "a model as small as this learns at a high rate"),
    "train.beta": (0.1, "a small model strays soon: a stronger pull to the reference"),
}
FSDP2 = """# {processes} processes on one machine; FSDP2 shards parameters, gradients and optimizer over them.
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
num_machines: 1
num_processes: {processes}
mixed_precision: "no" # the trainer sets it from train.bf16
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: SHARDED_STATE_DICT # each process saves its own part; FULL_STATE_DICT writes the weights twice
  fsdp_cpu_ram_efficient_loading: true # rank 0 reads the weights, the others get their part from it
  fsdp_activation_checkpointing: false # train.gradient_checkpointing does it
"""
"""A file for `train.accelerate`; those under configs/accelerate/ are the same."""


def nearest(parameters: int | None) -> str:
    """The preset for a model of this size; an adapter wherever all weights would take several GPUs. Unknown is taken for 8B."""
    if parameters is None:
        return "8b-lora"
    return next(n for n in ("0.5b", "8b-lora", "70b-lora") if parameters <= PRESETS[n].billions * 1e9)
