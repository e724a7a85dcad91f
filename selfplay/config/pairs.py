"""The sections `pairs` and `depth`: how preference pairs are chosen, and further pairs for the prompts that are kept."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from selfplay import kinds
from selfplay.config.base import Positive, Section

Selection = Annotated[
    str,
    AfterValidator(kinds.one_of(kinds.SELECTIONS)),
    Field(json_schema_extra={"enum": [*kinds.SELECTIONS]}),
]
ImplicitReward = Annotated[
    str,
    AfterValidator(kinds.one_of(kinds.IMPLICIT_REWARDS)),
    Field(json_schema_extra={"enum": [*kinds.IMPLICIT_REWARDS]}),
]


class PairsConfig(Section):
    selection: Selection = "potential"
    """What pairs are ranked by: alignment potential (`potential`), one of its baselines `explicit`, `implicit` and `random`, or
    `fused`, both margins as one preference probability (BeeS; it goes with `signed`). `kinds.SELECTIONS` lists them."""
    keep: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Share of the base pairs that is kept."""
    easiest: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the round's prompts that may give a pair: those whose answers have the highest mean rewards. 1 is all of them.
    Training on the easiest 30 % alone did best in arXiv 2510.05534. `keep` is a share of what is left."""
    rejected: Literal["lowest", "two_sigma"] = "lowest"
    """The rejected response of a base pair: the one with the lowest reward, or the one nearest to two standard deviations
    below the mean of the prompt's rewards (arXiv 2502.16825). With few candidates both are mostly the same."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """The weight w of the implicit margin in the alignment potential."""
    implicit: ImplicitReward = "simpo"
    """Implicit reward of a response. `simpo`: its mean log-probability. `dpo`: β times its log-ratio to a reference,
    which has to be another policy than the one that sampled it. For `dpo` the reference scores all candidates, which
    costs a pass over them."""
    signed: bool = False
    """Rank by the signed implicit margin instead of its absolute value."""
    max_disagreement: Annotated[float, Field(gt=0)] | None = None
    """A pair is dropped if the members of reward.ensemble disagree by more than this about one of its answers (standard
    deviation of their normalised scores). null: no pair is."""
    cut_off: Literal["drop", "reject"] = "drop"
    """What happens to responses that hit the token limit. `drop`: they are in no pair. `reject`: they can be the
    rejected response of a pair."""
    history: Annotated[int, Field(ge=0)] = 3
    """Earlier rounds whose pairs join the statistics when a round has fewer than 64 pairs."""

    @model_validator(mode="after")
    def _fused_is_signed(self) -> PairsConfig:
        if self.selection == "fused" and not self.signed:
            raise ValueError(
                "selection = fused goes with signed: true, because a pair that the policy has the wrong way round would count "
                "as one that it is sure of"
            )
        return self


class DepthConfig(Section):
    method: Literal["none", "uniform", "gradient"] = "none"
    """Further pairs of the kept prompts. `none`: there are none. `uniform`: every prompt gets the same number.
    `gradient` (BPO): gradients of base pairs are put into clusters, and a prompt gets more pairs the closer its
    gradient is to the centre of its cluster. For these gradients each process of the trainer holds the whole policy, in
    bf16 with train.bf16."""
    pairs_per_prompt: Annotated[float, Field(ge=1)] = 2.0
    """Pairs that are trained on for each kept prompt, on average and with its base pair (`uniform`, `gradient`)."""
    dim: Positive = 1024
    """Dimensions that gradients are projected to (`gradient`). A number with divisors near its root is cheapest."""
    layers: Positive | None = None
    """How many of the last decoder blocks count for gradients (`gradient`). By default all do. Fewer take less time and
    memory."""
    clusters: Positive | None = None
    """Clusters of gradients (`gradient`). The default is the square root of the number of kept pairs."""
    closeness: Literal["centre", "others"] = "centre"
    """What a gradient is compared with (`gradient`): the centre of its cluster, or the centre of the others in its
    cluster. Each gradient is a part of the centre of its cluster. So if gradients are nearly orthogonal, `centre`
    mostly says how small the cluster is."""
