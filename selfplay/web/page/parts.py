"""Pieces that the pages are made of. Whatever comes from models, configurations or errors is set as text, never as HTML."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from nicegui import ui
from nicegui.element import Element
from nicegui.elements.mixins.text_element import TextElement

from selfplay.errors import InputError
from selfplay.reporting import word_diff
from selfplay.reporting.words import number
from selfplay.storage.ledger import LedgerError
from selfplay.visible import visible
from selfplay.web.view import View

NAVIGATION = (
    ("Overview", "/"),
    ("Pairs", "/pairs"),
    ("Answers", "/answers"),
    ("Policies", "/policies"),
    ("Log", "/log"),
)
LINK = (
    '<q-td :props="props"><a v-if="props.row[\'{to}\']" :href="props.row[\'{to}\']">{{{{ props.value }}}}</a>'
    "<span v-else>{{{{ props.value }}}}</span></q-td>"
)
CHIP = '<q-td :props="props"><span class="chip" :class="props.value">{{ props.value }}</span></q-td>'


class Words(Element, component="words.js"):
    """Text with marked words (`word_diff`), in a box of its own."""

    def __init__(self, parts: Sequence[word_diff.Part]) -> None:
        super().__init__()
        self._props["parts"] = [list(part) for part in parts]


@contextmanager
def frame(view: View, here: str, logout: bool, title: str) -> Iterator[None]:
    """Head line with the way to the other pages, and the content below it."""
    ui.page_title(f"{title} · {view.config.run.name} · selfplay")
    with ui.header(elevated=False).classes("bar"):
        ui.link(view.config.run.name, "/").classes("name")
        chip = ui.label("").classes("chip")
        with ui.element("nav"):
            for text, to in NAVIGATION:
                ui.link(text, to).classes("here" if to == here else "")
        if logout:
            with ui.element("form").props('method="post" action="/logout"').classes("end"):
                ui.button("Log out").props('type="submit" flat dense no-caps size="sm"')
    watch(chip, view)
    with ui.element("main").classes("page"):
        yield


def watch(chip: ui.label, view: View) -> None:
    """Keep a chip at the state of the service."""

    async def look() -> None:
        state(chip, (await asyncio.to_thread(view.service)).state)

    state(chip, view.service().state)
    follow(2.0, look)


def follow(seconds: float, look: Callable[[], Awaitable[None]]) -> None:
    """Call `look` once the page is there, and again every so many seconds."""

    async def patiently() -> None:
        with contextlib.suppress(LedgerError):  # it is locked for a moment: the next look sees more
            await look()

    ui.timer(seconds, patiently)


def later(build: Callable[[], Awaitable[None]]) -> None:
    """Build the rest of a page once its browser is connected: what models wrote is then never in the document itself."""
    ui.timer(0.0, build, once=True)


def state(chip: ui.label, name: str) -> None:
    if chip.text != name:
        chip.classes(replace=f"chip {name}")
        chip.set_text(name)


@contextmanager
def card(title: str = "", note: str = "") -> Iterator[Element]:
    with ui.element("section").classes("card") as found:
        if title:
            heading("h2", title)
        if note:
            ui.label(note).classes("soft small")
        yield found


def heading(tag: str, text: str) -> Element:
    """An HTML element that holds nothing but text."""
    return TextElement(tag=tag, text=text)


def facts(pairs: Iterable[tuple[str, str]]) -> None:
    """Names with their values, in a grid."""
    with ui.element("div").classes("facts"):
        for name, value in pairs:
            with ui.element("div"):
                ui.label(name)
                ui.label(value)


def numbers(rows: Iterable[tuple[str, str]]) -> None:
    """A plain table of names and values."""
    with ui.element("table").classes("numbers small"), ui.element("tbody"):
        for name, value in rows:
            with ui.element("tr"):
                heading("th", name)
                heading("td", value)


@dataclass(frozen=True, slots=True)
class Column:
    name: str
    label: str
    kind: str = "number"  # number | text | wide | chip
    link: str = ""  # field of the row that holds an address


def table(columns: Sequence[Column], rows: Sequence[dict[str, Any]], key: str) -> ui.table:
    """A table of texts, unseen characters replaced; scrolls sideways where it is too wide."""
    rows = [{k: visible(v) if isinstance(v, str) else v for k, v in row.items()} for row in rows]
    shown = [
        {
            "name": c.name, "label": c.label, "field": c.name, "align": "right" if c.kind == "number" else "left",
            "classes": f"c-{c.kind}", "headerClasses": f"c-{c.kind}",
        }
        for c in columns
    ]  # fmt: skip
    with ui.element("div").classes("scroll"):
        found = ui.table(columns=shown, rows=rows, row_key=key).props("flat dense hide-no-data").classes("full-width")
        for c in columns:
            if c.kind == "chip":
                found.add_slot(f"body-cell-{c.name}", CHIP)
            elif c.link:
                found.add_slot(f"body-cell-{c.name}", LINK.format(to=c.link))
    return found


@dataclass(slots=True)
class Pages:
    """Where a reader is in a list that comes in pages: the cursors of the pages before, and of the next one."""

    before: list[Any] = field(default_factory=list)
    here: Any = None
    next: Any = None

    def forward(self) -> None:
        self.before.append(self.here)
        self.here = self.next

    def back(self) -> None:
        self.here = self.before.pop()


def pager(pages: Pages, show: Callable[[], Any], back: str = "‹ Back", onward: str = "Next ›") -> None:
    """Buttons to the newer and the older page, where there are any."""

    async def go(step: Callable[[], None]) -> None:
        step()
        await show()

    if not pages.before and pages.next is None:
        return
    with ui.element("div").classes("row-wrap").style("margin-top: .5rem"):
        newer = ui.button(back, on_click=lambda: go(pages.back)).props("flat dense no-caps")
        newer.set_enabled(bool(pages.before))
        older = ui.button(onward, on_click=lambda: go(pages.forward)).props("flat dense no-caps")
        older.set_enabled(pages.next is not None)


async def order(view: View, kind: str, **arguments: Any) -> bool:
    """Leave an order for the service, and say so; whether it was taken."""
    try:
        given = await asyncio.to_thread(view.submit, kind, arguments, "page")
    except InputError as error:
        ui.notify(f"{error}. {error.hint}".strip(), type="negative", multi_line=True)
        return False
    ui.notify(f"Order {given} ({kind.replace('_', ' ')}) waits for the service", type="info")
    return True


def confirm(title: str, text: str, button: str, action: Callable[[], Any]) -> None:
    """Ask before something that cannot be taken back."""

    async def go() -> None:
        dialog.close()
        await action()

    with ui.dialog() as dialog, ui.card():
        heading("h2", title)
        ui.label(text).classes("why")
        with ui.element("div").classes("row-wrap"):
            ui.button(button, on_click=go).props('no-caps color="negative" unelevated')
            ui.button("Not now", on_click=dialog.close).props("no-caps flat")
    dialog.open()


def took(seconds: float) -> str:
    """A duration in words: «12.3 s», «4 min 05 s», «3 h 20 min»."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


def some(value: float | None, form: str = ".3f") -> str:
    return number(value, form)


def short(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]} …"
