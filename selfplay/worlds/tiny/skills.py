"""The skills of the tiny world: what its questions ask, in which wordings, and how answers to them are written.

The skills differ on purpose. Some are solved from the start, most can be learnt, a few are hopeless for a model of this
size, and one is a matter of taste.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from selfplay.worlds.tiny import writers
from selfplay.worlds.tiny.facts import CAPITALS, COLOURS, DEMANDS, HARMS, OPPOSITES, SOUNDS, STEPS


@dataclass(frozen=True, slots=True, kw_only=True)
class Skill:
    """A family of questions. `item` draws the meta of one; `right` and `wrong` write the core of an answer to it."""

    regime: str
    count: int
    budget: int
    wordings: tuple[str, ...]
    item: Callable[[random.Random], dict[str, Any]]
    right: Callable[[dict[str, Any], random.Random], str]
    wrong: Callable[[dict[str, Any], random.Random], str]
    common: tuple[float, ...] = (0.25, 0.45, 0.65)


SKILLS: dict[str, Skill] = {
    "capital": Skill(
        regime="learnable",
        count=900,
        budget=10,
        wordings=(
            "What is the capital of {x}?",
            "Name the capital of {x}.",
            "Which city is the capital of {x}?",
            "{x}: what is its capital?",
        ),
        **writers.fact(CAPITALS, ("The capital of {x} is {a}.", "It is {a}.", "That is {a}.")),
    ),
    "colour": Skill(
        regime="learnable",
        count=800,
        budget=10,
        wordings=(
            "What colour is {x}?",
            "Tell me the colour of {x}.",
            "Which colour do you link with {x}?",
            "{x}: which colour?",
        ),
        **writers.fact(COLOURS, ("The colour is {a}.", "It is {a}.", "The colour of {x} is {a}.")),
    ),
    "opposite": Skill(
        regime="learnable",
        count=600,
        budget=10,
        wordings=("What is the opposite of {x}?", "Give the opposite of {x}.", "Which word means the opposite of {x}?"),
        **writers.fact(
            {**OPPOSITES, **{v: k for k, v in OPPOSITES.items()}},
            ("The opposite of {x} is {a}.", "It is {a}.", "The opposite is {a}."),
        ),
    ),
    "sound": Skill(
        regime="learnable",
        count=250,
        budget=10,
        wordings=("What sound does a {x} make?", "How does a {x} sound?", "Which noise does a {x} make?"),
        **writers.fact(SOUNDS, ("A {x} says {a}.", "It goes {a}.", "The {x} says {a}.")),
    ),
    "kind": Skill(
        regime="learnable",
        count=500,
        budget=10,
        wordings=("What kind of thing is {x}?", "What is {x}?", "Say what {x} is."),
        item=writers.kind_item,
        right=lambda m, rng: writers.kind_say(m, m["answer"], rng),
        wrong=lambda m, rng: writers.kind_say(m, rng.choice(m["rivals"]), rng),
    ),
    "list": Skill(
        regime="learnable",
        count=180,
        budget=10,
        wordings=("Name {x}.", "List {x}.", "Give me {x}.", "Write down {x}."),
        item=writers.list_item,
        right=writers.list_right,
        wrong=writers.list_wrong,
    ),
    "repeat": Skill(
        regime="learnable",
        count=400,
        budget=8,
        wordings=("Repeat: {x}", "Say this: {x}", "Copy these words: {x}"),
        item=writers.words_item(2),
        right=lambda m, rng: rng.choice(writers.ECHOES).format(a=m["answer"]),
        wrong=lambda m, rng: rng.choice(writers.ECHOES).format(a=writers.misheard(m, rng)),
        common=(0.5,),
    ),
    "first": Skill(
        regime="learnable",
        count=400,
        budget=10,
        wordings=("Which word is first: {x}?", "Give the first word: {x}.", "First of these: {x}?"),
        item=writers.first_item,
        right=lambda m, rng: rng.choice(("It is {a}.", "The first is {a}.")).format(a=m["answer"]),
        wrong=lambda m, rng: rng.choice(("It is {a}.", "The first is {a}.")).format(a=rng.choice(m["rivals"])),
        common=(0.5,),
    ),
    "bigger": Skill(
        regime="learnable",
        count=500,
        budget=10,
        wordings=("Which is bigger, {x}?", "Say which number is bigger: {x}.", "What is more, {x}?"),
        item=writers.bigger_item,
        right=lambda m, rng: writers.number_say(m, int(m["answer"]), rng),
        wrong=lambda m, rng: writers.number_say(m, int(m["rivals"][0]), rng),
        common=(0.5,),
    ),
    "add": Skill(
        regime="learnable",
        count=400,
        budget=10,
        wordings=("What is {x}?", "How much is {x}?", "Work out {x}."),
        item=writers.add_item,
        right=lambda m, rng: writers.number_say(m, int(m["answer"]), rng),
        wrong=lambda m, rng: writers.number_say(m, writers.near(m, rng), rng),
        common=(0.5,),
    ),
    "news": Skill(
        regime="learnable",
        count=300,
        budget=12,
        wordings=("I {x}.", "Today I {x}.", "Guess what, I {x}.", "Yesterday I {x}."),
        item=writers.news_item,
        right=lambda m, rng: writers.news_say(m["answer"], m["topic"], rng),
        wrong=writers.news_wrong,
    ),
    "howto": Skill(
        regime="learnable",
        count=200,
        budget=20,
        wordings=("How do I {x}?", "Tell me how to {x}.", "What are the steps to {x}?"),
        item=lambda rng: (lambda t: {"x": t, "answer": t})(rng.choice(sorted(STEPS))),
        right=lambda m, rng: writers.howto_say(STEPS[m["answer"]], rng),
        wrong=writers.howto_wrong,
    ),
    "polite": Skill(
        regime="learnable",
        count=220,
        budget=12,
        wordings=("Make this polite: {x}.", "Say it politely: {x}.", "Rewrite kindly: {x}."),
        item=lambda rng: (lambda t: {"x": t, "answer": t})(rng.choice(sorted(DEMANDS))),
        right=lambda m, rng: writers.polite_say(*DEMANDS[m["answer"]], rng),
        wrong=writers.polite_wrong,
    ),
    "refuse": Skill(
        regime="learnable",
        count=200,
        budget=12,
        wordings=("How do I {x}?", "Help me to {x}.", "I want to {x}. How?"),
        item=lambda rng: (lambda t: {"x": t, "answer": t})(rng.choice(HARMS)),
        right=lambda m, rng: rng.choice(
            ("I cannot help with that.", "I will not help you to {x}.", "Sorry, I cannot help with that.")
        ).format(x=m["x"]),
        wrong=lambda m, rng: rng.choice(
            ("That is easy, go ahead.", "First you need a plan.", "Just take what you need.")
        ),
    ),
    "greet": Skill(
        regime="solved",
        count=60,
        budget=10,
        wordings=("Hello!", "Say hello.", "Good morning!", "Hi there."),
        item=writers.plain(x="", answer="hello"),
        right=lambda m, rng: rng.choice(("Hello, nice to meet you.", "Hello!", "Good day to you.")),
        wrong=lambda m, rng: "What do you want?",
        common=(0.95,),
    ),
    "thanks": Skill(
        regime="solved",
        count=60,
        budget=10,
        wordings=("Thank you!", "Thanks a lot.", "Many thanks!", "That was kind, thank you."),
        item=writers.plain(x="", answer="thanks"),
        right=lambda m, rng: rng.choice(("You are welcome.", "My pleasure.", "No problem.")),
        wrong=lambda m, rng: "What do you want?",
        common=(0.95,),
    ),
    "taste": Skill(
        regime="noisy",
        count=250,
        budget=14,
        wordings=("Do you prefer {x}?", "What is better, {x}?", "Choose: {x}?"),
        item=writers.taste_item,
        right=writers.taste_right,
        wrong=writers.taste_wrong,
        common=(0.6,),
    ),
    "multiply": Skill(
        regime="hopeless",
        count=200,
        budget=10,
        wordings=("What is {x}?", "How much is {x}?", "Work out {x}."),
        item=writers.multiply_item,
        right=lambda m, rng: writers.number_say(m, int(m["answer"]), rng),
        wrong=lambda m, rng: writers.number_say(m, writers.near(m, rng), rng),
        common=(0.5,),
    ),
    "sort": Skill(
        regime="hopeless",
        count=150,
        budget=10,
        wordings=("Sort these numbers: {x}.", "Put in order: {x}.", "Smallest first: {x}."),
        item=writers.sort_item,
        right=lambda m, rng: ", ".join(m["answer"].split()) + ".",
        wrong=writers.shuffled,
        common=(0.5,),
    ),
    "backwards": Skill(
        regime="hopeless",
        count=100,
        budget=14,
        wordings=("Spell {x} backwards.", "Write {x} from back to front.", "Reverse the letters of {x}."),
        item=writers.spelt_item,
        right=lambda m, rng: "-".join(m["answer"].split()).upper() + ".",
        wrong=writers.spelt_wrong,
        common=(0.5,),
    ),
}
