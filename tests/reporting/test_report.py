import dataclasses
import html.parser
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from selfplay.errors import InputError
from selfplay.reporting import report
from selfplay.storage import tables
from selfplay.storage.ledger import Store
from selfplay.types import Pair, Prompt

pytestmark = pytest.mark.slow

HOSTILE = "</div></td><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7 * 7 }}&lt;\x00\u202e $x_1$"
CONFIG = {
    "run": {"name": "demo"},
    "evaluate": {"gate": {"win_rate_lower": 0.47, "max_kl": 30.0, "max_length_ratio": 1.5}},
}


class Page(html.parser.HTMLParser):
    """The tags, the addresses and the text of a page, as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [
            value or "" for name, value in attrs if name.split(":")[-1] in ("href", "src", "action", "data")
        ]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def pair(number: int, **changes: object) -> Pair:
    base = Pair(
        prompt_id=f"p{number}", prompt_ids=[1], chosen_index=0, rejected_index=1, chosen=f"chosen {number}", rejected=f"rejected {number}",
        chosen_ids=[1, 2], rejected_ids=[1, 2, 3], chosen_reward=1.5 + number, rejected_reward=0.5, chosen_logp=-2.25, rejected_logp=-7.125,
        explicit_margin=1.0 + number, implicit_margin=0.25, implicit_signed=-0.25, potential=number / 10, kept_because="base",
    )  # fmt: skip
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def write_pairs(run: Path, index: int, pairs: list[Pair], added: list[Pair] = []) -> None:  # noqa: B006
    for stage in ("pairs", "depth", "prompts"):
        (run / "rounds" / f"{index:04d}" / stage).mkdir(parents=True)
    folder = run / "rounds" / f"{index:04d}"
    prompts = [
        Prompt(prompt_id=p.prompt_id, messages=[{"role": "user", "content": f"question {p.prompt_id} {HOSTILE}"}], prompt_ids=[1], split="train")
        for p in pairs
    ]  # fmt: skip
    tables.write_rows(folder / "pairs" / "pairs.parquet", pairs, Pair)
    tables.write_rows(folder / "depth" / "pairs.parquet", [p for p in pairs if p.kept_because] + added, Pair)
    tables.write_rows(folder / "prompts" / "prompts.parquet", prompts, Prompt)


def write_round(
    store: Store,
    index: int,
    state: str = "promoted",
    *,
    gold: bool = True,
    independent: int = 0,
    audit_content: float = 0.6,
) -> None:
    store.open_round(index, index - 1, (0, 0), "f", CONFIG)
    store.record_stage(index, "generate", 9.0, {"candidates": 64, "tokens_per_second": 100})
    store.record_stage(index, "score", 1.0, {"reward_mean": 0.1 * index})
    store.record_stage(
        index,
        "pairs",
        0.1,
        {"base": 0 if state == "skipped" else 12, "kept": 0 if state == "skipped" else 8, "explicit_margin": 1.0},
    )
    if state == "running":
        return
    if state == "skipped":
        store.close_round(index, state, index - 1, ["no pairs: every reward is the same"])
        return
    store.record_stage(index, "train", 12.0, {"beta_start": 0.1, "beta": 0.09, "update_relative_norm": 0.002})
    values: dict[str, float] = {
        "reward": 0.1234 + index, "reward_champion": 0.1, "win_rate": 0.6789, "win_rate_low": 0.61, "win_rate_high": 0.74, "length_ratio": 1.01,
        "kl_current": 0.5, "kl_initial": 0.9, "independent": independent, "audit_win_rate": 0.8, "audit_reward": 1.0, "audit_reward_initial": 0.2,
    }  # fmt: skip
    if gold:
        values |= {
            "gold_total": 0.5311,
            "gold_total_champion": 0.5,
            "gold_content": 0.4711,
            "gold_content_champion": 0.45,
        }
        values |= {
            "audit_gold_total": 0.7,
            "audit_gold_total_initial": 0.5,
            "audit_gold_content": audit_content,
            "audit_gold_content_initial": 0.5,
        }
    store.record_stage(index, "evaluate", 8.0, values)
    store.record_policy(index, state, round=index, parent=index - 1, reference=index - 1, beta=0.09)
    store.close_round(
        index,
        state,
        index if state == "promoted" else index - 1,
        ["mean reward did not rise"] if state == "rejected" else [],
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "demo"
    folder.mkdir()
    return folder


def render(run: Path) -> tuple[str, Page]:
    page, picture = report.write(run)
    text = page.read_text(encoding="utf-8")
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.width == 1650 and image.height > 200
        image.load()
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 20
    assert not [p for p in run.iterdir() if p.name.endswith(".partial")]
    return text, Page(text)


def test_a_run_with_every_kind_of_round(run: Path) -> None:
    store = Store(run)
    store.record_policy(0, "initial", round=0)
    for index, state in ((1, "promoted"), (2, "skipped"), (3, "rejected"), (4, "promoted"), (5, "running")):
        write_round(store, index, state)
    store.event("warning", f"β touched its bound {HOSTILE}", 4)
    store.event("promoted", "not a warning")
    store.event("guard", "guard: correlation of reward and length 0.7, limit 0.6", 4)
    store.record_stage(4, "guard", 0.1, {"length_correlation": 0.7})
    store.close()
    pairs = [pair(0, chosen=HOSTILE, rejected=HOSTILE * 2)] + [pair(i) for i in range(1, 8)]
    pairs += [pair(i, kept_because=None, dropped_because="potential", potential=-i / 10) for i in range(8, 12)]
    write_pairs(run, 5, pairs, [pair(1, kept_because="depth", chosen="a pair that depth added")])
    text, page = render(run)

    # what a person decides from
    for words in (
        "4 rounds finished (2 promoted, 1 rejected, 1 skipped), round 5 unfinished (at prompts) · policy 4 serves",
        "gate not independent: the judge is the reward that trains",
        "round 3 rejected by the gate: mean reward did not rise; policy 2 goes on",
        "round 4: guard: correlation of reward and length 0.7, limit 0.6", "reward × length", "0.70",
        "round 2 skipped: no pairs: every reward is the same; policy 1 goes on",
        "0.100 → 4.123", "0.679 [0.610, 0.740]", "0.500 → 0.531", "0.450 → 0.471", "0.1 → 0.09", "2.00e-03",
        "promoted · current", "A sample of the pairs of round 5", "12 base pairs and 1 added by depth",
        "explicit margin 8 · implicit margin 0.25 (signed -0.25) · alignment potential +0.700", "kept (depth)", "dropped (potential)",
        "reward 8.5 · logp -2.25 · 2 tokens", "reward 0.5 · logp -7.12 · 3 tokens", "a pair that depth added", "question p7",
    ):  # fmt: skip
        assert words in page.text, words
    assert "not a warning" not in page.text

    # text of models is text
    assert "script" not in page.tags and "img" not in page.tags and not page.handlers
    assert HOSTILE.split("\x00")[0].replace("&lt;", "&amp;lt;").replace("<", "&lt;").replace(">", "&gt;") in text
    assert "{{ 7 * 7 }}" in page.text and " 49" not in page.text

    # it loads nothing
    assert not re.search(r"https?:|//[a-z]|url\((?!#)|@import", text.replace("prefers-color-scheme", ""))
    assert all(address.startswith("#") for address in page.addresses)
    assert "default-src 'none'" in text

    # charts: each with its name and unit, colours that follow light and dark
    assert page.tags.count("svg") == page.tags.count("figure") == page.tags.count("figcaption") == 13
    for title in (
        "Reward",
        "Gold",
        "Win rate",
        "β",
        "Length",
        "KL",
        "Explicit margins, round 5",
        "Where the time went",
        "Who worked when, round 4",
    ):
        assert title in page.text
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert "var(--blue)" in drawings and not re.search(r"#[0-9a-f]{6}\b", drawings)
    assert "prefers-color-scheme: dark" in text


def test_a_folder_before_its_first_round(run: Path) -> None:
    Store(run).close()
    _, page = render(run)
    assert "no rounds yet · no policy serves yet" in page.text and "No round has started yet." in page.text
    assert "svg" not in page.tags and "Warnings" not in page.text


def test_one_round_without_gold_judged_by_another_reward(run: Path) -> None:
    store = Store(run)
    write_round(store, 1, gold=False, independent=1)
    store.close()
    _, page = render(run)
    assert "1 round finished (1 promoted) · policy 1 serves" in page.text
    assert "gate not independent" not in page.text and "Gold" not in page.text and "gold total" not in page.text
    assert "by the judge, which is another reward," in page.text and "Reward of the candidates" in page.text


def test_the_parts_of_any_rubric_are_named(run: Path) -> None:
    store = Store(run)
    for index in (1, 2):
        write_round(store, index, gold=False)
        store.record_metrics(index, "evaluate", {
            "reward": 1.0, "reward_champion": 0.5, "audit_reward": 1.0, "audit_reward_initial": 0.2, "audit_win_rate": 0.8,
            "gold_total": 0.6, "gold_total_champion": 0.5, "gold_accuracy": 0.7, "gold_accuracy_champion": 0.65,
            "gold_<b>politeness": 0.2, "gold_<b>politeness_champion": 0.1,
            "audit_gold_total": 0.7, "audit_gold_total_initial": 0.6, "audit_gold_accuracy": 0.3, "audit_gold_accuracy_initial": 0.4,
        })  # fmt: skip
    store.close()
    text, page = render(run)
    for words in (
        "gold accuracy", "0.650 → 0.700", "audit gold accuracy", "gold <b>politeness", "0.100 → 0.200",
        "by the gold rubric (total, <b>politeness, accuracy), which never trains nor gates",
        "the reward rose but gold accuracy 0.400 → 0.300",
    ):  # fmt: skip
        assert words in page.text, words
    assert "content" not in page.text and "<b>politeness" not in text
    drawing = next(str(report.svg(report.read(run), c)) for c in report.charts(report.read(run)) if c.title == "Gold")
    labels = re.findall(r"<text[^>]*>([^<]+)</text>", drawing)
    assert {"total", "accuracy", "&lt;b&gt;politeness", "total, audit"} <= set(labels)


def test_a_run_whose_only_round_was_skipped_or_is_at_its_start(run: Path) -> None:
    store = Store(run)
    write_round(store, 1, "skipped")
    store.open_round(2, 0, (0, 0), "f", None)
    store.close()
    _, page = render(run)
    assert "1 round finished (1 skipped), round 2 unfinished (at prompts)" in page.text


def test_many_rounds(run: Path) -> None:
    store = Store(run)
    for index in range(1, 61):
        write_round(store, index, "rejected" if index % 4 == 0 else "promoted")
    store.close()
    text, page = render(run)
    assert "7 earlier rejected or skipped rounds are in the table" in page.text
    assert page.text.count("rejected by the gate") == 8 + 15
    assert len(text) < 1_000_000


def test_a_long_run_is_shown_in_part_and_the_report_says_so(run: Path) -> None:
    store = Store(run)
    for index in range(1, 402):
        store.open_round(index, index - 1, (0, 0), "f", CONFIG)
        values = {
            "reward": 9.0 if index == 77 else 0.5,
            "reward_champion": 0.25 if index == 1 else 0.4,
            "gold_total": index / 401,
        }
        store.record_stage(index, "evaluate", 1.0, values | {"gold_total_champion": 0.0})
        store.record_policy(index, "promoted", round=index)
        store.close_round(index, "rejected" if index % 2 else "promoted", index, [])
    store.close()
    loaded = report.read(run)
    assert len(loaded.rounds) == len(loaded.policies) == 200 and loaded.rounds[-1].index == 401
    assert len(loaded.spread) == 300 and (loaded.spread[0].index, loaded.spread[-1].index) == (1, 400)
    points = loaded.figures["evaluate/reward"]
    assert len(points) <= 300 and (77, 9.0) in points, "a peak stays"
    indices, values = loaded.series("evaluate/gold_total")
    assert len(indices) <= 300 and indices == sorted(set(indices)) and values == [index / 401 for index in indices]
    text, page = render(run)
    assert "The run has 401 rounds. A line shows the lowest and the highest value of each 4 rounds;" in page.text
    assert "The tables show the last 200 of 401 rounds" in page.text
    assert "401 rounds finished (200 promoted, 201 rejected)" in page.text
    assert "193 earlier rejected or skipped rounds are in the ledger" in page.text
    assert "0.250 → 0.500" in page.text, "the first champion is beyond the table"
    assert "<td>202</td>" in text and "<td>201</td>" not in text
    assert len(text) < 600_000


def test_whole_numbers_on_the_round_axis(run: Path) -> None:
    store = Store(run)
    for index in (1, 2):
        write_round(store, index)
    store.close()
    loaded = report.read(run)
    for chart in report.charts(loaded):
        if chart.title.startswith("Who worked when"):
            continue  # its axis has the seconds of one round
        ticks = re.findall(
            r"<text[^>]*>([\d.−]+)</text>", str(report.svg(loaded, chart)).split('id="matplotlib.axis_2"')[0]
        )
        assert ticks == ["1", "2"], chart.title


def test_a_fall_of_gold_under_a_rising_reward_is_a_warning(run: Path) -> None:
    store = Store(run)
    write_round(store, 1)
    write_round(store, 2, audit_content=0.45)
    write_round(store, 3, "rejected", audit_content=0.1)
    store.close()
    assert "the reward rose but gold content 0.500 → 0.450 (audit set, round 2)" in " ".join(
        report.warnings(report.read(run))
    )


def test_non_finite_values_and_equal_margins_do_not_stop_it(run: Path) -> None:
    store = Store(run)
    write_round(store, 1)
    store.open_round(2, 1, (0, 0), "f", CONFIG)
    store.record_stage(2, "pairs", 0.1, {"base": 3, "kept": 0, "dropped_nonfinite": 1, "explicit_margin": math.inf})
    store.close()
    odd = pair(
        1,
        explicit_margin=math.inf,
        implicit_margin=math.nan,
        potential=None,
        kept_because=None,
        dropped_because="nonfinite",
    )
    write_pairs(run, 2, [odd, pair(2), pair(2, explicit_margin=3.0)])
    _, page = render(run)
    assert "dropped (nonfinite)" in page.text and "explicit margin – · implicit margin –" in page.text


def test_a_sample_spreads_over_the_ranking_and_long_texts_are_cut(run: Path) -> None:
    store = Store(run)
    write_round(store, 1)
    store.close()
    write_pairs(run, 1, [pair(i, chosen="x" * 5000) for i in range(50)])
    shown = report.sample(report.read(run))
    assert [s["pair"].potential for s in shown] == [4.9, 3.9, 2.9, 2.0, 1.0, 0.0]
    assert shown[0]["sides"][0][1] == "x" * 4000 + " … (1000 more characters)"


def test_a_folder_without_a_ledger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run folder"):
        report.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_both_files_again_and_names_them(run: Path) -> None:
    store = Store(run)
    write_round(store, 1)
    store.close()
    (run / "report.html").write_text("old")
    command = [sys.executable, "-m", "selfplay.reporting.report"]
    root = Path(report.__file__).parents[2]
    done = subprocess.run(
        [*command, str(run)], capture_output=True, text=True, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(run / "report.html"), str(run / "report.png")]
    assert (run / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_the_command_says_what_is_wrong_with_a_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(run)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {run} is not a run folder")
