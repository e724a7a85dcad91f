"""The short form of `scripts/chaos.py` with two engines: kills at random moments, and a run that ends as if nobody had disturbed it."""

import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mini import CALM, ROOT, sets

from selfplay.storage.ledger import Store

sys.path.insert(0, str(ROOT / "scripts"))
import chaos


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_killed_at_random_moments_a_served_run_ends_the_same(calm, mini_world, tmp_path):
    """The calm run had one engine and no service around it; it ends with the same bytes all the same."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "chaos.py"), "--kills", "2", "--rounds", "2", "--share", "0.2", "--seed", "1",
         "--calm", str(calm[0]), *sets(*CALM, "generate.engines=2", "evaluate.judge=null"), "--out", str(tmp_path)],
        capture_output=True, text=True, timeout=1700,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 faults, 0 orphans" in done.stdout
    assert "rows compared: 0 lost rows, 0 double rows" in done.stdout
    assert int(done.stdout.split("storm: ")[1].split()[0]) >= 2


def test_rows_that_are_missing_or_double_are_counted_by_kind(tmp_path, capsys):
    for name, rows in (("calm", (3, 4)), ("storm", (2, 4))):
        for index, n in enumerate(rows, 1):
            table = tmp_path / name / "rounds" / f"{index:04d}" / "pairs" / "pairs.parquet"
            table.parent.mkdir(parents=True)
            pq.write_table(pa.table({"row": list(range(n))}), table)
        Store(tmp_path / name).close()
    assert chaos.report_rows(tmp_path / "calm", tmp_path / "storm") == 1
    said = capsys.readouterr().out
    assert "| pairs/pairs | 7 | 6 |" in said and "7 rows compared: 1 lost rows, 0 double rows" in said
    assert chaos.report_rows(tmp_path / "storm", tmp_path / "storm") == 0
