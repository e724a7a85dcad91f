"""Looks at the models: what their folders hold, how long a text they read, and whether they load.

Whether they load is found out by a process of its own, `python -m selfplay.checks.models JSON`, because it imports
PyTorch. It builds each model from its config without memory for weights (on the meta device), compares it with the names
and shapes in its safetensors files, and renders a conversation.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from selfplay.checks import hub, sizes
from selfplay.checks.finding import Finding
from selfplay.config import Config
from selfplay.processes.protocol import quick_imports
from selfplay.rounds.requirements import num_labels

SECONDS = 300.0  # for the imports of the process that loads; a model itself takes a moment


def named(config: Config) -> dict[str, str]:
    """All models that a configuration names: key → folder or Hub id."""
    rewards = config.reward_sources() | config.judge_sources()
    models = {"policy.model": config.policy.model, **{f"{key}.model": source.model for key, source in rewards.items()}}
    return {key: model for key, model in models.items() if model is not None}


def folders(config: Config, run_dir: Path) -> Iterator[Finding]:
    """Whether each model is there with all its files, a tokenizer and a chat template among them."""
    rewards = config.reward_sources() | config.judge_sources()
    for key, model in named(config).items():
        source = rewards.get(key.removesuffix(".model"))
        labels = 1 if source and not source.heads and not source.trust_remote_code else None
        path = Path(model)
        if not path.is_dir():
            yield _on_the_hub(key, model, config.policy.revision if source is None else None)
            continue
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if labels is not None and (n := num_labels(path)) != labels:
            yield Finding.error(key, f"{model} has {n} labels; a reward model has 1")
            continue
        size = sizes.parameters(model) or 0
        if lack := _lacks(path):
            yield Finding.error(key, f"{model} has no {lack}")
            continue
        yield Finding.ok(
            key,
            f"{model}: {settings.get('architectures', ['?'])[0]}, {size / 1e6:,.1f} M parameters, all files are there",
        )


def _lacks(model: Path) -> str | None:
    """What a model's folder lacks besides its weights; None where it has a tokenizer and a chat template."""
    settings = model / "tokenizer_config.json"
    known = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    if not known and not any((model / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return "tokenizer"
    if (
        known.get("chat_template")
        or (model / "chat_template.jinja").is_file()
        or (model / "chat_template.json").is_file()
    ):
        return None
    return "chat template: use an instruct model, or add chat_template.jinja"


def _on_the_hub(key: str, model: str, revision: str | None) -> Finding:
    if not sizes.on_the_hub(model):
        return Finding.error(key, f"{model}: no such folder")
    told = hub.ask(model, revision)
    if told.absent:
        hint = "correct the name, or export HF_TOKEN with a token that may read it"
        return Finding.error(key, f"{model}: the Hub has no such model for us ({told.absent}); {hint}")
    if told.away:
        copy = f"a copy is in {told.cached}" if told.cached else "there is no copy in the cache"
        return Finding.warning(key, f"{model}: the Hub could not be asked ({told.away}); {copy}")
    if not any(name.endswith(".safetensors") for name in told.files):
        return Finding.error(key, f"{model} has no safetensors on the Hub")
    size = f", {told.parameters / 1e6:,.1f} M parameters" if told.parameters else ""
    return Finding.ok(key, f"{model} is on the Hub, with safetensors{size}")


def context(config: Config, run_dir: Path) -> Iterator[Finding]:
    """Whether the policy can read as many tokens as the engine and the trainer will give it."""
    settings = sizes.settings(config.policy.model, config.policy.revision)
    limit = (settings.get("text_config") or settings).get("max_position_embeddings")
    if not isinstance(limit, int):
        return
    asked = {
        "prompts.max_tokens + generate.max_tokens + 1": config.prompts.max_tokens + config.generate.max_tokens + 1,
        "generate.engine.max_model_len": config.generate.engine.max_model_len or 0,
        "train.max_length": config.train.max_length,
    }
    over = [f"{name} is {length}" for name, length in asked.items() if length > limit]
    said = f"the policy reads up to {limit} tokens" + (f", but {', '.join(over)}" if over else "")
    yield Finding("error" if over else "ok", "context", said)


def loads(config: Config) -> list[Finding]:
    """A finding for each model that is a folder: does it load? It takes some seconds, since PyTorch is imported."""
    rewards = config.reward_sources() | config.judge_sources()
    asked = []
    for key, model in named(config).items():
        source = rewards.get(key.removesuffix(".model"))
        owner = config.policy if source is None else source
        if (Path(model) / "config.json").is_file():
            asked.append(
                {
                    "key": key,
                    "model": model,
                    "policy": source is None,
                    "trust_remote_code": owner.trust_remote_code,
                    "kwargs": owner.chat_template_kwargs,
                    "dated": owner.template_date is not None,
                    "thinking": config.policy.thinking and config.policy.thinking.model_dump(),
                }
            )
    if not asked:
        return []
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "selfplay.checks.models", json.dumps(asked)],
        capture_output=True, text=True, timeout=SECONDS,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return [Finding.error("models", f"the process that loads them ended: {last}")]
    answers = json.loads(done.stdout.splitlines()[-1])
    return [Finding(level, about, text) for said in answers for level, about, text in said]


def _look(row: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Level, subject and text of all there is to say of a model that is loaded."""
    if why := _why_not(row):
        return [("error", f"{row['key']} loads", why)]
    found = [("ok", f"{row['key']} loads", "its files fit its config, and its chat template works")]
    return found + [(level, f"{row['key']} template", text) for text, level in _about_template(row)]


def _about_template(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is to be known of a chat template that works, and the level of it."""
    from selfplay.models.rendering import Renderer, Template, load_tokenizer
    from selfplay.models.thinking import Thinking

    tokenizer = load_tokenizer(Path(row["model"]), row["trust_remote_code"])
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


def _why_not(row: dict[str, Any]) -> str | None:
    """Why the trainer or the reward server could not load this model; None where they can."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from selfplay.models.rendering import load_tokenizer

    own_code = {"trust_remote_code": row["trust_remote_code"]}
    kind = AutoModelForCausalLM if row["policy"] else AutoModelForSequenceClassification
    try:
        _, report = kind.from_pretrained(row["model"], device_map="meta", output_loading_info=True, **own_code)
        if bad := sorted(str(key) for key in [*report["missing_keys"], *report["mismatched_keys"]]):
            return (
                f"its files lack {len(bad)} tensors of the model, or have them in another shape: {', '.join(bad[:3])}"
            )
        chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
        if row["policy"]:
            tokenizer = load_tokenizer(Path(row["model"]), row["trust_remote_code"])
            tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, **row["kwargs"])
        else:
            AutoTokenizer.from_pretrained(row["model"], **own_code).apply_chat_template(chat, **row["kwargs"])
    except Exception as error:  # readers of configs, tokenizers and templates raise errors of any type
        return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    return None


if __name__ == "__main__":
    with quick_imports():
        import transformers.models.auto  # noqa: F401
    print(json.dumps([_look(row) for row in json.loads(sys.argv[1])]))
