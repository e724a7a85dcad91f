"""Flip a bit in, or cut off, each kind of file of two run folders, and see what becomes of it.

    python scripts/damage.py --out DIR [--finished FOLDER --open FOLDER] [--per-kind 5]

One folder has finished rounds, the other was killed in mid-round while it trained; where they are not given, they are made
first, on the miniature of the tiny world (some minutes). Each damage is done to a copy. The copy is then read as the next
round would read it (`damages/use.py`), and by `selfplay doctor`.

    stopped    the run stops, and the message names the file or its folder
    repaired   it is made again, and there is an event that says so
    doctor     the next round does not read it, and the doctor names it
    no effect  nothing that was read is another, such as a flipped bit in white space or in a log
    SILENT     something that was read is another, and nobody says so
    UNNAMED    an exception that names nothing

Exit code 1 where anything is SILENT or UNNAMED.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

from damages.damage import Damage, copied, damages
from damages.use import use
from damages.worlds import make

from selfplay.doctor.look import look
from selfplay.errors import SelfplayError
from selfplay.storage import seals
from selfplay.storage.ledger import LedgerError
from selfplay.storage.outside import explained

VERDICTS = ("stopped", "repaired", "doctor", "no effect", "SILENT", "UNNAMED")
BAD = ("SILENT", "UNNAMED")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--finished", type=Path)
    parser.add_argument("--open", type=Path)
    parser.add_argument("--per-kind", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.finished is None or args.open is None:
        args.finished, args.open = make(args.out)
    began, bad = time.monotonic(), 0
    with (args.out / "damages.jsonl").open("w", encoding="utf-8") as lines:
        for given in (args.finished, args.open):
            folder = without_leftovers(given, args.out / f"{given.name}.whole")
            table: dict[str, Counter[str]] = {}
            whole = whole_of(folder, args.out / "copy")
            for damage in damages(folder, args.per_kind, args.seed):
                verdict, said = trial(folder, args.out / "copy", damage, whole)
                table.setdefault(damage.kind, Counter())[verdict] += 1
                line = {"folder": given.name, "file": damage.file, "how": damage.how, "verdict": verdict, "said": said}
                lines.write(json.dumps(line, ensure_ascii=False) + "\n")
                if verdict in BAD:
                    print(f"{verdict}: {damage.file}, {damage.how}: {said}", flush=True)
            bad += show(given.name, table)
    print(f"{time.monotonic() - began:.0f} s")
    return int(bool(bad))


def without_leftovers(folder: Path, out: Path) -> Path:
    """A copy of a folder without what a killed process has left in it."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(folder, out, symlinks=True)
    for each in look(out):
        assert each.repair is not None, f"{folder} is damaged to begin with: {each}"
        each.repair()
    for path in folder.glob("ledger.sqlite*"):  # whoever closes a ledger empties its write-ahead log
        shutil.copy2(path, out / path.name)
    return out


def whole_of(folder: Path, copy: Path) -> str:
    """The hash of what is read of a whole folder."""
    shutil.rmtree(copy, ignore_errors=True)
    found = use(copied(folder, copy, ""), lambda kind, text: seals.note_repair(text))
    assert not (told := seals.repairs()), f"{folder} is damaged to begin with: {told}"
    return found


def trial(folder: Path, copy: Path, damage: Damage, whole: str) -> tuple[str, str]:
    """Do one damage to a copy; what becomes of it, and what is said."""
    verdict, said = "", ""
    for reader in ("use", "doctor"):
        shutil.rmtree(copy, ignore_errors=True)
        copied(folder, copy, damage.file)
        damage.do(copy / damage.file)
        try:
            if reader == "use":
                found = use(copy, lambda kind, text: seals.note_repair(text))
                if told := seals.repairs():
                    return "repaired", "; ".join(told)
                if found != whole:
                    verdict = "SILENT"
            else:
                named = look(copy)
                if named and verdict != "SILENT":
                    return "doctor", f"{named[0].path}: {named[0].what}"
        except Exception as error:
            return _failed(error, copy, damage)
        finally:
            seals.repairs()
    return verdict or "no effect", said


def _failed(error: Exception, copy: Path, damage: Damage) -> tuple[str, str]:
    known = error if isinstance(error, SelfplayError) else explained(error)
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, LedgerError):  # the command says that the ledger cannot be used, with its path
        return "stopped", text
    names = (str(copy / damage.file), str((copy / damage.file).parent), damage.file.partition("/")[0])
    if known is not None and any(name in str(known) for name in names):
        return "stopped", text
    return "UNNAMED", text


def show(name: str, table: dict[str, Counter[str]]) -> int:
    """Print what became of each kind of file; returns how many were silent or unnamed."""
    total = sum(table.values(), Counter[str]())
    print(f"\n{name}: {total.total()} damages, {', '.join(f'{total[v]} {v}' for v in VERDICTS if total[v])}\n")
    print("| file | " + " | ".join(VERDICTS) + " |\n|---|" + "---|" * len(VERDICTS))
    for kind, found in sorted(table.items()):
        print(f"| `{kind}` | " + " | ".join(str(found[v] or "") for v in VERDICTS) + " |")
    return sum(total[v] for v in BAD)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
