"""How large each part is: on a GPU, and in miniature on a CPU, where every part runs too."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The shape of a Llama whose output layer is not its embedding."""

    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    layers: int
    vocabulary: int  # tokens

    def with_layers(self, layers: int) -> Shape:
        return replace(self, layers=layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCase:
    """A training step that is measured at two depths, and extrapolated to the layers of its shape."""

    name: str
    shape: Shape
    lora: bool  # otherwise all weights are trained, beside a reference of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    name: str
    model: Shape  # of the policy in every part but the training steps
    reward: Shape
    prompt_tokens: int  # the most of a prompt
    answer_tokens: int  # the most of an answer
    stop_share: int  # one in so many tokens ends an answer, so that answers have different lengths

    # sleep, wake and swap
    canaries: int
    canary_tokens: int
    swaps: int  # in each direction
    noise_answers: int
    noise_tokens: int  # of each of these answers
    window: int  # tokens over which the signed noise is averaged

    # a round
    round_prompts: int
    candidates: int
    heldout_prompts: int
    batch_pairs: int

    # training steps
    cases: tuple[StepCase, ...]
    depths: tuple[int, int]  # layers that are measured
    pairs: int  # in a step
    steps: int  # timed, after one that is not
    rank: int  # of the adapter

    # tokens a second
    throughput_prompts: int
    throughput_candidates: int
    max_num_seqs: int


WORDS = 128_000  # a vocabulary as that of Llama 3
ONE_B = Shape(hidden=2048, feed_forward=8192, heads=32, kv_heads=8, layers=16, vocabulary=WORDS)
THREE_B = Shape(hidden=3072, feed_forward=8192, heads=24, kv_heads=8, layers=28, vocabulary=WORDS)
EIGHT_B = Shape(hidden=4096, feed_forward=14_336, heads=32, kv_heads=8, layers=32, vocabulary=WORDS)
MINIATURE = Shape(hidden=64, feed_forward=128, heads=2, kv_heads=1, layers=2, vocabulary=1024)

FULL = Sizes(
    name="full",
    model=ONE_B,  # 1.5 billion parameters with its output layer
    reward=Shape(hidden=1024, feed_forward=4096, heads=16, kv_heads=8, layers=8, vocabulary=WORDS),
    prompt_tokens=256,
    answer_tokens=256,
    stop_share=48,
    canaries=8,
    canary_tokens=64,
    swaps=3,
    noise_answers=8,
    noise_tokens=128,
    window=64,
    round_prompts=64,
    candidates=8,
    heldout_prompts=32,
    batch_pairs=16,
    cases=(
        StepCase(name="8B, LoRA", shape=EIGHT_B, lora=True),
        StepCase(name="1B, all weights", shape=ONE_B, lora=False),
        StepCase(name="3B, LoRA", shape=THREE_B, lora=True),
    ),
    depths=(2, 4),
    pairs=2,
    steps=4,
    rank=64,
    throughput_prompts=512,
    throughput_candidates=8,
    max_num_seqs=256,
)

SMALL = Sizes(
    name="small",
    model=MINIATURE,
    reward=MINIATURE,
    prompt_tokens=32,
    answer_tokens=24,
    stop_share=8,
    canaries=4,
    canary_tokens=64,
    swaps=1,
    noise_answers=2,
    noise_tokens=16,
    window=8,
    round_prompts=16,
    candidates=4,
    heldout_prompts=8,
    batch_pairs=4,
    cases=(StepCase(name="miniature, all weights", shape=MINIATURE.with_layers(4), lora=False),),
    depths=(1, 2),
    pairs=2,
    steps=1,
    rank=4,
    throughput_prompts=24,
    throughput_candidates=2,
    max_num_seqs=64,
)

SIZES = {"full": FULL, "small": SMALL}
