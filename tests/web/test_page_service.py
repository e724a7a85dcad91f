"""The page of a service that works: a real `selfplay serve` on the miniature, watched and ordered from a real Chromium."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from mini import ROOT, TINY, nothing_left, overrides

from selfplay.storage.ledger import Store

sys.path.insert(0, str(ROOT / "scripts"))
import chromium

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
CHIP = "document.querySelector('.chip').innerText.trim().toLowerCase()"


def address(process: "subprocess.Popen[str]") -> str:
    for line in process.stdout:
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            return found[0]
    raise AssertionError(f"the service ended with {process.wait()}")


@pytest.mark.skipif(chromium.found() is None, reason="no chromium here (Debian: apt-get install chromium)")
def test_a_round_appears_while_it_runs_and_pause_and_resume_work(calm: tuple[Path, str], mini_world: Path) -> None:
    """The third round of the calm run. The service is paused until the page is there, so that no part of the round is missed."""
    run_dir, _ = calm
    store = Store(run_dir)
    store.submit("pause", {}, "cli")
    store.close()
    longer = ["train.epochs=20", "train.learning_rate=1e-5"]  # long enough to be seen and paused
    settings = [*overrides(mini_world), "service.port=0", "schedule.end.rounds=3", *longer]
    argv = [sys.executable, "-m", "selfplay.cli", "serve", "--config", str(TINY), "--run-dir", str(run_dir)]
    argv += [word for each in settings for word in ("--set", each)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    try:
        with chromium.browser() as tab:
            tab.size(1280, 900)
            tab.open(address(process))
            tab.wait(f"{CHIP} === 'paused'", 300)
            tab.click("Resume")
            tab.wait("/round 3: \\w+/.test(document.body.innerText)", 300)
            tab.wait("!!document.querySelector('a[href=\"/rounds/3\"]')")
            tab.click("Pause")
            tab.click("after the stage")
            tab.wait(f"{CHIP} === 'paused'", 300)
            assert (run_dir / "rounds" / "0003").is_dir()
            assert not (run_dir / "rounds" / "0003" / "promote").exists()
            tab.click("Resume")
            tab.wait(f"{CHIP} === 'running'", 60)
            tab.wait("/\\b3 promoted|2 promoted, 1 rejected/.test(document.body.innerText)", 300)
            tab.wait(f"{CHIP} === 'ended'", 60)
            assert tab.errors == []
    finally:
        process.terminate()
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert nothing_left(run_dir)
