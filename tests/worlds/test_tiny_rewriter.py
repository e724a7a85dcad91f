from collections import Counter

from selfplay.prompts.evolve import STRATEGIES
from selfplay.worlds.tiny import questions, rewriter


def ask(text, strategy, seed=0):
    return rewriter.rewrite([{"role": "user", "content": text}], strategy, seed)


def test_every_prompt_of_the_world_is_understood():
    for question in questions.every(0, scale=0.3):
        found = rewriter.parse(question.text)
        assert found is not None, question.text
        assert (found[0], found[2]) == (question.meta["skill"], question.meta["x"]), question.text


def test_a_rewrite_is_a_prompt_of_the_world_about_what_the_strategy_says():
    for question in questions.every(1, scale=0.05):
        for strategy in STRATEGIES:
            found = rewriter.parse(ask(question.text, strategy, 5))
            assert found is not None
            skill, _, x = found
            if strategy == "deepen" and question.meta["skill"] in rewriter.HARDER:
                assert skill == rewriter.HARDER[question.meta["skill"]]
            else:
                assert skill == question.meta["skill"]
                assert strategy == "broaden" or x == question.meta["x"]


def test_by_hand():
    asked = "Hey, What is the capital of Peru? Thank you."
    assert rewriter.parse(asked) == ("capital", "What is the capital of {x}?", "Peru")
    assert ask(asked, "constrain") in {
        "Name the capital of Peru. Be brief.",
        "Which city is the capital of Peru? Be brief.",
        "Peru: what is its capital? Be brief.",
    }
    assert ask(asked, "reason", 3) == ask(asked, "reason", 3)
    assert len({ask(asked, "broaden", seed) for seed in range(20)}) > 10
    assert ask("Write a sonnet about Peru.", "deepen") == ""


def test_new_prompts_are_new_often_enough():
    asked = questions.every(0)
    known = {q.text for q in asked}
    kinds = Counter(ask(q.text, strategy, i) in known for i, q in enumerate(asked[::40]) for strategy in STRATEGIES)
    assert kinds[False] / kinds.total() > 0.4, kinds
