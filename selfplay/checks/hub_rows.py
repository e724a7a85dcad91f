"""The first rows of a dataset on the Hub, which `check` looks at like those of a file.

`python -m selfplay.checks.hub_rows` is the process that streams them: JSON on stdin, the rows in a file. It is a process of
its own because the library takes seconds to import, and tries for minutes where a network does not answer.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from selfplay.config.secrets import HUB
from selfplay.errors import InputError
from selfplay.processes.children import inherited_environment
from selfplay.prompts.files import copies
from selfplay.prompts.files.part import parts
from selfplay.prompts.formats import Reading, Row

ROWS = 512  # of a dataset, from its beginning
SECONDS = 90.0  # for them to come, the imports of the process included


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The first rows of a dataset."""

    rows: tuple[Row, ...] = ()
    why: str = ""
    """Why there are none, and what to do; empty where there are some."""
    late: bool = False
    """They did not come in time, which does not mean that a round could not load them."""


@functools.cache
def first(name: str, config: str | None, split: str, reading: Reading, cached: bool) -> Rows:
    """Stream them once, by the import's own reader. `cached`: no network is used; they are those of a copy in the cache."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    environment = inherited_environment(*HUB) | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    if cached:
        environment["HF_HUB_OFFLINE"] = "1"
    with TemporaryDirectory(prefix="selfplay-check-") as scratch:
        copy = Path(scratch) / "rows.parquet"
        order = {
            "name": name, "config": config, "split": split, "reading": asdict(reading), "copy": str(copy), "first": ROWS,
        }  # fmt: skip
        command = [sys.executable, "-m", "selfplay.checks.hub_rows"]
        try:
            done = subprocess.run(
                command, input=json.dumps(order), env=environment,
                capture_output=True, text=True, timeout=SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Rows(why=f"its first rows did not come within {SECONDS:.0f} s", late=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            return Rows(why=f"the process that streams its first rows ended: {last}")
        if why := json.loads(done.stdout.splitlines()[-1]):
            return Rows(why=why)
        return Rows(rows=tuple(row for part in parts(copy, reading, split) for row in part.rows()))


def main() -> None:
    order = json.load(sys.stdin)
    given = order["reading"]
    reading, copy = Reading(**given | {"meta": tuple(given["meta"])}), Path(order["copy"])
    try:
        copies.from_hub(order["name"], order["config"], order["split"], reading, copy, order["first"])
        print(json.dumps(""))
    except InputError as error:
        print(json.dumps(f"{' '.join(str(error).split())[:1000]}; {error.hint}"))


if __name__ == "__main__":
    main()
