from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from selfplay.training import layout
from selfplay.training.depth_job import collate

pytestmark = pytest.mark.service

PAIRS: list[dict[str, Any]] = [
    {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9, 10, 2], "rejected_ids": [11, 2]},
    {"prompt_ids": [12], "chosen_ids": [2], "rejected_ids": [13, 14, 15, 16, 17, 2]},
    {"prompt_ids": [18, 19], "chosen_ids": [20, 21], "rejected_ids": [20, 22]},
]
SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip


def hidden(model: Any, rows: layout.Rows) -> torch.Tensor:
    with torch.no_grad():
        return rows.at_responses(model.model(**rows.inputs, use_cache=False).last_hidden_state)


def test_a_pair_in_one_row_gives_each_token_the_hidden_states_of_its_own_sequence() -> None:
    torch.manual_seed(0)
    model, batch = LlamaForCausalLM(LlamaConfig(**SIZES)).eval(), collate(PAIRS)
    apart, together = layout.separate(batch), layout.shared(batch)
    assert layout.may_share(model)
    assert together.inputs["input_ids"].shape == (3, 9), "as wide as the longest prompt with both of its responses"
    assert (
        apart.targets.tolist() == together.targets.tolist() == [9, 10, 2, 2, 20, 21, 11, 2, *range(13, 18), 2, 20, 22]
    )
    assert apart.mask.sum(dim=1).tolist() == together.mask.sum(dim=1).tolist() == [3, 1, 2, 2, 6, 2]
    torch.testing.assert_close(hidden(model, together), hidden(model, apart), rtol=1e-5, atol=1e-5)


def test_a_model_with_a_window_gets_each_response_in_a_row_of_its_own() -> None:
    """With a window of 3 tokens the rejected response would see the chosen one in the place of its prompt."""
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=3)).eval()
    batch = collate(PAIRS)
    assert not layout.may_share(model)
    apart, together = (hidden(model, rows) for rows in (layout.separate(batch), layout.shared(batch)))
    assert (apart - together).abs().max() > 0.1 * apart.abs().max()
    model.config._attn_implementation = "eager"
    assert not layout.may_share(model)


def test_some_pairs_of_a_batch_lose_the_columns_that_they_do_not_need() -> None:
    batch, wanted = layout.take(collate(PAIRS), [2, 0]), collate([PAIRS[2], PAIRS[0]])
    assert batch.keys() == wanted.keys()
    assert all(torch.equal(batch[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("widths", "extra", "wanted"),
    [
        ([10, 100, 10, 90], 50, [[0, 2], [3, 1]]),  # 20 + 200 and two passes, 320, against 450 in one
        ([10, 100, 10, 90], 300, [[0, 2, 3, 1]]),  # 400 and one pass, 700, against 820
        ([7], 50, [[0]]),
        ([3, 2, 1], 0, [[2], [1], [0]]),
    ],
)
def test_pairs_go_together_where_padding_costs_less_than_one_more_pass(
    widths: list[int], extra: int, wanted: list[list[int]]
) -> None:
    assert layout.parts(widths, extra) == wanted
