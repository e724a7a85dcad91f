"""The finished runs: one line of JSON each."""

from __future__ import annotations

import argparse
import hashlib
import json
from typing import Any

from ablation.arms import overrides
from ablation.worlds import ROOT, budget


def fingerprint(args: argparse.Namespace, arm: str) -> str:
    """What a run was made with, beside its world and seed. Lines with the same fingerprint may be compared."""
    config = hashlib.sha256((ROOT / args.config).read_bytes()).hexdigest()
    drawn_from = [] if args.pool == "usual" else [args.pool]
    what = json.dumps([overrides(arm, budget(args)), args.set, args.rounds, config, *drawn_from], sort_keys=True)
    return hashlib.sha256(what.encode()).hexdigest()[:12]


def results(args: argparse.Namespace, arm: str) -> dict[tuple[int, int], dict[str, Any]]:
    """The finished runs of an arm with these settings, by world and seed. Of two for one seed the later counts."""
    if not args.results.is_file():
        return {}
    lines, wanted = args.results.read_text().splitlines(), fingerprint(args, arm)
    rows = [row for row in map(json.loads, lines) if row["arm"] == arm and row.get("fingerprint") == wanted]
    return {(row["world"], row["seed"]): row for row in rows}
