"""One part of the kit, in a process of its own: `python -m gpu_kit.part NAME --size full --work FOLDER`.

Each thing that it finds is one line of JSON on stdout, told as soon as it is known: {"what", "figures"} or {"what", "error"}.
All else that is printed goes to stderr.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from gpu_kit.sizes import SIZES
from selfplay.processes.protocol import quick_imports

Figure = float | int | str | bool | None


class Findings:
    """Where a part tells what it finds."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self.failed = False

    def tell(self, what: str, **figures: Figure) -> None:
        """Something was measured. Names of figures are words, with the unit behind them: `seconds`, `GiB_free`."""
        self._write({"what": what, "figures": figures})

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """A step that others do not need: where it fails, its error is told, and the part goes on."""
        print(f"--- {what}", file=sys.stderr, flush=True)
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failed = True
            self._write({"what": what, "error": f"{type(error).__name__}: {error}"})

    def _write(self, line: dict[str, object]) -> None:
        print(json.dumps(line), file=self._out, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="module of the part")
    parser.add_argument("--size", choices=sorted(SIZES), required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and runs")
    args = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")  # not inherited, so that it closes with this process
    os.dup2(2, 1)
    findings = Findings(out)
    with findings.step(args.name):
        with quick_imports():
            part = importlib.import_module(f"gpu_kit.{args.name}")
        part.measure(SIZES[args.size], args.work, findings)
    sys.stdout.flush()
    os._exit(int(findings.failed))  # what a failed engine left waiting must not hold up the next part


if __name__ == "__main__":
    main()
