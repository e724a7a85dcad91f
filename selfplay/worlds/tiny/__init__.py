"""The tiny world: templated instructions whose right answers are known, and the gold rubric that checks them.

Pure Python, no models. `builder` trains a policy and reward models on what is here. `evaluate.gold` names `grade`.
"""

from selfplay.worlds.tiny.rubric import grade

__all__ = ["grade"]
