"""What `selfplay check` finds about models and settings that are made by hand."""

import json

from mini import TINY

from selfplay.checks.check import LOOKS, check
from selfplay.config import load


def model(folder, *, template=True, tokenizer=True, **settings):
    """A checkpoint of one small tensor."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]} | settings))
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    if tokenizer:
        (folder / "tokenizer.json").write_text("{}")
    if template:
        (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def settings(tmp_path, policy, *more):
    for name, n in (("train", 200), ("heldout", 1200)):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"prompt": "{name} {i}"}}\n' for i in range(n)))
    files = [f"prompts.source={tmp_path / 'train.jsonl'}", f"prompts.heldout={tmp_path / 'heldout.jsonl'}"]
    reward = ["reward.model=null", "reward.rules=[{rule: length, max: 9}]", "evaluate.judge=null"]
    return load(TINY, [f"policy.model={policy}", *files, *reward, *more])


def said(config, tmp_path, about):
    """The first finding about something. The looks that take half a second are left out where nothing of theirs is asked."""
    slow = {"reward": ("reward", "evaluate.judge"), "prompts": ("prompts", "evaluate.prompts")}
    looks = [look for look in LOOKS if look[0] not in slow or about.startswith(slow[look[0]])]
    return next(((f.level, f.text) for f in check(config, tmp_path / "run", looks) if f.about == about), None)
