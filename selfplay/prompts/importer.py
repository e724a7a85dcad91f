"""The child that opens a run (`python -m selfplay.prompts.importer`): reads and renders prompts, splits them, imports policy 0.

A process of its own because it needs a tokenizer and the initial model, which the controller never loads. Orders:

    {"order": "import", "config": …, "out": folder}                            the pool and what policy 0 needs
    {"order": "render", "policy": folder, "trust_remote_code": …, "conversations": […]}
                                                                               token ids of each, or why it has none
"""

from __future__ import annotations

import json
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from selfplay import seeds
from selfplay.config import Config
from selfplay.errors import InputError, SelfplayError
from selfplay.processes.protocol import protocol, quick_imports
from selfplay.prompts.pool import POOL, messages_of, prompt_id
from selfplay.storage import folders, tables
from selfplay.types import Message, Prompt, Split

INITIAL = "initial.json"
CANARY_TOKENS = 64


def read_file(path: Path) -> Iterator[dict[str, Any] | str]:
    """Rows of a JSONL or Parquet file; a row that cannot be read comes as the reason (a string)."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        try:
            yield from pq.read_table(path).to_pylist()
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read as Parquet: {error}") from None
    elif path.suffix in (".jsonl", ".json"):
        with path.open("rb") as file:
            for raw in file:
                if not raw.strip():
                    continue
                try:
                    row = json.loads(raw.decode("utf-8"))
                except UnicodeDecodeError:
                    yield "invalid UTF-8"
                except (ValueError, RecursionError):
                    yield "invalid JSON"
                else:
                    yield row if isinstance(row, dict) else "not an object"
    else:
        raise InputError(
            f"{path} is neither JSONL nor Parquet", "name it *.jsonl or *.parquet and write it in that format"
        )


def read_hub(name: str, split: str, column: str | None) -> Iterator[dict[str, Any] | str]:
    """Rows of a Hub dataset as {"prompt": …} or {"messages": …}."""
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises a dozen unrelated types
        raise InputError(
            f"prompts.source {name!r} is no file here, and loading it from the Hub failed: {error}",
            "give a .jsonl or .parquet file, or a dataset id and a split that exist",
        ) from None
    if column is not None and column not in rows.column_names:
        raise InputError(f"{name} has no column {column!r}; it has {', '.join(rows.column_names)}")
    for row in rows:
        value = row[column] if column else None
        yield row if column is None else {"messages": value} if isinstance(value, list) else {"prompt": value}


def read_prompts(
    source: str, config: Config, counts: Counter[str]
) -> dict[str, tuple[list[Message], dict[str, Any], str | None]]:
    """prompt_id → (messages, meta, parent) of a file or a Hub id; bad rows and duplicates are counted."""
    path = Path(source)
    if path.is_file():
        rows = read_file(path)
    elif path.suffix in (".jsonl", ".json", ".parquet") or source.startswith((".", "/")):
        raise InputError(f"{source}: no such file", "relative paths start at the working directory")
    else:
        rows = read_hub(source, config.prompts.split, config.prompts.column)
    found: dict[str, tuple[list[Message], dict[str, Any], str | None]] = {}
    for row in rows:
        messages = row if isinstance(row, str) else messages_of(row)
        if isinstance(messages, str):
            counts[messages] += 1
            continue
        assert not isinstance(row, str)
        key = prompt_id(messages)
        if key in found:
            counts["duplicate"] += 1
        else:
            found[key] = (messages, row.get("meta") or {}, str(row["parent"]) if row.get("parent") else None)
    if not found:
        bad = ", ".join(f"{n} × {why}" for why, n in counts.items())
        raise InputError(f"{source} has no usable prompt" + (f" ({bad})" if bad else ": it is empty"))
    return found


def ancestor(key: str, parents: Mapping[str, str | None]) -> str:
    """The oldest prompt that this one was made from, as far as parents are known; itself where it has none."""
    line = [key]
    while (parent := parents.get(line[-1])) is not None:
        if parent in line:
            return min(line[line.index(parent) :])  # a circle has no oldest; all of it ends on one side of the split
        line.append(parent)
    return line[-1]


def rendered(
    render: Callable[[list[Message]], list[int]], messages: list[Message], meta: Any = None
) -> list[int] | str:
    """Token ids of a conversation, or why it has none."""
    try:
        ids = render(messages)
        json.dumps([messages, meta], ensure_ascii=False).encode()
    except Exception as error:  # a template refuses in its own way: roles that do not alternate, a lone surrogate, …
        return f"cannot be rendered ({type(error).__name__})"
    return ids


def build_pool(config: Config, render: Any) -> tuple[list[Prompt], Counter[str]]:
    """All prompts, rendered and split, and how many rows were set aside for what. `render`: messages → token ids."""
    counts: Counter[str] = Counter()
    settings = config.prompts
    train = read_prompts(settings.source, config, counts)
    heldout = read_prompts(settings.heldout, config, counts) if settings.heldout else {}
    parents = {key: parent for key, (_, _, parent) in {**train, **heldout}.items()}
    roots = {key: ancestor(key, parents) for key in parents}
    held_out_roots = {roots[key] for key in heldout}
    leaks = [key for key in train if key in heldout or roots[key] in held_out_roots]
    for key in leaks:
        del train[key]
        counts["also held out"] += 1
    pool = []
    for key, (messages, meta, parent) in {**train, **heldout}.items():
        root, kept_apart = roots[key], key in heldout
        if not settings.heldout:
            kept_apart = seeds.derive(config.run.seed, "heldout", root) < settings.heldout_fraction * 2**63
        split: Split = "train"
        if kept_apart:
            audit = seeds.derive(config.run.seed, "audit", root) < settings.audit_fraction * 2**63
            split = "audit" if audit else "heldout"
        ids = rendered(render, messages, meta)
        if isinstance(ids, str):
            counts[ids] += 1
            continue
        if len(ids) > settings.max_tokens:
            counts["too long"] += 1
            continue
        pool.append(
            Prompt(
                prompt_id=key,
                messages=messages,
                prompt_ids=ids,
                split=split,
                meta=meta if kept_apart else {},
                parent=parent,
                source=settings.heldout if key in heldout and settings.heldout else settings.source,
                root=None if root in (key, parent) else root,
            )
        )
    for split in ("train", "heldout"):
        if not any(p.split == split for p in pool):
            raise InputError(
                f"no prompt is left for {split} ({dict(counts) or 'too few prompts'})",
                "give more prompts, raise prompts.max_tokens, or change prompts.heldout_fraction",
            )
    return pool, counts


def initial_folder(model: str, revision: str | None) -> Path:
    """The folder of the initial policy; a Hub id is downloaded first."""
    path = Path(model)
    if path.is_dir():
        return path.resolve()
    if path.is_absolute() or model.startswith(".") or model.count("/") > 1:
        raise InputError(f"policy.model {model}: no such folder", "relative paths start at the working directory")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                model, revision=revision, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
            )
        )
    except Exception as error:  # network, authorisation and naming errors have no common base
        raise InputError(
            f"policy.model {model!r} is no folder here, and fetching it from the Hub failed: {error}"
        ) from None


def canary_ids(pool: list[Prompt], config: Config, vocabulary: int) -> list[list[int]]:
    """The fixed sequences of a run: held-out prompts, cut to 64 tokens, at least 8 tokens each."""
    rows = sorted(
        (p for p in pool if p.split != "train"), key=lambda p: seeds.derive(config.run.seed, "canary", p.prompt_id)
    )[: config.swap.canaries]
    filler = [seeds.derive(config.run.seed, "canary", i) % vocabulary for i in range(8)]
    return [(p.prompt_ids + filler[: max(0, 8 - len(p.prompt_ids))])[:CANARY_TOKENS] for p in rows]


def load_tokenizer(policy: Path, trust_remote_code: bool) -> Any:
    """The policy's tokenizer; raises InputError for one that cannot be loaded or has no chat template."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(policy, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"the tokenizer of {policy} cannot be loaded: {error}") from None
    if not tokenizer.chat_template:
        raise InputError(
            f"the tokenizer of {policy} has no chat template", "use an instruct model, or add chat_template.jinja"
        )
    return tokenizer


def template(tokenizer: Any) -> Callable[[list[Message]], list[int]]:
    """messages → token ids, the answer's beginning included: the only way that prompts are rendered."""

    def render(messages: list[Message]) -> list[int]:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        return [int(i) for i in ids]

    return render


def run_render(order: dict[str, Any]) -> list[list[int] | str]:
    """Token ids of each conversation, or why it has none."""
    render = template(load_tokenizer(Path(order["policy"]), order["trust_remote_code"]))
    return [rendered(render, messages) for messages in order["conversations"]]


def run_import(config: Config, out: Path) -> dict[str, Any]:
    """Write the pool and what the manifest of policy 0 needs to `out`; returns counts."""
    import torch

    from selfplay.models import weights

    source = initial_folder(config.policy.model, config.policy.revision)
    tokenizer = load_tokenizer(source, config.policy.trust_remote_code)
    pool, counts = build_pool(config, template(tokenizer))
    ids = canary_ids(pool, config, len(tokenizer))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = weights.load(source, getattr(torch, config.policy.dtype), config.policy.trust_remote_code)
    logps = weights.sequence_logps(model.to(device).eval(), ids)
    tables.write_rows(out / POOL, pool, Prompt)
    folders.write_json(
        out / INITIAL,
        {"source": str(source), "canaries": {"token_ids": ids, "logps": logps}, "set_aside": dict(counts)},
    )
    return {"prompts": dict(Counter(p.split for p in pool)), "set_aside": dict(counts)}


def main() -> None:
    channel = protocol()
    with quick_imports():
        import transformers.models.auto  # noqa: F401
    channel.ready()
    for order in channel.orders():
        try:
            if order["order"] == "render":
                channel.result(order, run_render(order))
            else:
                channel.result(order, run_import(Config.model_validate(order["config"]), Path(order["out"])))
        except SelfplayError as error:
            channel.error(order, "input", str(error), error.hint)
        except Exception as error:  # the boundary: the controller hears of whatever it is
            traceback.print_exc()
            channel.error(order, "internal", f"{type(error).__name__}: {error}", "the importer's log has the traceback")


if __name__ == "__main__":
    main()
