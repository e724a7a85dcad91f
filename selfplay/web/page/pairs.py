"""The pair browser: the index of pairs with its filters, and one pair with all that decided on it."""

from __future__ import annotations

import asyncio
from typing import Any

from nicegui import ui

from selfplay.errors import InputError
from selfplay.reporting import word_diff
from selfplay.storage import paging
from selfplay.web.api_models import PairDetail, PairRow, Response
from selfplay.web.page.parts import Column, Pages, Words, card, frame, heading, later, numbers, pager, some, table
from selfplay.web.view import View

PAGE = 25
PATIENCE = 8  # short reads for one page of a filter that hardly anything passes
SORTS = {
    "potential": "potential",
    "explicit_margin": "explicit margin",
    "implicit_margin": "implicit margin",
    "round": "round",
}
COLUMNS = (
    Column("pair", "Pair", "text", link="to"), Column("why", "", "chip"), Column("reason", "because", "text"),
    Column("potential", "Potential"), Column("explicit", "Explicit"), Column("implicit", "Implicit"),
    Column("prompt", "Prompt", "wide"),
)  # fmt: skip


def mount(view: View, logout: bool) -> None:
    @ui.page("/pairs")
    async def pairs(round: int | None = None, prompt_id: str | None = None) -> None:
        with frame(view, "/pairs", logout, "Pairs"):
            if round is None and prompt_id is None:
                newest = await asyncio.to_thread(view.store.query, "SELECT max(round) AS round FROM pairs")
                round = newest[0]["round"]
            browser(view, round, prompt_id)

    @ui.page("/pairs/{round}/{row}")
    def pair(round: int, row: int) -> None:
        async def fill() -> None:
            known = 0 <= round < 2**31 and 0 <= row < 2**31
            found = await asyncio.to_thread(view.pair, round, row) if known else None
            if found is None:
                heading("h1", "There is no such pair")
                ui.label("Its artifacts may have been deleted.").classes("soft")
                return
            marked = await asyncio.to_thread(word_diff.compare, found.chosen.text, found.rejected.text)
            detail(found, *marked)

        with frame(view, "/pairs", logout, f"Pair {round}/{row}"):
            later(fill)


def browser(view: View, round: int | None, prompt_id: str | None) -> None:
    """Filters, and below them a page of pairs."""
    pages = Pages()
    asked: dict[str, Any] = {}

    async def search() -> None:
        pages.before.clear()
        pages.here = None
        asked["where"] = paging.PairFilter(
            round=None if number.value is None else int(number.value),
            kept={"kept": True, "dropped": False}.get(kept.value), reason=(reason.value or "").strip() or None,
            prompt_id=(prompt.value or "").strip() or None,
            **{name: (low.value, high.value) for name, (low, high) in ranges.items()},
        )  # fmt: skip
        asked["sort"], asked["descending"] = sort.value, order.value == "highest first"
        await show()

    async def show() -> None:
        try:
            rows = await asyncio.to_thread(read)
        except InputError as error:
            ui.notify(str(error), type="negative")
            return
        texts = await asyncio.to_thread(view.prompts, rows)
        body.clear()
        with body:
            if not rows:
                ui.label("No pair passes the filter." if pages.next is None else "None yet: go on with Next.").classes(
                    "soft"
                )
            else:
                table(COLUMNS, [pair_row(p, texts.get((p.round, p.prompt_id), "")) for p in rows], "pair")
            if asked["deleted"] and pages.next is None:
                ui.label(asked["deleted"]).classes("soft")
            pager(pages, show)

    def read() -> list[PairRow]:
        rows: list[PairRow] = []
        asked["deleted"] = ""
        pages.next = pages.here
        for _ in range(PATIENCE):
            page = view.pairs(asked["where"], asked["sort"], asked["descending"], pages.next, PAGE - len(rows))
            rows, pages.next, asked["deleted"] = rows + page.pairs, page.next, page.deleted
            if pages.next is None or len(rows) == PAGE:
                break
        return rows

    with card("Pairs", "One base pair of each prompt: highest against lowest reward. Without a round: of all rounds."):
        with ui.element("form").classes("filters").on("submit.prevent", search):
            small = "dense outlined clearable"
            number = ui.number("Round", value=round, min=0, max=2**31 - 1, precision=0).props(small)
            kept = ui.select(["all", "kept", "dropped"], value="all", label="Kept").props("dense outlined")
            sort = ui.select(SORTS, value="potential", label="Sort by").props("dense outlined")
            order = ui.select(["highest first", "lowest first"], value="highest first", label="Order").props(
                "dense outlined"
            )
            ui.button("Show").props('type="submit" no-caps unelevated')
            with ui.element("details").props("open" if prompt_id else ""):
                heading("summary", "More filters")
                with ui.element("div").classes("filters"):
                    reason = ui.input("Because").props(small)
                    prompt = ui.input("Prompt id", value=prompt_id or "").props(small).classes("long")
                    ranges = {}
                    for name, label in (
                        ("potential", "Potential"),
                        ("explicit_margin", "Explicit"),
                        ("implicit_margin", "Implicit"),
                    ):
                        ranges[name] = tuple(
                            ui.number(f"{label} {sign}").props(f"{small} step=any") for sign in ("≥", "≤")
                        )
        body = ui.element("div").style("margin-top: .75rem")
    later(search)


def pair_row(pair: PairRow, prompt: str) -> dict[str, str]:
    return {
        "pair": f"{pair.round}/{pair.row}", "to": f"/pairs/{pair.round}/{pair.row}",
        "why": "kept" if pair.kept_because else "dropped", "reason": pair.kept_because or pair.dropped_because or "",
        "potential": some(pair.potential), "explicit": some(pair.explicit_margin), "implicit": some(pair.implicit_margin),
        "prompt": prompt or pair.prompt_id,
    }  # fmt: skip


def detail(p: PairDetail, chosen: list[word_diff.Part], rejected: list[word_diff.Part]) -> None:
    """One pair: prompt, both responses with the words that differ, every number that decided."""
    with ui.element("div").classes("row-wrap"):
        heading("h1", f"Pair {p.row} of round {p.round}")
        ui.label("kept" if p.kept_because else "dropped").classes(f"chip {'kept' if p.kept_because else 'dropped'}")
        if p.row:
            ui.link("‹ previous", f"/pairs/{p.round}/{p.row - 1}")
        ui.link("next ›", f"/pairs/{p.round}/{p.row + 1}")
        ui.link("this prompt in all rounds", f"/pairs?prompt_id={p.prompt_id}")
    with card("Prompt"):
        for message in p.messages:
            ui.label(message.get("role", "")).classes("role")
            Words(word_diff.reveal([("same", message.get("content", ""))]))
        if not p.messages:
            ui.label("Its artifact is gone.").classes("soft")
    with ui.element("div").classes("sides"):
        for name, response, parts in (("Chosen", p.chosen, chosen), ("Rejected", p.rejected, rejected)):
            with card(name) as place:
                place.classes(name.lower())
                ui.label(side(response)).classes("soft small")
                Words(parts)
    with card("Why"):
        numbers(decided(p))


def side(r: Response) -> str:
    mean = f", {r.logp / r.tokens:.4f} a token" if r.tokens else ""
    return f"reward {r.reward:.4f} · {r.tokens} tokens · log-probability {r.logp:.3f} nats{mean}"


def decided(p: PairDetail) -> list[tuple[str, str]]:
    """Every number that decided on a pair, in the order in which they did."""
    kept = p.kept_because is not None
    s = p.settings
    why = {
        "noise": f"explicit margin at or below the reward's noise ({s.get('noise')})",
        "nonfinite": "a value that is not finite",
        "disagreement": f"the ensemble disputes one of its answers (limit {s.get('max_disagreement')})",
    }.get(p.dropped_because or "", f"below the share that is kept ({s.get('keep')}) by {p.dropped_because}")
    rows = [
        ("verdict", f"kept ({p.kept_because})" if kept else f"dropped: {why}"),
        ("explicit margin", f"{p.explicit_margin:.5f} reward units (chosen − rejected)"),
        (
            "implicit margin",
            f"{some(p.implicit_margin, '.5f')} (signed {p.implicit_signed:+.5f}), kind {s.get('implicit', 'simpo')}",
        ),
        ("alignment potential", f"{some(p.potential, '.4f')} = z(explicit) − {s.get('weight', 1)} · z(implicit)"),
        ("rank by potential", f"{p.rank} of {p.ranked}" if p.rank else "–"),
        ("lowest potential kept", some(p.lowest_kept, ".4f")),
        ("selected by", f"{s.get('selection', '–')}, share {s.get('keep', '–')}"),
        ("gradient cluster", "–" if p.cluster is None else str(p.cluster)),
        ("closeness to its centre", some(p.closeness, ".4f")),
        ("pairs added to the prompt", str(p.added)),
        ("prompt id", p.prompt_id),
    ]
    return rows
