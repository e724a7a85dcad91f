import errno
import io
import os
import re
import sys
import threading
import time

import pytest
from rich.console import Console

from selfplay.errors import EngineError
from selfplay.reporting import terminal as display_module
from selfplay.reporting.round_summary import describe
from selfplay.reporting.terminal import Display
from selfplay.reporting.words import change, interval, number, verdict
from selfplay.storage.ledger import Store
from selfplay.types import RoundReport

METRICS = {
    "prompts/count": 192,
    "generate/candidates": 1536,
    "generate/length_mean": 31.24,
    "score/reward_mean": 0.2,
    "pairs/base": 186,
    "pairs/kept": 111,
    "pairs/dropped_noise": 4,
    "pairs/dropped_potential": 71,
    "pairs/explicit_margin": 2.38,
    "pairs/base_explicit_margin": 1.78,
    "pairs/implicit_margin": 0.11,
    "pairs/base_implicit_margin": 0.21,
    "pairs/potential": 0.62,
    "depth/pairs": 111,
    "train/beta_start": 0.1,
    "train/beta": 0.0919,
    "train/update_relative_norm": 0.00229,
    "train/share_changed": 0.984,
    "evaluate/reward": 0.382,
    "evaluate/reward_champion": 0.2,
    "evaluate/win_rate": 0.682,
    "evaluate/win_rate_low": 0.632,
    "evaluate/win_rate_high": 0.732,
    "evaluate/length_ratio": 1.04,
    "evaluate/kl_current": 0.44,
    "evaluate/kl_initial": 0.8,
    "evaluate/gold_total": 0.511,
    "evaluate/gold_total_champion": 0.45,
    "evaluate/gold_content": 0.436,
    "evaluate/gold_content_champion": 0.4,
    "evaluate/independent": 0,
    "promote/swap_seconds": 0.126,
    "promote/first_token_seconds": 0.111,
    "promote/engine_start_seconds": 21.3,
}
METRICS_OF_THE_GATE = {name: METRICS[f"evaluate/{name}"] for name in ("win_rate", "win_rate_low", "win_rate_high")}


def plain() -> tuple[Display, io.StringIO]:
    out = io.StringIO()
    return Display(Console(file=out, width=80)), out


def terminal() -> tuple[Display, io.StringIO]:
    out = io.StringIO()
    return Display(Console(file=out, width=80, force_terminal=True, color_system="truecolor", _environ={})), out


def visible(out: io.StringIO) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())


def report(
    outcome: str = "promoted", reasons: tuple[str, ...] = (), metrics: dict[str, float] | None = None
) -> RoundReport:
    return RoundReport(
        round=2, outcome=outcome, policy=2, metrics=METRICS if metrics is None else metrics,
        seconds={"generate": 9.1, "train": 12.0}, reasons=list(reasons),
    )  # fmt: skip


def test_a_log_gets_one_line_at_the_start_and_one_at_the_end() -> None:
    display, out = plain()
    with display.stage(2, "generate", total=192, unit="prompts") as line:
        for done in range(0, 193, 8):
            line.update(done=done, text="8.9 k tokens/s")
    first, last = out.getvalue().splitlines()
    assert first.endswith("round 2: generate started (192 prompts)")
    assert re.search(r"round 2: generate done · \d+\.\d s · 192/192 prompts · 8\.9 k tokens/s$", last)


def test_a_log_gets_progress_no_more_often_than_the_quiet_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(display_module.time, "monotonic", lambda: clock[0])
    display, out = plain()
    with display.stage(1, "score", total=100, unit="answers") as line:
        for second in range(1, 18):
            clock[0] += 1
            line.update(done=second)
    counts = re.findall(r"score · (\d+)/100 answers", out.getvalue())
    assert counts == ["5", "10", "15"]


def test_a_reused_stage_says_kept() -> None:
    for display, out in (plain(), terminal()):
        display.kept(3, "generate")
        with display.stage(3, "score") as line:
            line.kept()
        assert visible(out).count("«kept»") == 2
        assert "round 3" in visible(out)


def test_a_failed_stage_says_so_and_the_error_goes_on() -> None:
    for display, out in (plain(), terminal()):
        with pytest.raises(EngineError), display.stage(1, "generate"):
            raise EngineError("gone")
        with pytest.raises(KeyboardInterrupt), display.stage(1, "train"):
            raise KeyboardInterrupt
        assert "failed" in visible(out) and "interrupted" in visible(out)


def test_two_stages_at_a_time_are_both_shown_live() -> None:
    display, out = terminal()
    together = threading.Barrier(2)

    def work(name: str) -> None:
        with display.stage(1, name, total=3, unit="steps") as line:
            together.wait(10)
            for done in range(1, 4):
                line.update(done=done, text=f"{name} at work")
                time.sleep(0.12)
            together.wait(10)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("train", "champion")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    frames = re.split(r"\x1b\[1A|\r", out.getvalue())
    assert any("train at work" in f for f in frames) and any("champion at work" in f for f in frames)
    assert visible(out).count("✓ round 1 train") == 1 and visible(out).count("✓ round 1 champion") == 1
    with display.stage(1, "evaluate"):  # a new live line starts after the old ones ended
        time.sleep(0.01)
    assert "✓ round 1 evaluate" in visible(out)
    assert out.getvalue().count("\x1b[?25h") == out.getvalue().count("\x1b[?25l") > 0, "the cursor came back"


def test_markup_and_control_characters_are_text() -> None:
    for display, out in (plain(), terminal()):
        display.note("[red]a[/red] [/nothing] \x1b[31mb \r\x07c")
        display.warn("[bold]w")
        with display.stage(1, "[x]", total=2, unit="[u]") as line:
            line.update(done=1, text="[blink]t[/blink] {0} \x1b]0;title\x07")
        display.error("failed [/e]", "do [this]", None)
        shown = visible(out)
        assert "[red]a[/red] [/nothing] �[31mb ��c" in shown
        assert "[bold]w" in shown and "[blink]t[/blink] {0} �]0;title�" in shown
        assert "failed [/e]" in shown and "do [this]" in shown
        assert "\x1b[31m" not in out.getvalue().replace("\x1b[31m✗", "") and "\x07" not in out.getvalue()


def test_text_that_the_console_cannot_encode_is_replaced() -> None:
    raw = io.BytesIO()
    display = Display(Console(file=io.TextIOWrapper(raw, encoding="latin-1"), width=80))
    display.note("β is 0.1, \udcff")
    display.round_table(report(reasons=("β",), outcome="rejected"))
    display.console.file.flush()
    assert b"? is 0.1, ?" in raw.getvalue() and b"0.200 ? 0.382" in raw.getvalue()


def test_an_error_shows_message_hint_and_log() -> None:
    display, out = plain()
    error = EngineError("the engine ended", "look at its memory")
    display.error(error, log="runs/x/logs/engine.log")  # type: ignore[arg-type]
    assert out.getvalue().splitlines() == [
        "error: the engine ended", "what to do: look at its memory", "log: runs/x/logs/engine.log",
    ]  # fmt: skip


def test_a_long_line_is_not_broken_in_a_log() -> None:
    display, out = plain()
    display.note("/a/long/path" * 20)
    assert out.getvalue() == "/a/long/path" * 20 + "\n"


def test_round_table_has_every_number_and_fits_80_columns() -> None:
    display, out = plain()
    display.round_table(report())
    shown = " ".join(out.getvalue().split())
    for text in (
        "Round 2", "1536 for 192 prompts", "sampled 0.200 · held-out 0.200 → 0.382", "111 kept of 186", "4 noise, 71 potential",
        "explicit 2.380 (all 1.780)", "implicit 0.110 (all 0.210)", "potential 0.62", "0.1 → 0.0919", "relative norm 2.29e-03",
        "98.4% of the elements", "0.682 [0.632, 0.732]", "gate not independent", "length ratio 1.04", "KL 0.44 nats to current, 0.80 to initial",
        "total 0.450 → 0.511", "content 0.400 → 0.436", "0.126 s, first new token after 0.111 s · engine start 21.3 s", "generate 9.1 · train 12.0 · total 21.1", "promoted: policy 2 serves",
    ):  # fmt: skip
        assert text in shown
    assert max(map(len, out.getvalue().splitlines())) <= 80


def test_round_table_leaves_out_what_was_not_measured() -> None:
    rows = dict(describe(report("skipped", ("no pairs [x]",), {"generate/candidates": 16.0})))
    assert list(rows) == ["candidates", "seconds", "verdict"]
    assert rows["verdict"] == "skipped: no pairs [x]; policy 2 goes on"
    display, out = plain()
    display.round_table(report("rejected", ("win rate [0.39, 0.49] too low", "[/x]"), {}))
    assert "rejected by the gate: win rate [0.39, 0.49] too low; [/x]; policy 2 goes on" in " ".join(
        out.getvalue().split()
    )


def test_round_table_names_the_parts_of_any_rubric() -> None:
    metrics = {
        f"evaluate/{name}": value for name, value in {
            "gold_total": 0.5, "gold_total_champion": 0.4, "gold_accuracy": 0.7, "gold_accuracy_champion": 0.6, "gold_politeness": 0.3,
            "audit_win_rate": 0.8, "audit_gold_win_rate": 0.75, "audit_gold_total": 0.55, "audit_gold_total_initial": 0.35,
            "audit_gold_politeness": 0.2, "audit_gold_politeness_initial": 0.1,
        }.items()
    }  # fmt: skip
    rows = dict(describe(report(metrics=metrics)))
    assert rows["gold"] == "total 0.400 → 0.500 · accuracy 0.600 → 0.700 · politeness 0.300"
    assert rows["vs initial"] == (
        "win rate 0.800 · by gold 0.750 · gold total 0.350 → 0.550 · gold politeness 0.100 → 0.200"
    )


def test_run_table_has_one_line_a_round(tmp_path) -> None:
    store = Store(tmp_path)
    display, out = plain()
    display.run_table(store)
    assert out.getvalue() == "no rounds yet\n"
    for index, state in ((1, "promoted"), (2, "skipped"), (3, "rejected"), (4, "running")):
        store.open_round(index, 0, (0, 0), "f", {})
        if state in ("promoted", "rejected"):
            values = {k.removeprefix("evaluate/"): v for k, v in METRICS.items() if k.startswith("evaluate/")}
            store.record_stage(index, "evaluate", 31.0, values)
        if state != "running":
            store.close_round(index, state, 1, [])
    display.run_table(store)
    lines = [line for line in out.getvalue().splitlines() if re.match(r" *\d ", line)]
    assert [line.split()[:2] for line in lines] == [
        ["1", "promoted"],
        ["2", "skipped"],
        ["3", "rejected"],
        ["4", "unfinished"],
    ]
    assert lines[0].split()[2:] == ["0.20→0.38", "0.68", "[0.63,0.73]", "0.45→0.51", "0.40→0.44", "31"]
    assert max(map(len, out.getvalue().splitlines())) <= 80
    assert "not shown" not in out.getvalue()
    display.run_table(store, last=2)
    store.close()
    *shown, last = [line for line in out.getvalue().splitlines() if re.match(r" *\d ", line)]
    assert [line.split()[0] for line in shown] == ["1", "2", "3", "4", "3", "4"]
    assert last == "2 earlier rounds are not shown (--last N shows the last N)"


def test_run_table_has_the_parts_of_any_rubric_that_fit(tmp_path) -> None:
    store = Store(tmp_path)
    store.open_round(1, 0, (0, 0), "f", {})
    parts = {"total": 0.5, "accuracy": 0.75, "politeness": 0.25, "a part with a very long name": 0.5}
    values = {f"gold_{part}{of}": value for part, value in parts.items() for of in ("", "_champion")}
    store.record_stage(1, "evaluate", 31.0, METRICS_OF_THE_GATE | values)
    shown = {}
    for width in (60, 80, 160):
        out = io.StringIO()
        Display(Console(file=out, width=width)).run_table(store)
        heads = next(line for line in out.getvalue().splitlines() if "verdict" in line)
        shown[width] = [part for part in ("gold", *parts) if part in heads]
        assert len(heads) <= width
        assert "0.68 [0.63,0.73]" in out.getvalue() and "31" in out.getvalue()
    store.close()
    assert shown == {60: ["gold"], 80: ["gold", "accuracy"], 160: ["gold", *[p for p in parts if p != "total"]]}


def test_numbers_in_words() -> None:
    assert number(None) == number(float("nan")) == number(float("inf")) == "–"
    assert number(0.12345, ".2f") == "0.12"
    assert change({"a": 1.0, "b": 2.0}, "a", "b", ".1f") == "1.0 → 2.0"
    assert change({"b": 2.0}, "a", "b", ".1f") == "2.0" and change({}, "a", "b") == ""
    assert interval({"evaluate/win_rate": 0.5}) == "0.500"
    assert verdict("running", None, []).startswith("unfinished")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EPIPE])
def test_an_output_that_fails_ends_nobody(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(code, os.strerror(code))

        def flush(self) -> None:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(sys, "stdout", Broken())
    display = Display()
    with display.stage(1, "generate", 4, "prompts") as line:
        line.update(done=2)
    display.warn("the disk is full")
    display.error("it is")


def test_the_terminal_knows_the_stages_of_a_round():
    """It lies below the rounds, so it has the names from nowhere else."""
    from selfplay.reporting import terminal
    from selfplay.rounds.stages import STAGES

    assert tuple(stage.name for stage in STAGES) == terminal.STAGES
