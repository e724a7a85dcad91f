"""Loads models without memory for their weights, for `checks/models.py`: `python -m selfplay.checks.loading`, JSON on stdin.

Each model is built from its config (on the meta device) and compared with the names and shapes in its safetensors files.
Its chat template renders conversations.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from selfplay.checks.templates import Row, about_template, of_policy, of_reward
from selfplay.config.policy import PolicyConfig
from selfplay.errors import InputError, SelfplayError
from selfplay.models import initial
from selfplay.processes.protocol import quick_imports
from selfplay.storage.checkpoints import Adapter


def look(row: Row) -> list[tuple[str, str, str]]:
    """Level, subject and text of all there is to say of a model that is loaded."""
    key = row["key"]
    with TemporaryDirectory(prefix="selfplay-check-") as scratch:
        try:
            folder, adapter = Path(row["model"]), None
            if row["policy"]:  # as the import makes it
                settings = PolicyConfig(model=row["model"], trust_remote_code=row["trust_remote_code"])
                policy = initial.prepare(settings, Path(scratch) / "policy")
                folder, adapter = policy.folder, policy.adapter
            model = _built(row, folder, adapter)
            found = [("ok", f"{key} loads", "its files fit its config, and its chat template works")]
            found += [(level, f"{key} template", text) for text, level in about_template(row, folder)]
            more = of_policy if row["policy"] else of_reward
            return found + [(level, f"{key} {about}", text) for level, about, text in more(row, folder, model)]
        except SelfplayError as error:
            return [("error", f"{key} loads", f"{error}; {error.hint}")]
        except Exception as error:  # readers of configs, tokenizers and templates raise errors of any type
            return [("error", f"{key} loads", f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")]


def _built(row: Row, folder: Path, adapter: Adapter | None) -> Any:
    """The model without memory for its weights; raises InputError where its files do not fit, or its template fails."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from selfplay.models.rendering import load_tokenizer

    own_code = {"trust_remote_code": row["trust_remote_code"]}
    kind = AutoModelForCausalLM if row["policy"] else AutoModelForSequenceClassification
    weights = folder if adapter is None else initial.base_of(adapter, row["trust_remote_code"])
    model, report = kind.from_pretrained(
        weights, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True, **own_code
    )
    if adapter is not None:
        _require_fit(adapter, model)
    if bad := sorted([*map(str, report["missing_keys"]), *(str(key[0]) for key in report["mismatched_keys"])]):
        raise InputError(
            f"its files lack {len(bad)} tensors of the model, or have them in another shape: {', '.join(bad[:3])}",
            "take config.json and the weights of one save",
        )
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
    if row["policy"]:
        tokenizer = load_tokenizer(folder, row["trust_remote_code"])
        tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, **row["kwargs"])
    else:
        AutoTokenizer.from_pretrained(folder, **own_code).apply_chat_template(chat, **row["kwargs"])
    return model


def _require_fit(adapter: Adapter, model: Any) -> None:
    """Raise InputError where an adapter is not of this model, by the names of its tensors and their shapes."""
    hint = "name the base that it was trained on in base_model_name_or_path of adapter_config.json"
    modules = dict(model.named_modules())
    for name, (_, shape) in adapter.tensors.items():
        module, _, leaf = name.removeprefix("base_model.model.").partition(".lora_")
        while module and module not in modules:
            module = module.rpartition(".")[0]
        weight = getattr(modules[module], "weight", None)
        if weight is None or weight.ndim != 2:
            raise InputError(f"the adapter has {name}, for which its base {adapter.base} has no weights", hint)
        sizes = {"A.weight": shape[-1:], "B.weight": shape[:1]}.get(leaf, ())
        if any(size not in weight.shape for size in sizes):
            raise InputError(
                f"the adapter does not fit its base {adapter.base}: {name} is {list(shape)}, {module} {list(weight.shape)}",
                hint,
            )


if __name__ == "__main__":
    with quick_imports():
        import transformers.models.auto  # noqa: F401
    print(json.dumps([look(row) for row in json.load(sys.stdin)]))
