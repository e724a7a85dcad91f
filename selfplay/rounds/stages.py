"""The stages of a round, in their order. What each declares stands beside its function."""

from selfplay.evaluation.stage import EVALUATE
from selfplay.evaluation.suites import SUITE
from selfplay.generation.sampling import GENERATE
from selfplay.pairs.deepening import DEPTH
from selfplay.pairs.stage import PAIRS
from selfplay.prompts.draw import PROMPTS
from selfplay.prompts.evolve import EVOLVE
from selfplay.rewards.guard import GUARD
from selfplay.rewards.scoring import SCORE
from selfplay.rounds.promotion import PROMOTE
from selfplay.training.stage import TRAIN

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
    "SUITE",
    "TRAIN",
]

STAGES = (PROMPTS, GENERATE, SCORE, GUARD, PAIRS, EVOLVE, DEPTH, TRAIN, EVALUATE, SUITE, PROMOTE)
