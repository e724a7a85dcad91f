"""Requests are made while earlier ones are under way: what is looked at, what stays together, what is left out."""

import json
import threading
from collections.abc import Container, Sequence
from typing import Any

import pytest

from reward.dialects import Selfplay
from reward.requests import SLICE, Requests, check

Messages = list[dict[str, str]]


def messages(number: int) -> Messages:
    return [{"role": "user", "content": f"question {number}"}]


def requests(items: Any, known: Container[int] = (), batch_size: int = 8, batch_bytes: int = 2**20) -> Requests:
    return Requests(
        items,
        [None] * len(items),
        known,
        dialect=Selfplay(),
        tokenizer=threading.Lock(),
        batch_size=batch_size,
        batch_bytes=batch_bytes,
    )


def places(made: Requests) -> list[list[int]]:
    found = []
    while (chunk := made.take()) is not None:
        found.append([entry.place for entry in chunk])
    return found


class Noted(Sequence[tuple[Messages, str]]):
    """So many items, which are made when they are looked at; `looked` is the highest place so far."""

    def __init__(self, count: int, prompts: int) -> None:
        self._count, self._prompts, self.looked = count, prompts, -1

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: Any) -> Any:
        self.looked = max(self.looked, place)
        return messages(place * self._prompts // self._count), f"answer {place}"


@pytest.mark.parametrize("prompts", [1, 1250, 10_000])
def test_no_more_is_looked_at_than_a_request_and_a_slice(prompts: int) -> None:
    items = Noted(10_000, prompts)
    made = requests(items)
    for number in range(1, 6):
        assert len(made.take() or []) == 8
        assert items.looked < 8 * number + SLICE + 8
    assert [place for chunk in places(made) for place in chunk] == list(range(40, 10_000))


def test_what_is_known_is_left_out_of_requests_that_stay_what_they_are() -> None:
    items = [(messages(place // 3), f"answer {place}") for place in range(200)]
    whole = places(requests(items))
    assert whole[:2] == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    known = {1, *range(6, 12), 199}
    left = [[place for place in chunk if place not in known] for chunk in whole]
    assert places(requests(items, known)) == [chunk for chunk in left if chunk]


def test_equal_messages_are_one_prompt_whatever_list_they_are_in() -> None:
    items = [(tuple(messages(0)) if place % 2 else messages(0), "a") for place in range(4)]
    items += [(messages(1), "b")] * 5
    assert places(requests(items)) == [[0, 1, 2, 3], [4, 5, 6, 7, 8]]


def test_an_item_is_written_as_json_has_it() -> None:
    items = [
        ([*messages(0), {"role": "assistant", "content": 'é "\n\x00'}], "日本 \\ \u2028 😀"),
        (messages(0), "\ud800"),
    ]
    made = requests(items)
    (entry,) = made.take() or []
    sent = json.loads(Selfplay().request([entry]))
    assert sent == {"items": [{"messages": items[0][0], "response": items[0][1], "id": entry.id}]}
    assert made.take() is None
    assert [(bad.place, bad.reason) for bad in made.bad] == [(1, "text that is not valid Unicode (a lone surrogate)")]


def test_what_is_no_item_is_named_before_anything_is_sent() -> None:
    good = (messages(0), "a")
    check([good, good], [None, "right"])
    bad: list[Any] = [([], "a"), ("text", "a"), ([{"role": "a b", "content": "c"}], "a"), (messages(0), 1)]
    for item in bad:
        with pytest.raises(ValueError, match="item 2 is no conversation with a response"):
            check([good, good, item], [None] * 3)
    with pytest.raises(ValueError, match="item 0"):
        check([good], [1])  # type: ignore[list-item]
