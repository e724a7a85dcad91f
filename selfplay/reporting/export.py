"""What a run made, for use elsewhere: its pairs as a TRL preference dataset, a policy as a model folder with a card."""

from __future__ import annotations

import json
import shutil
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from selfplay.errors import InputError
from selfplay.storage import folders, policies, retention, tables
from selfplay.storage.ledger import Store
from selfplay.storage.policies import Policies
from selfplay.types import Pair, Prompt
from selfplay.visible import visible

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SCHEMA = pa.schema(
    [
        ("prompt", MESSAGES), ("chosen", MESSAGES), ("rejected", MESSAGES), ("prompt_id", pa.string()),
        ("round", pa.int32()), ("policy", pa.int32()), ("chosen_reward", pa.float64()), ("rejected_reward", pa.float64()),
        ("explicit_margin", pa.float64()), ("implicit_margin", pa.float64()), ("alignment_potential", pa.float64()),
        ("kept_because", pa.string()), ("parent", pa.string()), ("root", pa.string()), ("source", pa.string()),
    ]
)  # fmt: skip


def export_pairs(run_dir: Path, out: Path) -> int:
    """Write the pairs that the run trained on to `out`/data/train-*.parquet with a card; returns how many.

    The format is TRL's conversational preference dataset; lineage (round, policy, rewards, margins) comes beside it. One
    file a round. Raises InputError when there are none, or `out` exists.
    """
    if out.exists():
        raise InputError(f"{out} is there already", "name a new folder")
    ledger = Store(run_dir)
    samplers = {row["round"]: row["sampler"] for row in ledger.rounds() if row["state"] in ("promoted", "rejected")}
    rounds = [(index, path) for index, path in _depth_files(run_dir) if index in samplers and path.is_file()]
    configs = {index: ledger.config(index) for index, _ in rounds}
    alone = retention.deleted(ledger).get(retention.CANDIDATES, 0)
    ledger.close()
    if not rounds:
        raise InputError(f"no finished round of {run_dir} has pairs", "run one first: selfplay round")
    total = 0
    with folders.folder(out) as partial:
        (partial / "data").mkdir()
        for index, path in rounds:
            rows = [_row(index, samplers[index], pair, prompt) for pair, prompt in _pairs(path)]
            pq.write_table(pa.Table.from_pylist(rows, SCHEMA), partial / "data" / f"train-{index:05d}.parquet")
            total += len(rows)
        (partial / "README.md").write_text(visible(_dataset_card(configs, total, alone)), encoding="utf-8")
    return total


def _depth_files(run_dir: Path) -> list[tuple[int, Path]]:
    folders = sorted((run_dir / "rounds").glob("[0-9]*")) if (run_dir / "rounds").is_dir() else []
    return [(int(folder.name), folder / "depth" / "pairs.parquet") for folder in folders]


def _pairs(path: Path) -> list[tuple[Pair, Prompt]]:
    prompts = {p.prompt_id: p for p in tables.read_rows(path.parents[1] / "prompts" / "prompts.parquet", Prompt)}
    return [(pair, prompts[pair.prompt_id]) for pair in tables.read_rows(path, Pair)]


def _row(index: int, sampler: int, pair: Pair, prompt: Prompt) -> dict[str, Any]:
    return {
        "prompt": prompt.messages,
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
        "prompt_id": pair.prompt_id,
        "round": index,
        "policy": sampler,
        "chosen_reward": pair.chosen_reward,
        "rejected_reward": pair.rejected_reward,
        "explicit_margin": pair.explicit_margin,
        "implicit_margin": pair.implicit_margin,
        "alignment_potential": pair.potential,
        "kept_because": pair.kept_because,
        "parent": prompt.parent,
        "root": prompt.ancestor,
        "source": prompt.source,
    }


def export_policy(run_dir: Path, version: int, out: Path) -> None:
    """Copy a policy, verified, to the model folder `out` with a model card. Raises InputError or CheckpointError."""
    if out.exists():
        raise InputError(f"{out} is there already", "name a new folder")
    store = Policies(run_dir)
    if version not in store.versions():
        raise InputError(
            f"{run_dir} has no policy {version}", f"it has {', '.join(map(str, store.versions())) or 'none'}"
        )
    policy = store.get(version)
    manifest = policies.verify(store.folder(version))
    with folders.folder(out) as partial:
        for name in manifest.files:
            if "/" not in name:  # masters and adapters are for training
                shutil.copyfile(Path(policy.path) / name, partial / name)
        (partial / "README.md").write_text(visible(_model_card(run_dir, manifest)), encoding="utf-8")


def _front(**fields: Any) -> str:
    """The YAML block that the Hub reads; JSON is YAML."""
    return "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in fields.items()) + "---\n"


def _scored_by(section: dict[str, Any]) -> str:
    """The source of scores that a section `reward`, or a member of its ensemble, names. Addresses stay at home."""
    if ensemble := section.get("ensemble"):
        members = ", ".join(_scored_by(member) for member in ensemble["members"])
        return f"an ensemble ({ensemble['combine']}) of {members}"
    if section.get("rules"):
        return "rules (" + ", ".join(rule["rule"] for rule in section["rules"]) + ")"
    if judge := section.get("chat_judge"):
        return f"the {judge['mode']} judge `{judge['model']}`"
    if source := section.get("source"):
        return f"the reward `{source['kind']}`"
    if section.get("url"):
        return f"the reward server's `{section['served_model']}`" if section.get("served_model") else "a reward server"
    return f"`{section['model']}`"


def _made_by(config: dict[str, Any]) -> str:
    """How a round with this configuration made its pairs."""
    pairs, depth = config["pairs"], config["depth"]["method"]
    return f"ranked by {_scored_by(config['reward'])}, selected by `{pairs['selection']}` (keep {pairs['keep']:g}), depth `{depth}`"


def _dataset_card(configs: dict[int, dict[str, Any]], pairs: int, alone: int) -> str:
    """configs: by round, oldest first; alone: the newest round whose other candidates were deleted."""
    name = next(iter(configs.values()))["run"]["name"]
    hidden = any((config["policy"].get("thinking") or {}).get("hidden") for config in configs.values())
    alike = [
        (made, [index for index, _ in group])
        for made, group in groupby(configs.items(), lambda item: _made_by(item[1]))
    ]
    made = "\n".join(
        f"- {f'rounds {rounds[0]} to {rounds[-1]}' if len(rounds) > 1 else f'round {rounds[0]}'}: {how}"
        for how, rounds in alike
    )
    return (
        _front(tags=["preference", "dpo", "selfplay", "trl"], task_categories=["text-generation"])
        + f"""
# Preference pairs of the run «{name}»

{pairs} pairs from {len(configs)} rounds of self-play: responses sampled by the policy of the round, scored by a reward.

{made}

{f"Of the rounds up to {alone} only their pairs are left: retention has deleted all other responses to their prompts.{chr(10) * 2}" if alone >= min(configs) else ""}One Parquet file a round, in TRL's conversational preference format (`prompt`, `chosen`, `rejected`).

| column | meaning |
|---|---|
| round, policy | where a pair comes from: the round, and the version of the policy that sampled it |
| chosen_reward, rejected_reward, explicit_margin | the reward's scores and their difference |
| implicit_margin, alignment_potential | of the sampling policy, as the pair was ranked |
| kept_because | `base` (the prompt's widest pair) or `depth` (added to it) |
| prompt_id, source | content hash of the prompt, and where it came from |
| parent, root | the prompt that it was rewritten from, null for none; the oldest ancestor, itself where it has none |

{"Thoughts of the policy are no part of the texts, although it was trained on them. " if hidden else ""}The texts are model output: nobody has read them.
"""
    )


def _model_card(run_dir: Path, manifest: policies.Manifest) -> str:
    ledger = Store(run_dir)
    config = ledger.config(manifest.round or 1)  # the initial policy was there before any
    ledger.close()
    update = ", ".join(f"{name} {value:.3g}" for name, value in manifest.update.items()) or "none (the initial policy)"
    made = (
        f"Trained by self-play with ε-DPO on pairs {_made_by(config)}."
        if manifest.round
        else "The model that the run began with."
    )
    return (
        _front(
            tags=["selfplay", "dpo", "epsilon-dpo"],
            base_model=config["policy"]["model"] if config else "unknown",
            library_name="transformers",
        )
        + f"""
# Policy {manifest.version} of the run «{config["run"]["name"] if config else run_dir.name}»

| | |
|---|---|
| round | {manifest.round} |
| parent, reference | {_policy(manifest.parent)}, {_reference(manifest)} |
| β at the end | {"none" if manifest.beta is None else manifest.beta} |
| update | {update} |
| config fingerprint | {manifest.fingerprint} |
| packages | {", ".join(f"{name} {version}" for name, version in sorted(manifest.packages.items()))} |

{made} SHA-256 of every file is in the run's manifest.
"""
    )


def _reference(manifest: policies.Manifest) -> str:
    averaged = manifest.reference is None and manifest.reference_sha256 is not None
    return f"a moving average of policies ({manifest.reference_sha256})" if averaged else _policy(manifest.reference)


def _policy(version: int | None) -> str:
    return "none" if version is None else f"policy {version}"
