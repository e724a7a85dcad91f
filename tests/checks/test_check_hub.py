"""What the Hub says about models, by a server that answers as it does, asked by a process that knows no other."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from typing import ClassVar

import pytest
from mini import ROOT, TINY, overrides

from selfplay.checks import hub_rows, models
from selfplay.checks.prompts import files
from selfplay.config import load
from selfplay.prompts.formats import Reading

pytestmark = pytest.mark.service

CONFIG = {
    "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072,
}  # fmt: skip
CARDS = {
    "one": {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/*"}]}]},
    "several": {"configs": [{"config_name": name, "data_files": "x/*"} for name in ("main", "socratic")],
                "dataset_info": [{"config_name": "main", "splits": [{"name": "train", "num_examples": 7473}, {"name": "test"}]}]},
    "silent": None,
}  # fmt: skip
ASK_DATASETS = """
import json, sys
from selfplay.checks.prompts import card
from selfplay.config import load
asked = [load(sys.argv[1], ["prompts.heldout=null", *sets.split()]).prompts for sets in sys.argv[2:]]
said = [card("prompts.source", one.source, one.split, one.config) for one in asked]
print(json.dumps([[[found.level, found.text]] for found in said]))
"""
ASK_PROMPTS = """
import json, sys
from selfplay.checks import hub_rows, models
from selfplay.checks.check import check
from selfplay.checks.models import loads
from selfplay.checks.prompts import files
from selfplay.config import load
hub_rows.SECONDS = models.SECONDS = 600.0
sets = [*json.loads(sys.argv[2]), f"prompts.source={sys.argv[3]}", "prompts.split=train[:50%]", "prompts.heldout=null"]
config = load(sys.argv[1], sets)
found = check(config, None, [("prompts", files)]) + loads(config)
print(json.dumps([[f.level, f.about, f.text] for f in found]))
"""
CARD = b"---\nconfigs: [{config_name: default, data_files: [{split: train, path: data/*.jsonl}]}]\n---\n"
CHATS = [{"messages": [{"role": "system", "content": "Be brief."}] * (i % 2) + [{"role": "user", "content": f"How much is {i} + {i}?"}],
          "vector": [0.5] * 64, "id": i} for i in range(2000)]  # fmt: skip
DATA = {
    "chats": {"README.md": CARD, "data/a.jsonl": b"".join(json.dumps(row).encode() + b"\n" for row in CHATS)},
}
"""Data sets with their files."""
SIZES = {"whole": 8_030_261_248, "gated": 3_212_749_824}
ASK = """
import json, sys
from selfplay.checks import machine, models, sizes
from selfplay.checks.check import check
from selfplay.config import load
found = {}
for name in sys.argv[2:]:
    config = load(sys.argv[1], [f"policy.model={name}", "reward.model=null", "reward.rules=[{rule: length, max: 9}]", "evaluate.judge=null"])
    looks = [("models", models.folders), ("context", models.context), ("disk", machine.disk)]
    said = [[f.level, f.about, f.text] for f in check(config, __import__("pathlib").Path("run"), looks)]
    shape = sizes.shape(name)
    found[name] = said, shape and [shape.parameters, shape.layers, shape.hidden]
print(json.dumps(found))
"""


class Hub(http.server.BaseHTTPRequestHandler):
    asked: ClassVar[list[str]] = []

    def do_GET(self):
        self.asked.append(self.path)
        parts = self.path.split("/")
        name = (parts[4:] or [""])[0] if parts[1] == "api" else parts[2]
        if parts[1:3] == ["api", "datasets"] and name in DATA:
            self.dataset(name, self.path.partition("?")[0].partition("/tree/")[2])
        elif parts[1] == "datasets":
            self.file(parts[3], "/".join(parts[6:]))
        elif parts[1:3] == ["api", "datasets"] and name in CARDS:
            self.answer(200, json.dumps({"id": f"org/{name}", "sha": "a" * 40, "cardData": CARDS[name]}).encode())
        elif parts[1] == "api" and name in ("whole", "gated", "pickled", "small"):
            files = ["config.json", "pytorch_model.bin" if name == "pickled" else "model.safetensors"]
            body = {"id": f"org/{name}", "siblings": [{"rfilename": file} for file in files], "sha": "a" * 40}
            if name in SIZES:
                body["safetensors"] = {"parameters": {"BF16": SIZES[name]}, "total": SIZES[name]}
            self.answer(200, json.dumps(body).encode())
        elif parts[1] == "api":
            self.answer(404, b"{}", **{"X-Error-Code": "RepoNotFound"})
        elif name == "gated":
            self.answer(403, b"", **{"X-Error-Code": "GatedRepo"})
        else:
            small = {"quantization_config": {"quant_method": "gptq"}} if name == "small" else {}
            self.answer(200, json.dumps(CONFIG | small).encode(), **{"X-Repo-Commit": "a" * 40, "ETag": '"e"'})

    do_HEAD = do_GET

    def dataset(self, name, tree):
        """What it is, or what is in a folder of it: `tree` is a revision with the folder."""
        if not tree:
            card = {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.jsonl"}]}]}
            return self.answer(200, json.dumps({"id": f"org/{name}", "sha": "a" * 40, "cardData": card}).encode())
        data = {"type": "directory", "path": "data", "oid": "c" * 40}
        files = [{"type": "file", "path": path, "size": len(DATA[name][path]), "oid": "d" * 40} for path in DATA[name]]
        inside = [file for file in files if file["path"].startswith("data/") == tree.endswith("/data")]
        return self.answer(200, json.dumps(inside if tree.endswith("/data") else [data, *inside]).encode())

    def file(self, name, path):
        if (content := DATA.get(name, {}).get(path)) is None:
            return self.answer(404, b"", **{"X-Error-Code": "EntryNotFound"})
        told = {"X-Repo-Commit": "a" * 40, "ETag": f'"{name}"', "Accept-Ranges": "bytes"}
        if not (asked := self.headers.get("Range")):
            return self.answer(200, content, **told)
        first, last = asked.removeprefix("bytes=").split("-")
        some = content[int(first) : int(last) + 1]
        return self.answer(206, some, **told, **{"Content-Range": f"bytes {first}-{last}/{len(content)}"})

    def answer(self, status, body, **headers):
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def served():
    Hub.asked.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def ask(tmp_path, endpoint, *names, code=ASK):
    env = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hub"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(TINY), *names],
        capture_output=True,
        text=True,
        env=env,
        cwd=tmp_path,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_hub_tells_sizes_and_shapes(tmp_path, served):
    found = ask(tmp_path, served, "org/whole", "org/gated", "org/pickled", "org/small", "org/none", "./nowhere")
    whole, shape = found["org/whole"]
    assert whole[0] == ["ok", "policy.model", "org/whole is on the Hub, with safetensors, 8,030.3 M parameters"]
    assert whole[1] == ["ok", "context", "the policy reads up to 131072 tokens"]
    assert "policies and two saves of the trainer need" in whole[2][2] and shape == [8_030_261_248, 32, 4096]
    gated, shape = found["org/gated"]
    assert gated[0][0] == "ok" and shape[0] == 3_212_749_824, "its size is known, its config is not: a usual shape"
    level, _, text = found["org/pickled"][0][0]
    assert level == "error" and text.startswith("org/pickled has no safetensors") and "pytorch_model.bin" in text
    level, _, text = found["org/small"][0][0]
    assert level == "error" and text.startswith("org/small has quantised weights (gptq), which cannot be trained; take")
    level, _, text = found["org/none"][0][0]
    assert level == "error" and "the Hub has no such model for us" in text and "HF_TOKEN" in text
    assert found["./nowhere"][0][0] == ["error", "policy.model", "./nowhere: no such folder"]
    assert sum(path.startswith("/api/models/org/whole") for path in Hub.asked) == 1, "each model is asked for once"


def test_without_a_network_it_is_a_warning(tmp_path):
    said, shape = ask(tmp_path, "http://127.0.0.1:9", "org/whole")["org/whole"]
    text = "org/whole: the Hub could not be asked (ConnectError); there is no copy in the cache"
    assert said[0] == ["warning", "policy.model", text] and shape is None
    assert [row[:2] for row in said] == [["warning", "policy.model"], ["warning", "disk"]]


def test_the_hub_tells_configurations_and_splits_of_datasets(tmp_path, served):
    sets = ["one", "several", "several prompts.config=main", "several prompts.config=other", "several prompts.config=main prompts.split=dev",
            "one prompts.split=train[:10%]", "silent", "none"]  # fmt: skip
    found = ask(tmp_path, served, *(f"prompts.source=org/{one}" for one in sets), code=ASK_DATASETS)
    taken = "is taken for a Hub dataset, which is loaded when the run starts"
    hint = "correct the name, or export HF_TOKEN with a token that may read it"
    assert found == [
        [["ok", f"org/one {taken}: configuration default, split train"]],
        [["error", "org/several has several configurations: main, socratic; name one of them in prompts.config"]],
        [["ok", f"org/several {taken}: configuration main, split train, 7,473 rows"]],
        [["error", "org/several has no configuration 'other': main, socratic; name one of them in prompts.config"]],
        [["error", "org/several has no split 'dev'; it has train, test; name one of them in prompts.split"]],
        [["ok", f"org/one {taken}: configuration default, split train[:10%]"]],
        [["ok", f"org/silent {taken}; its card names no configurations"]],
        [
            [
                "error",
                f"org/none is no file here, and the Hub has no such dataset for us (RepositoryNotFoundError); {hint}",
            ]
        ],
    ]


def test_the_prompts_of_a_dataset_are_rendered_like_those_of_a_file(tmp_path, served, mini_world):
    """A template that refuses system messages, which every second prompt has."""
    policy = shutil.copytree(mini_world / "policy", tmp_path / "policy")
    template = policy / "chat_template.jinja"
    template.write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
        + template.read_text()
    )
    sets = json.dumps([*overrides(mini_world), f"policy.model={policy}"])
    chats = ask(tmp_path, served, sets, "org/chats", code=ASK_PROMPTS)
    assert ["ok", "format", "org/chats, the first 512 rows: messages, 512 prompts"] in chats
    said = {about: (level, text) for level, about, text in chats}
    level, text = said["policy.model prompts"]
    assert level == "warning" and " of 256 prompts (" in text and "No system role" in text
    assert said["reward.model prompts"][0] == "ok" and said["reward.model prompts"][1].endswith(
        "all of 256 prompts with an answer"
    )
    assert not any("vector" in text for _, _, text in chats)


def test_what_does_not_come_in_time_is_a_warning(tmp_path, mini_world, monkeypatch):
    """On a machine with much to do, or behind a network that does not answer."""
    monkeypatch.setattr(models, "SECONDS", 0.01)
    (late,) = models.loads(load(TINY, overrides(mini_world)))
    assert (late.level, late.about) == ("warning", "models") and "not built within 0 s" in late.text
    monkeypatch.setattr(hub_rows, "SECONDS", 0.01)
    rows = hub_rows.first("org/late", None, "train", Reading(), cached=True)
    assert rows.late and rows.why == "its first rows did not come within 0 s" and not rows.rows


def test_without_a_network_the_prompts_of_a_dataset_are_not_looked_at(tmp_path):
    """Tests are offline themselves."""
    away, copy = files(load(TINY, ["prompts.heldout=null", "prompts.source=org/one"]), tmp_path)
    assert (away.level, copy.level) == ("warning", "warning")
    assert away.text.endswith("loaded when the run starts; the Hub could not be asked (OfflineModeIsEnabled)")
    assert copy.text == "there is no copy of org/one in the cache either: its prompts are not looked at"
