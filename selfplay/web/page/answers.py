"""What policies say to the audit prompts: prompts down, policies across, with the words marked that the one before lacks."""

from __future__ import annotations

import asyncio

from nicegui import ui

from selfplay.reporting import word_diff
from selfplay.reporting.answers import COLUMNS
from selfplay.web.api_models import AnswerColumn, AnswerPage, AnswerRow
from selfplay.web.page.parts import Pages, Words, card, frame, heading, later, pager, some
from selfplay.web.view import View

PROMPTS = 8  # of a page


def mount(view: View, logout: bool) -> None:
    @ui.page("/answers")
    def answers() -> None:
        with frame(view, "/answers", logout, "Answers"):
            browser(view)


def browser(view: View) -> None:
    """A page of prompts for a page of policies."""
    rounds, prompts = Pages(), Pages()
    with card(
        "Answers", "What policies say to audit prompts, which are the same in every round and never train or gate."
    ):
        body = ui.element("div").classes("answers")

    async def show() -> None:
        found, marked = await asyncio.to_thread(read)
        rounds.next, prompts.next = found.earlier, found.next
        body.clear()
        with body:
            if not found.columns:
                ui.label("No round has had an audit yet (evaluate.audit_every).").classes("soft")
                return
            ui.label(
                "Marked: words that the column before lacks. In brackets: the change of the score from there."
            ).classes("soft small")
            pager(rounds, show, "‹ Later rounds", "Earlier rounds ›")
            grid(found, marked)
            pager(prompts, show, "‹ Prompts before", "Next prompts ›")

    def read() -> tuple[AnswerPage, list[list[list[word_diff.Part]]]]:
        found = view.answers(rounds.here, COLUMNS, prompts.here or 0, PROMPTS)
        return found, [word_diff.along(said.text if said else None for said in row.answers) for row in found.prompts]

    later(show)


def grid(found: AnswerPage, marked: list[list[list[word_diff.Part]]]) -> None:
    """The answers as a table; it scrolls sideways where it is too wide."""
    with ui.element("div").classes("scroll"), ui.element("table").classes("grid"):
        with ui.element("thead"), ui.element("tr"):
            heading("th", "Prompt")
            for column in found.columns:
                with ui.element("th"):
                    title(column)
        with ui.element("tbody"):
            for row, parts in zip(found.prompts, marked, strict=True):
                line(row, parts)


def title(column: AnswerColumn) -> None:
    with ui.element("div").classes("row-wrap"):
        if column.round is None:
            ui.label(f"Policy {column.policy}")
        else:
            ui.link(f"Policy {column.policy}", f"/rounds/{column.round}")
        ui.label(column.state).classes(f"chip {column.state}")
    ui.label(f"mean score {some(column.reward)}").classes("soft small")


def line(row: AnswerRow, parts: list[list[word_diff.Part]]) -> None:
    with ui.element("tr"):
        with ui.element("td"):
            for message in row.messages:
                if len(row.messages) > 1:
                    ui.label(message.get("role", "")).classes("role")
                Words(word_diff.reveal([("same", message.get("content", ""))]))
            if not row.messages:
                ui.label(row.prompt_id).classes("soft small")
        for said, own in zip(row.answers, parts, strict=True):
            with ui.element("td"):
                if said is None:
                    ui.label("not asked").classes("soft small")
                    continue
                ui.label(said.about).classes("soft small")
                Words(own)
                if not said.text.strip():
                    ui.label("an empty answer").classes("soft small")
