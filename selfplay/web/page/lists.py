"""The pages of one round, of the policies, and of events and orders."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from nicegui import ui

from selfplay.reporting import who_worked
from selfplay.reporting.terminal import STAGES
from selfplay.reporting.words import NOT_INDEPENDENT, verdict
from selfplay.visible import visible, when
from selfplay.web.api_models import PolicyRow, RoundDetail
from selfplay.web.page import charts as page_charts
from selfplay.web.page.parts import (
    Pages,
    card,
    confirm,
    facts,
    follow,
    frame,
    heading,
    later,
    numbers,
    order,
    pager,
    some,
    took,
)
from selfplay.web.view import View

PAGE = 30
KEPT = "base"  # why a base pair is kept, in the index of pairs
WORKED = "seconds of the stages, by the role that worked, and the share of the round that it worked"
VALUES = (("potential", "Alignment potential", "standard deviations"), ("explicit_margin", "Explicit margin", "reward units"),
          ("implicit_margin", "Implicit margin", "nats a token"))  # fmt: skip


def mount(view: View, logout: bool) -> None:
    @ui.page("/rounds/{round}")
    def one(round: int) -> None:
        shown: list[RoundDetail | None] = []

        async def look() -> None:
            if shown and shown[-1] is not None and shown[-1].state != "running":
                return  # nothing of it changes any more
            found = await asyncio.to_thread(view.round, round) if 0 <= round < 2**31 else None
            if shown and shown[-1] == found:
                return
            shown[:] = [found]
            body.clear()
            with body:
                if found is None:
                    heading("h1", f"There is no round {round}")
                else:
                    round_page(view, found)

        with frame(view, "/", logout, f"Round {round}"):
            body = ui.element("div").classes("page")
            follow(3.0, look)

    @ui.page("/policies")
    def policies() -> None:
        with frame(view, "/policies", logout, "Policies"):
            policy_list(view)

    @ui.page("/log")
    def log() -> None:
        with frame(view, "/log", logout, "Log"):
            order_list(view)
            event_list(view)


def round_page(view: View, r: RoundDetail) -> None:
    with ui.element("div").classes("row-wrap"):
        heading("h1", f"Round {r.round}")
        ui.label(r.state).classes(f"chip {r.state}")
        if r.round > 1:
            ui.link(f"‹ round {r.round - 1}", f"/rounds/{r.round - 1}")
        ui.link(f"round {r.round + 1} ›", f"/rounds/{r.round + 1}")
        ui.link("its pairs", f"/pairs?round={r.round}")
    with card():
        ui.label(visible(verdict(r.state, r.policy, r.reasons))).classes("why")
        if r.metrics.get("evaluate/independent") == 0:
            ui.label(NOT_INDEPENDENT).classes("soft small")
        for sentence in r.deleted:
            ui.label(sentence).classes("soft small")
        facts(
            [("began", when(r.started)), ("ended", when(r.ended) or "not yet"), ("in stages", took(r.seconds)),
             ("sampled by", f"policy {r.sampler}"), ("base pairs", kept_and_dropped(r.pairs)),
             ("configuration", r.fingerprint[:12])]
        )  # fmt: skip
    grid = ui.element("div").classes("charts")
    with card("Metrics"), ui.element("div").classes("groups"):
        groups: dict[str, list[tuple[str, str]]] = {
            stage: [] for stage in STAGES if any(n.startswith(f"{stage}/") for n in r.metrics)
        }
        for name, value in r.metrics.items():
            stage, _, rest = name.partition("/")
            groups.setdefault(stage, []).append((rest, some(value, ".5g")))
        for stage, rows in groups.items():
            with ui.element("div"):
                heading("h2", stage)
                numbers(rows)

    async def draw() -> None:
        charts: list[tuple[str, str, dict[str, Any] | None]] = []
        for column, title, unit in VALUES:
            found = await asyncio.to_thread(view.histogram, r.round, column)
            charts.append((title, f"base pairs by it, {unit}", page_charts.histogram(found)))
        spans = who_worked.spans([stage.model_dump() for stage in r.stages], r.metrics)
        charts.append(("Who worked when", WORKED, page_charts.who_worked(spans)))
        with grid:
            for title, caption, options in charts:
                if options is not None:
                    with card(title, caption):
                        ui.echart(options)

    later(draw)


def policy_list(view: View) -> None:
    """All policies, newest first, with what can be ordered of each."""
    shown: list[list[PolicyRow]] = []
    pages = Pages()

    async def show() -> None:
        found = await asyncio.to_thread(view.policies, pages.here, PAGE)
        if shown and shown[-1] == found:
            return
        shown[:] = [found]
        pages.next = found[-1].version if len(found) == PAGE and found[-1].version > 0 else None
        body.clear()
        with body:
            if not found:
                ui.label("The initial policy is not imported yet.").classes("soft")
            for policy in found:
                policy_card(view, policy)
            pager(pages, show)

    heading("h1", "Policies")
    body = ui.element("div").style("display: grid; gap: .6rem")
    follow(2.0, show)


def policy_card(view: View, p: PolicyRow) -> None:
    with card(), ui.element("div").classes("row-wrap"):
        heading("h2", f"Policy {p.version}").style("min-width: 5.5rem; margin: 0")
        ui.label("serves" if p.current else p.state).classes(f"chip {'running' if p.current else p.state}")
        said = [
            f"round {p.round}" if p.round else "the initial one",
            f"from policy {p.parent}" if p.parent is not None else "",
            f"reference {p.reference}" if p.reference is not None else "",
            f"β {p.beta:.4g}" if p.beta is not None else "",
            "pinned" if p.pinned else "",
            "" if p.weights else "weights deleted",
        ]
        ui.label(" · ".join(part for part in said if part)).classes("soft small")
        if not p.weights:
            return
        with ui.element("div").classes("row-wrap").style("margin-left: auto"):
            pin = ui.button(
                "Unpin" if p.pinned else "Pin",
                on_click=lambda: order(view, "pin", version=p.version, pinned=not p.pinned),
            )
            pin.props("no-caps flat dense")
            if not p.current:
                ui.button(
                    "Roll back",
                    on_click=lambda: confirm(
                        f"Roll back to policy {p.version}",
                        "Between rounds it is swapped into the generator, verified, and serves from then on.",
                        "Roll back", lambda: order(view, "rollback", version=p.version),
                    ),
                ).props("no-caps outline dense padding='2px 10px'")  # fmt: skip


def order_list(view: View) -> None:
    def read(before: int | None) -> list[tuple[int, str, str, str, str]]:
        return [
            (o.id, f"{when(o.time)} · {o.origin}", o.kind.replace("_", " "), o.state, " ".join(
                [*(f"{name} {value}" for name, value in o.arguments.items()), f"→ {o.result}" if o.result else ""]))
            for o in view.orders(before, limit=PAGE)
        ]  # fmt: skip

    listing("Orders", "No order was given yet.", read)


def event_list(view: View) -> None:
    def read(before: int | None) -> list[tuple[int, str, str, str, str]]:
        return [
            (
                e.id,
                when(e.time),
                e.kind.replace("_", " "),
                "",
                f"round {e.round}: {e.text}" if e.round is not None else e.text,
            )
            for e in view.events(before, limit=PAGE)
        ]

    listing("Events", "Nothing has happened yet.", read)


def listing(title: str, nothing: str, read: Callable[[int | None], list[tuple[int, str, str, str, str]]]) -> None:
    """A list of (number, when, what, state, text), newest first, by pages; the first page follows what happens."""
    pages = Pages()
    shown: list[Any] = []
    with card(title):
        body = ui.element("div")

    async def show() -> None:
        rows = await asyncio.to_thread(read, pages.here)
        if shown and shown[-1] == rows:
            return
        shown[:] = [rows]
        pages.next = rows[-1][0] if len(rows) == PAGE else None
        body.clear()
        with body:
            if not rows:
                ui.label(nothing).classes("soft")
            for _, time, what, state, text in rows:
                with ui.element("div").classes("entry"):
                    ui.label(time).classes("soft")
                    with ui.element("div").classes("row-wrap"):
                        ui.label(what).classes("what")
                        if state:
                            ui.label(state).classes(f"chip {state}")
                    ui.label(visible(text)).classes("why")
            pager(pages, show)

    follow(2.0, show)


def kept_and_dropped(pairs: Mapping[str, int]) -> str:
    """«153 kept, 39 dropped (potential)», from base pairs by why they were kept or dropped."""
    kept, dropped = pairs.get(KEPT, 0), {why: n for why, n in pairs.items() if why != KEPT}
    if not dropped:
        return f"{kept} kept" if kept else "–"
    why = ", ".join(dropped) if len(dropped) == 1 else ", ".join(f"{n} {why}" for why, n in dropped.items())
    return f"{kept} kept, {sum(dropped.values())} dropped ({why})"
