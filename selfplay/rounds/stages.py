"""The stages of a round, in their order. What each declares stands beside its function."""

from selfplay.evaluation.stage import EVALUATE
from selfplay.generation.sampling import GENERATE
from selfplay.pairs.deepening import DEPTH
from selfplay.pairs.stage import PAIRS
from selfplay.rewards.guard import GUARD
from selfplay.rewards.scoring import SCORE
from selfplay.rounds.promotion import PROMOTE
from selfplay.stage import Stage
from selfplay.training.stage import TRAIN

PROMPTS = Stage(name="prompts", writes=("prompts.parquet",), unit="prompts", log="trainer")
EVOLVE = Stage(name="evolve", reads=("pairs/pairs.parquet",), unit="rewrites", log="generator")
__all__ = [
    "DEPTH",
    "EVALUATE",
    "EVOLVE",
    "GENERATE",
    "GUARD",
    "PAIRS",
    "PROMOTE",
    "PROMPTS",
    "SCORE",
    "STAGES",
    "TRAIN",
]

STAGES = (PROMPTS, GENERATE, SCORE, GUARD, PAIRS, EVOLVE, DEPTH, TRAIN, EVALUATE, PROMOTE)
