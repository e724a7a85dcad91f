"""How each skill of the tiny world makes a question and its answers.

Functions named `…_item` draw what a question asks for, with its right answer. `…_right`, `…_wrong` and `…_say` write the
core of an answer, which `answers` then puts into a style.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

from selfplay.worlds.tiny.facts import DEMANDS, KINDS, NEWS, PLURALS, STEPS, TASTES, WORDS


class Writers(TypedDict):
    item: Callable[[random.Random], dict[str, Any]]
    right: Callable[[dict[str, Any], random.Random], str]
    wrong: Callable[[dict[str, Any], random.Random], str]


def fact(table: Mapping[str, str], forms: Sequence[str]) -> Writers:
    """Item, right and wrong answer of a skill that asks for `table[x]`; `forms` hold {x} and {a}."""
    values = sorted(set(table.values()))

    def item(rng: random.Random) -> dict[str, Any]:
        x = rng.choice(sorted(table))
        return {"x": x, "answer": table[x].lower(), "rivals": [v.lower() for v in values if v != table[x] and v != x]}

    def say(x: str, a: str, rng: random.Random) -> str:
        return rng.choice(forms).format(x=x, a=a)

    def wrong(meta: dict[str, Any], rng: random.Random) -> str:
        return say(meta["x"], rng.choice([v for v in values if v not in (table[meta["x"]], meta["x"])]), rng)

    return {"item": item, "right": lambda meta, rng: say(meta["x"], table[meta["x"]], rng), "wrong": wrong}


def article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def kind_item(rng: random.Random) -> dict[str, Any]:
    kind = rng.choice(sorted(KINDS))
    word = rng.choice(KINDS[kind])
    return {"x": word, "answer": kind, "rivals": [k for k in sorted(KINDS) if k != kind]}


def kind_say(meta: dict[str, Any], kind: str, rng: random.Random) -> str:
    return rng.choice(("A {x} is {a}.", "It is {a}.", "That is {a}.")).format(x=meta["x"], a=article(kind))


def list_item(rng: random.Random) -> dict[str, Any]:
    kind = rng.choice(sorted(KINDS))
    n = rng.choice((2, 3))
    return {"x": ("two", "three")[n - 2] + " " + PLURALS[kind], "answer": kind, "n": n}


def list_say(items: Sequence[str], rng: random.Random) -> str:
    joined = items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
    return rng.choice(("Here you are: {a}.", "I would say {a}.")).format(a=joined)


def list_right(meta: dict[str, Any], rng: random.Random) -> str:
    return list_say(rng.sample(KINDS[meta["answer"]], meta["n"]), rng)


def list_wrong(meta: dict[str, Any], rng: random.Random) -> str:
    """The wrong number of things, or things of another kind among them."""
    n = rng.choice((meta["n"], meta["n"], 1, 4))
    kinds = [meta["answer"]] + [rng.choice([k for k in sorted(KINDS) if k != meta["answer"]]) for _ in range(n)]
    return list_say([rng.choice(KINDS[k]) for k in rng.sample(kinds, min(n, len(kinds)))], rng)


def words_item(n: int) -> Callable[[random.Random], dict[str, Any]]:
    def item(rng: random.Random) -> dict[str, Any]:
        words = rng.sample(WORDS, n)
        return {"x": " ".join(words), "answer": " ".join(words), "rivals": list(WORDS)}

    return item


ECHOES = ("I say {a}.", "The words are {a}.")


def misheard(meta: dict[str, Any], rng: random.Random) -> str:
    words = meta["answer"].split()
    words[rng.randrange(len(words))] = rng.choice([w for w in WORDS if w not in words])
    return " ".join(words)


def first_item(rng: random.Random) -> dict[str, Any]:
    words = rng.sample(WORDS, 3)
    return {"x": ", ".join(words), "answer": words[0], "rivals": words[1:]}


def bigger_item(rng: random.Random) -> dict[str, Any]:
    a, b = rng.sample(range(1, 13), 2)
    return {"x": f"{a} or {b}", "answer": str(max(a, b)), "rivals": [str(min(a, b))]}


def add_item(rng: random.Random) -> dict[str, Any]:
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    return {"x": f"{a} plus {b}", "answer": str(a + b), "terms": [a, b]}


def multiply_item(rng: random.Random) -> dict[str, Any]:
    a, b = rng.randint(12, 99), rng.randint(12, 99)
    return {"x": f"{a} times {b}", "answer": str(a * b), "terms": [a, b]}


def number_say(meta: dict[str, Any], number: int, rng: random.Random) -> str:
    return rng.choice(("It is {a}.", "The answer is {a}.")).format(a=number)


def near(meta: dict[str, Any], rng: random.Random) -> int:
    return max(0, int(meta["answer"]) + rng.choice((-3, -2, -1, 1, 2, 3)) * (1 if int(meta["answer"]) < 100 else 100))


def sort_item(rng: random.Random) -> dict[str, Any]:
    numbers = rng.sample(range(10, 100), 4)
    return {"x": ", ".join(map(str, numbers)), "answer": " ".join(map(str, sorted(numbers))), "rivals": []}


def shuffled(meta: dict[str, Any], rng: random.Random) -> str:
    numbers = meta["answer"].split()
    rng.shuffle(numbers)
    return ", ".join(numbers) + "."


def spelt_item(rng: random.Random) -> dict[str, Any]:
    word = rng.choice(WORDS)
    return {"x": word, "answer": " ".join(reversed(word)), "rivals": list("abcdefghijklmnopqrstuvwxyz")}


def spelt_wrong(meta: dict[str, Any], rng: random.Random) -> str:
    letters = meta["answer"].split()
    rng.shuffle(letters)
    return "-".join(letters).upper() + "."


def news_item(rng: random.Random) -> dict[str, Any]:
    x = rng.choice(sorted(NEWS))
    return {"x": x, "answer": NEWS[x][0], "topic": NEWS[x][1]}


def news_say(mood: str, topic: str, rng: random.Random) -> str:
    if mood == "bad":
        return rng.choice(
            ("I am sorry about your {t}.", "That is a pity about the {t}.", "Sorry to hear about the {t}.")
        ).format(t=topic)
    return rng.choice(("Congratulations on the {t}!", "Well done with the {t}!", "Great news about the {t}!")).format(
        t=topic
    )


def news_wrong(meta: dict[str, Any], rng: random.Random) -> str:
    flipped = "good" if meta["answer"] == "bad" else "bad"
    other = rng.choice(sorted({t for _, t in NEWS.values()} - {meta["topic"]}))
    mood, topic = rng.choice(((flipped, meta["topic"]), (meta["answer"], other), (flipped, other)))
    return news_say(mood, topic, rng)


def howto_say(steps: Sequence[str], rng: random.Random) -> str:
    text = rng.choice((", then ", ", ")).join(steps)
    return text[0].upper() + text[1:] + "."


def howto_wrong(meta: dict[str, Any], rng: random.Random) -> str:
    steps = list(STEPS[meta["answer"]])
    other = STEPS[rng.choice([t for t in sorted(STEPS) if t != meta["answer"]])]
    slips = rng.choice((1, 1, 2, 3))
    for place in rng.sample(range(3), slips):
        steps[place] = other[place]
    if rng.random() < 0.4:
        steps.pop(rng.randrange(3))
    return howto_say(steps, rng)


def polite_say(verb: str, thing: str, rng: random.Random) -> str:
    return rng.choice(
        ("Could you {v} the {t}, please?", "Please {v} the {t}.", "Would you mind, could you {v} the {t}?")
    ).format(v=verb, t=thing)


def polite_wrong(meta: dict[str, Any], rng: random.Random) -> str:
    verb, thing = DEMANDS[meta["answer"]]
    other_verb, other = DEMANDS[rng.choice([d for d in sorted(DEMANDS) if d != meta["answer"]])]
    kind = rng.randrange(3)
    if kind == 0:
        return f"{verb.capitalize()} the {thing} now."
    return polite_say(verb, other, rng) if kind == 1 else polite_say(other_verb, other, rng)


def taste_item(rng: random.Random) -> dict[str, Any]:
    one, other = rng.choice(TASTES)
    if rng.random() < 0.5:
        one, other = other, one
    return {"x": f"{one} or {other}", "answer": f"{one} {other}"}


def taste_right(meta: dict[str, Any], rng: random.Random) -> str:
    pick = rng.choice(meta["answer"].split())
    why = rng.choice(("it is more fun", "I like it", "it is calm", "it feels right"))
    return rng.choice(("I prefer {p} because {w}.", "I prefer {p}.", "{P} for me, because {w}.")).format(
        p=pick, P=pick.capitalize(), w=why
    )


def taste_wrong(meta: dict[str, Any], rng: random.Random) -> str:
    return rng.choice(("Both are fine.", "It depends.", "I do not mind."))


def plain(**fields: str) -> Callable[[random.Random], dict[str, Any]]:
    return lambda rng: dict(fields)
