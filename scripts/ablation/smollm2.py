"""SmolLM2-135M-Instruct with its instruction prompts: what `make demo-smollm` trains, judged on unseen topics."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import compare_answers

from ablation.arms import ALL, NEIGHBOURS
from ablation.worlds import ROOT, Expected

FOLDER = ROOT / ".cache" / "smollm2"
# Fixed before the runs, as those of the tiny world.
COMPARISONS: list[Expected] = [
    ("potential", "plain", "strict", 0.0),
    ("epsilon", "plain", "strict", -0.02),
    ("epsilon", "plain", "strict_per_nat", 0.0),
    ("gradient", "uniform", "strict", 0.0),
    ("gradient", "plain", "strict", 0.0),
    *((ALL, "plain", metric, 0.0) for metric in ("strict", "share")),
    *((arm, "plain", "strict", 0.0) for arm in NEIGHBOURS),
]
METRICS = {
    "strict": "all constraints kept, strict",
    "gained": "the same less the initial policy's",
    "loose": "all constraints kept, loose",
    "share": "share of constraints, strict",
    "kl": "KL to the initial policy (nats an answer)",
    "strict_per_nat": "strict gained per nat of KL",
    "repeated": "4-grams said before",
    "length": "tokens an answer",
}
PICTURED = ("strict", "share", "kl", "repeated", "length")
LAST = {"evaluate.prompts": 64, "evaluate.audit_every": 1, "evaluate.audit_prompts": 400}
"""The audit prompts judge; those of the gate tell the KL."""
WORKERS = 1
"""A run has two engines and then a trainer, which has both cores to itself."""
ENVIRONMENT: Mapping[str, str] = {}


def build(args: argparse.Namespace, world: int) -> None:
    subprocess.run([sys.executable, str(ROOT / "scripts" / "get_smollm2.py"), "--out", str(FOLDER)], check=True)


def built(world: int) -> str:
    digest = hashlib.sha256()
    for path in [FOLDER / "policy" / "model.safetensors", *sorted((FOLDER / "prompts").iterdir())]:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def settings(args: argparse.Namespace, world: int) -> dict[str, Any]:
    prompts = {"source": "train", "heldout": "heldout", "audit": "audit"}
    return {
        "policy.model": str(FOLDER / "policy"),
        **{f"prompts.{name}": str(FOLDER / "prompts" / f"{file}.jsonl") for name, file in prompts.items()},
    }


@contextlib.contextmanager
def reward(world: int) -> Iterator[dict[str, Any]]:
    """A program checks the constraints: nothing is started."""
    yield {}


def expected(args: argparse.Namespace) -> Sequence[Expected]:
    return COMPARISONS


def measured(run_dir: Path, metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the answers to the audit prompts."""
    found = compare_answers.load(run_dir)

    def kept(loose: bool) -> list[list[bool]]:
        return compare_answers.followed(found.prompts, found.trained, loose=loose)

    before = compare_answers.followed(found.prompts, found.initial, loose=False)
    strict, initial = (statistics.fmean(map(all, rows)) for rows in (kept(False), before))
    kl = metrics[-1]["evaluate/kl_initial"]
    return {
        "strict": strict,
        "gained": strict - initial,
        "loose": statistics.fmean(map(all, kept(True))),
        "share": statistics.fmean(map(statistics.fmean, kept(False))),
        "kl": kl,
        "strict_per_nat": (strict - initial) / kl,
        "repeated": statistics.fmean(compare_answers.repeated(answer.token_ids, 4) for answer in found.trained),
        "length": statistics.fmean(answer.n_tokens for answer in found.trained),
        "answers": len(found.trained),
    }
