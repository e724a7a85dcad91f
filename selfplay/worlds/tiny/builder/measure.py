"""What came out, measured on held-out prompts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from selfplay.worlds.tiny.builder.llama import Llama, all_rewards
from selfplay.worlds.tiny.builder.recipe import Judge, Recipe
from selfplay.worlds.tiny.builder.sampling import sample
from selfplay.worlds.tiny.builder.tokenizer import END, policy_ids, reward_ids
from selfplay.worlds.tiny.questions import Question
from selfplay.worlds.tiny.rubric import WEIGHTS, grade


def measure(
    recipe: Recipe,
    out: Path,
    policy: Llama,
    judges: dict[Judge, tuple[Llama, torch.Tensor]],
    held_out: Sequence[Question],
    k: int,
) -> dict[str, Any]:
    """Figures on held-out prompts, from `k` samples of the policy for each.

    They are the gold score by part and by skill, and the shares of couples that reward model and judge rank as gold does.
    """
    mine, theirs = (Tokenizer.from_file(str(out / part / "tokenizer.json")) for part in ("policy", "reward"))
    drawn = sample(policy, policy_ids(mine, [q.text for q in held_out]), k, END, recipe.max_tokens, recipe.seed + 7)
    pairs: dict[Judge, dict[str, list[int]]] = {part: {"total": [], "content": []} for part in judges}
    parts: dict[str, float] = dict.fromkeys(("total", *WEIGHTS), 0.0)
    skills: dict[str, list[float]] = {}
    tokens = ended = 0
    texts = [mine.decode_batch(answers, skip_special_tokens=True) for answers in drawn]
    asked = [q.text for q in held_out for _ in range(k)]
    said = reward_ids(recipe, theirs, asked, [t for some in texts for t in some])
    scored = {part: all_rewards(model, head, said) for part, (model, head) in judges.items()}
    for place, (question, answers) in enumerate(zip(held_out, drawn, strict=True)):
        found = {part: values[place * k : place * k + k] for part, values in scored.items()}
        golds = [grade([{"role": "user", "content": question.text}], t, question.meta) for t in texts[place]]
        for name in parts:
            parts[name] += sum(g[name] for g in golds) / k / len(held_out)
        skills.setdefault(question.meta["skill"], []).append(sum(g["content"] for g in golds) / k)
        tokens += sum(map(len, answers))
        ended += sum(ids[-1] == END for ids in answers)
        for a in range(k):
            for b in range(a):
                for part, by_name in pairs.items():
                    for name, agrees in by_name.items():
                        if abs(golds[a][name] - golds[b][name]) > 0.02:
                            agrees.append((found[part][a] > found[part][b]) == (golds[a][name] > golds[b][name]))
    n = len(held_out) * k
    return {
        "gold": {name: round(value, 4) for name, value in parts.items()},
        "content_by_skill": {name: round(sum(v) / len(v), 3) for name, v in sorted(skills.items())},
        "tokens_per_response": round(tokens / n, 2),
        "ended_share": round(ended / n, 4),
        **{
            f"{part}_accuracy": {name: round(sum(v) / max(1, len(v)), 4) for name, v in by_name.items()}
            for part, by_name in pairs.items()
        },
    }
