"""The page: the overview of a run, and the way to the others. NiceGUI on the app of the API, nothing fetched from elsewhere."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import nicegui
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from nicegui import ui

from selfplay.planning.gantt import Span
from selfplay.reporting import gold, suites, who_worked
from selfplay.reporting.words import NOT_INDEPENDENT
from selfplay.storage import figures, paging
from selfplay.storage.ledger import LedgerError
from selfplay.visible import visible, when
from selfplay.web.api_models import Round, RunSummary
from selfplay.web.page import answers as page_answers
from selfplay.web.page import charts as page_charts
from selfplay.web.page import lists as page_lists
from selfplay.web.page import pairs as page_pairs
from selfplay.web.page.parts import (
    Column,
    Pages,
    card,
    confirm,
    follow,
    frame,
    heading,
    order,
    pager,
    short,
    some,
    state,
    table,
    took,
)
from selfplay.web.server import LARGEST_MESSAGE
from selfplay.web.view import View

ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="7" fill="#2563c9"/>'
    '<path d="M8 21a9 9 0 0 1 15-9m1-5v6h-6M24 11a9 9 0 0 1-15 9m-1 5v-6h6" fill="none" stroke="#fff" stroke-width="2.6"/></svg>'
)
ROUNDS = 15  # of the table on the overview
LONGEST_TEXT = LARGEST_MESSAGE // 4  # characters of prompts typed or pasted; a browser sends up to three bytes for each


def mount(app: FastAPI, view: View, logout: bool) -> None:
    """Put the pages on an app, below everything that it has already."""

    @app.api_route("/api/{path:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"], include_in_schema=False)
    def absent(path: str) -> JSONResponse:
        return JSONResponse({"detail": f"there is no /api/{path}"}, 404)

    ui.add_head_html(f"<style>{(Path(__file__).parent / 'page.css').read_text(encoding='utf-8')}</style>", shared=True)

    @ui.page("/")
    async def overview() -> None:
        summary = await asyncio.to_thread(view.summary)
        with frame(view, "/", logout, "Overview"):
            glance(view, summary)
            charts(view)
            rounds(view)

    page_pairs.mount(view, logout)
    page_answers.mount(view, logout)
    page_lists.mount(view, logout)
    nicegui.app.on_page_exception(broken)
    nicegui.app.colors(primary="#2563c9")
    ui.run_with(
        app, title="selfplay", dark=None, favicon=ICON, tailwind=False, gzip_middleware_factory=None,
        show_welcome_message=False, language="en-US",
    )  # fmt: skip


def broken(error: Exception) -> None:
    """What a page that could not be made shows: nothing of the inside of the program."""
    locked = isinstance(error, LedgerError)
    heading("h1", "The ledger does not answer" if locked else "This page could not be made")
    ui.label("Try again in a moment." if locked else "The log of the service says why.")


def glance(view: View, summary: RunSummary) -> None:
    """State, reason, next round, current stage with progress, counts; kept up to date."""
    with card():
        with ui.element("div").classes("row-wrap"):
            chip = ui.label("").classes("chip")
            now = ui.label("")
        why = ui.label("").classes("why soft")
        gate = ui.label(NOT_INDEPENDENT).classes("soft small")
        webhook = ui.label("").classes("why")
        bar = ui.linear_progress(0, show_value=False, size="6px").props("rounded").style("margin: .5rem 0 .8rem")
        names = ("Next round", "Serves", "Rounds", "Orders waiting", "Restarts", "Disk free")
        values: dict[str, ui.label] = {}
        with ui.element("div").classes("facts"):
            for name in names:
                with ui.element("div"):
                    ui.label(name)
                    values[name] = ui.label("")
        buttons(view)

    def show(run: RunSummary) -> None:
        s = run.service
        state(chip, s.state)
        where = f"round {s.round}: " if s.round is not None else ""
        now.set_text(f"{where}{s.stage}" if s.stage else {"waiting": "for the next round"}.get(s.state, ""))
        count = f"{s.done}/{s.total} {s.unit}" if s.total else f"{s.done} {s.unit}" if s.done else ""
        said = (s.why, count, s.text, took(s.seconds) if s.stage else "")
        why.set_text(visible(" · ".join(part for part in said if part)))
        gate.set_visibility(not run.gate_independent)
        webhook.set_text(run.webhook)
        webhook.set_visibility(bool(run.webhook))
        bar.set_visibility(s.stage is not None)
        bar.set_value(min(s.done / s.total, 1.0) if s.total else 0.0)
        bar.props(remove="indeterminate") if s.total else bar.props("indeterminate")
        values["Next round"].set_text(when(s.next_round) or ("now" if s.state == "running" else "–"))
        values["Serves"].set_text("–" if run.current_policy is None else f"policy {run.current_policy}")
        states = ("promoted", "rejected", "skipped", "cancelled", "running")
        done = [f"{n} {name}" for name in states if (n := run.rounds.get(name))]
        values["Rounds"].set_text(", ".join(done) or "none yet")
        values["Orders waiting"].set_text(str(run.orders_pending))
        values["Restarts"].set_text(str(run.restarts))
        values["Disk free"].set_text(f"{run.free_bytes / 1e9:.1f} GB")

    async def look() -> None:
        show(await asyncio.to_thread(view.summary))

    show(summary)
    follow(1.0, look)


def buttons(view: View) -> None:
    """The orders, each as a button; what cannot be taken back asks first."""
    with ui.element("div").classes("row-wrap").style("margin-top: .9rem"):
        style = "no-caps outline dense padding='2px 10px'"
        ui.button("Run now", on_click=lambda: order(view, "run")).props(style)
        with ui.dropdown_button("Pause", auto_close=True).props(style):
            ui.item("after the round", on_click=lambda: order(view, "pause", after="round"))
            ui.item("after the stage", on_click=lambda: order(view, "pause", after="stage"))
        ui.button("Resume", on_click=lambda: order(view, "resume")).props(style)
        ui.button(
            "Cancel the round",
            on_click=lambda: confirm(
                "Cancel the round", "What the open round did so far is given up; the current policy serves on.",
                "Cancel the round", lambda: order(view, "cancel"),
            ),
        ).props(style)  # fmt: skip
        ui.button("Add prompts", on_click=lambda: add_prompts(view)).props(style)
        ui.button("Reload configuration", on_click=lambda: order(view, "reload")).props(style)


def add_prompts(view: View) -> None:
    """Ask for prompts, one a line or as JSON lines, and order that they join the pool."""

    async def go() -> None:
        if len(text.value or "") >= LONGEST_TEXT:
            ui.notify(f"cut off after {LONGEST_TEXT} characters: use `selfplay add-prompts FILE`", type="negative")
            return
        lines = [line for line in (text.value or "").splitlines() if line.strip()]
        try:
            rows = [json.loads(line) if line.lstrip().startswith("{") else {"prompt": line} for line in lines]
        except ValueError as error:
            ui.notify(f"not JSON: {error}", type="negative")
            return
        if await order(view, "add_prompts", rows=rows):
            dialog.close()

    with ui.dialog() as dialog, ui.card().style("width: min(44rem, 92vw)"):
        heading("h2", "Add prompts")
        ui.label(
            "One prompt a line, or JSON lines with `prompt` or `messages`. They join the pool between rounds. A longer text than "
            f"{LONGEST_TEXT:,} characters is for `selfplay add-prompts FILE`."
        ).classes("soft small")
        text = ui.textarea().props(f"outlined autogrow maxlength={LONGEST_TEXT}").classes("full-width")
        with ui.element("div").classes("row-wrap"):
            ui.button("Add", on_click=go).props("no-caps unelevated")
            ui.button("Not now", on_click=dialog.close).props("no-caps flat")
    dialog.open()


def charts(view: View) -> None:
    """The charts by round; drawn after the page is there, and again when another round has ended."""
    grid = ui.element("div").classes("charts")
    drawn: list[dict[str, int]] = []

    async def draw() -> None:
        counts = await asyncio.to_thread(view.store.count_rounds)
        if drawn and drawn[-1] == counts:
            return
        shown, metrics, rejected = await asyncio.to_thread(charted, view)
        last, spans = await asyncio.to_thread(worked, view)
        drawn.append(counts)
        grid.clear()
        with grid:
            for chart in shown:
                options = page_charts.options(chart, metrics, rejected)
                if options is not None:
                    with card(chart.title, chart.caption):
                        ui.echart(options)
            bars = page_charts.who_worked(spans)
            if bars is not None:
                with card("Who worked when", f"round {last}: {page_lists.WORKED}"):
                    ui.echart(bars)

    follow(3.0, draw)


def charted(view: View) -> tuple[list[page_charts.Chart], page_charts.Metrics, list[int]]:
    """The charts, the metrics by round that they show (of a long run some rounds only), and which rounds were rejected."""
    shown = page_charts.charts(gold.recorded(view.store), suites.recorded(view.store))
    bands = [chart.band for chart in shown if chart.band is not None]
    metrics = figures.trends(view.store, page_charts.names(shown), bands)
    return shown, metrics, figures.rejected(view.store, metrics)


def worked(view: View) -> tuple[int, list[Span]]:
    """The newest round that has ended, and who worked in it when."""
    ended = [row["round"] for row in paging.rounds(view.store, limit=2) if row["state"] != "running"]
    last = ended[0] if ended else 0
    return last, who_worked.spans(paging.stages(view.store, last), view.store.metrics(last))


def rounds(view: View) -> None:
    """The rounds, newest first; the first page follows the run."""
    pages = Pages()
    with card("Rounds"):
        body = ui.element("div")
    shown: list[list[Round]] = []

    async def show() -> None:
        found = await asyncio.to_thread(view.rounds, pages.here, ROUNDS)
        if shown and shown[-1] == found:
            return
        shown[:] = [found]
        pages.next = found[-1].round if len(found) == ROUNDS and found[-1].round > 1 else None
        body.clear()
        with body:
            if not found:
                ui.label("No round has begun yet.").classes("soft")
                return
            table(ROUND_COLUMNS, [round_row(r) for r in found], "round")
            pager(pages, show)

    follow(2.0, show)


ROUND_COLUMNS = (
    Column("round", "Round", link="to"), Column("state", "Verdict", "chip"), Column("reward", "Reward"),
    Column("win_rate", "Win rate"), Column("pairs", "Pairs kept"), Column("beta", "β"), Column("kl", "KL"),
    Column("length", "Length"), Column("seconds", "Time"), Column("reasons", "Why", "wide"),
)  # fmt: skip


def round_row(r: Round) -> dict[str, str]:
    x = r.metrics
    bounds = (
        f" [{x['evaluate/win_rate_low']:.2f}, {x['evaluate/win_rate_high']:.2f}]"
        if "evaluate/win_rate_high" in x
        else ""
    )
    return {
        "round": str(r.round), "to": f"/rounds/{r.round}", "state": r.state,
        "reward": " → ".join(some(x[n]) for n in ("evaluate/reward_champion", "evaluate/reward") if n in x) or "–",
        "win_rate": some(x.get("evaluate/win_rate")) + bounds,
        "pairs": f"{x['pairs/kept']:.0f} of {x['pairs/base']:.0f}" if {"pairs/kept", "pairs/base"} <= x.keys() else "–",
        "beta": some(x.get("train/beta"), ".4g"), "kl": some(x.get("evaluate/kl_current"), ".2f"),
        "length": some(x.get("evaluate/length_ratio"), ".2f"), "seconds": took(r.seconds), "reasons": short("; ".join(r.reasons)),
    }  # fmt: skip
