"""Loads models without memory for their weights, for `checks/models.py`: `python -m selfplay.checks.loading JSON`.

Each model is built from its config (on the meta device) and compared with the names and shapes in its safetensors files.
Its chat template renders conversations.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from selfplay.config.policy import PolicyConfig
from selfplay.models import initial
from selfplay.processes.protocol import quick_imports
from selfplay.storage.checkpoints import Adapter

Row = dict[str, Any]  # what `checks/models.py` asks about a model


def look(row: Row) -> list[tuple[str, str, str]]:
    """Level, subject and text of all there is to say of a model that is loaded."""
    folder, adapter = Path(row["model"]), None
    with TemporaryDirectory(prefix="selfplay-check-") as scratch:
        if row["policy"]:  # as the import makes it
            settings = PolicyConfig(model=row["model"], trust_remote_code=row["trust_remote_code"])
            policy = initial.prepare(settings, Path(scratch) / "policy")
            folder, adapter = policy.folder, policy.adapter
        if why := _why_not(row, folder, adapter):
            return [("error", f"{row['key']} loads", why)]
        found = [("ok", f"{row['key']} loads", "its files fit its config, and its chat template works")]
        return found + [(level, f"{row['key']} template", text) for text, level in _about_template(row, folder)]


def _about_template(row: Row, folder: Path) -> Iterator[tuple[str, str]]:
    """What is to be known of a chat template that works, and the level of it."""
    from selfplay.models.rendering import Renderer, Template, load_tokenizer
    from selfplay.models.thinking import Thinking

    tokenizer = load_tokenizer(folder, row["trust_remote_code"])
    section = row["key"].removesuffix(".model")
    template = Template(kwargs=row["kwargs"], today=date.today())
    if unread := template.unread(tokenizer):
        yield f"{section}.chat_template_kwargs: the template reads no {', '.join(unread)}", "warning"
    if template.prints_date(tokenizer):
        day = "the given one" if row["dated"] else "that of the day on which the run begins"
        yield f"it prints the date, in all rounds {day} ({section}.template_date)", "ok"
    if not row["policy"]:
        return
    (ids,) = Renderer(tokenizer, template)([[{"role": "user", "content": "Hello"}]])
    thinking = Thinking(tokenizer, **(row["thinking"] or {"start": "<think>", "end": "</think>", "hidden": True}))
    assert not isinstance(ids, str), "this conversation was rendered before"
    if not thinking.opened(ids.tolist()):
        return
    if row["thinking"]:
        yield "its prompts end with the start of thoughts, which end with policy.thinking.end", "ok"
    else:
        hint = "set policy.thinking to {} to hide them"
        yield f"its prompts end with <think>, and rewards will read the thoughts: {hint}", "warning"


def _why_not(row: Row, folder: Path, adapter: Adapter | None) -> str | None:
    """Why the trainer or the reward server could not load this model; None where they can."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from selfplay.models.rendering import load_tokenizer

    own_code = {"trust_remote_code": row["trust_remote_code"]}
    kind = AutoModelForCausalLM if row["policy"] else AutoModelForSequenceClassification
    try:
        weights = folder if adapter is None else initial.base_of(adapter, row["trust_remote_code"])
        model, report = kind.from_pretrained(weights, device_map="meta", output_loading_info=True, **own_code)
        if adapter is not None and (why := _misfit(adapter, model)):
            return why
        if bad := sorted(str(key) for key in [*report["missing_keys"], *report["mismatched_keys"]]):
            return (
                f"its files lack {len(bad)} tensors of the model, or have them in another shape: {', '.join(bad[:3])}"
            )
        chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
        if row["policy"]:
            tokenizer = load_tokenizer(folder, row["trust_remote_code"])
            tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, **row["kwargs"])
        else:
            AutoTokenizer.from_pretrained(folder, **own_code).apply_chat_template(chat, **row["kwargs"])
    except Exception as error:  # readers of configs, tokenizers and templates raise errors of any type
        return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    return None


def _misfit(adapter: Adapter, model: Any) -> str | None:
    """Why an adapter cannot be of this model, by the names of its tensors and their shapes; None where it can."""
    modules = dict(model.named_modules())
    for name, (_, shape) in adapter.tensors.items():
        module, _, leaf = name.removeprefix("base_model.model.").partition(".lora_")
        while module and module not in modules:
            module = module.rpartition(".")[0]
        weight = getattr(modules[module], "weight", None)
        if weight is None or weight.ndim != 2:
            return f"the adapter has {name}, for which its base {adapter.base} has no weights"
        sizes = {"A.weight": shape[-1:], "B.weight": shape[:1]}.get(leaf, ())
        if any(size not in weight.shape for size in sizes):
            return f"the adapter does not fit its base {adapter.base}: {name} is {list(shape)}, {module} {list(weight.shape)}"
    return None


if __name__ == "__main__":
    with quick_imports():
        import transformers.models.auto  # noqa: F401
    print(json.dumps([look(row) for row in json.loads(sys.argv[1])]))
