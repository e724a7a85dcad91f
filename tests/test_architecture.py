"""docs/architecture.md: its examples run, and every path and module that it names is there."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
from mini import ROOT, TINY

from reward.client import RewardClient
from selfplay import kinds
from selfplay.config import PairsConfig, load
from selfplay.pairs.base import base_pairs
from selfplay.pairs.responses import Response
from selfplay.pairs.selection import select
from selfplay.tracking import trackers

TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
MODULES = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", TEXT, re.DOTALL))


def response(index: int, reward: float, logp: float) -> Response:
    return Response(index=index, reward=reward, logp=logp, n_tokens=10, digest=index)


PROMPTS = [
    (f"p{i}", [response(0, 0.0, -10.0), response(1, 1.0 + i, -10.0 - 3 * i), response(2, 0.5, -12.0)]) for i in range(5)
]


@pytest.fixture
def added(tmp_path, monkeypatch):
    """Writes a module of the document to a folder, and adds its line to the table for the time of the test."""

    def add(path: str, table: str) -> ModuleType:
        file = tmp_path / path.rpartition("/")[2]
        file.write_text(MODULES[path])
        name, module = file.stem, path.removesuffix(".py").replace("/", ".")
        spec = importlib.util.spec_from_file_location(module, file)
        found = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, module, found)
        spec.loader.exec_module(found)
        monkeypatch.setitem(getattr(kinds, table), name, module)
        return found

    return add


def test_a_selection_metric_is_one_module_and_one_line(added):
    added("selfplay/methods/selection/product.py", "SELECTIONS")
    settings = load(TINY, ["pairs.selection=product", "pairs.keep=0.4"]).pairs
    pairs, _ = base_pairs(PROMPTS, settings, noise=0.0, beta=0.1)
    kept = [p.prompt_id for p in select(pairs, settings, seed=1) if p.kept_because]
    product = [p.explicit_margin / (1 + p.implicit_margin) for p in pairs]
    assert kept == [pairs[i].prompt_id for i in sorted(np.argsort(product)[-2:])]


def test_an_implicit_reward_is_one_module_and_one_line(added):
    added("selfplay/methods/implicit/summed.py", "IMPLICIT_REWARDS")
    settings = load(TINY, ["pairs.implicit=summed"]).pairs
    pairs, _ = base_pairs(PROMPTS, settings, noise=0.0, beta=0.1)
    assert [p.implicit_signed for p in pairs] == pytest.approx([0.1 * -3 * i for i in range(5)])


def test_a_tracker_is_one_module_and_one_line(added, tmp_path):
    added("selfplay/tracking/lines.py", "TRACKERS")
    config = load(TINY, ["track=lines"])
    trackers.require(config.track)
    tracker = trackers.open_tracker(config, tmp_path, "abcd")
    trackers.log_round(tracker, 3, {"evaluate/win_rate": 0.5}, [{"train/loss": 0.6}], 1)
    tracker.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"axis": "round", "step": 3, "evaluate/win_rate": 0.5} in lines
    assert any(line["axis"] == "train" for line in lines)


@pytest.mark.slow
def test_a_reward_source_is_one_module_and_one_line(tmp_path, monkeypatch):
    """Served for real: `python -m reward.server` in a package whose table has the line."""
    package = shutil.copytree(ROOT / "reward", tmp_path / "reward", ignore=shutil.ignore_patterns("__pycache__"))
    (package / "short.py").write_text(MODULES["reward/short.py"])
    table = (package / "kinds.py").read_text()
    assert "KINDS = {\n" in table
    (package / "kinds.py").write_text(table.replace("KINDS = {\n", 'KINDS = {\n    "short": "reward.short:Short",\n'))
    argv = [sys.executable, "-m", "reward.server", "--kind", "short", "--settings", '{"words": 10}', "--port", "0"]
    server = subprocess.Popen(
        argv, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, stdout=subprocess.PIPE
    )
    try:
        url = json.loads(server.stdout.readline())["url"]
        client = RewardClient([url])
        asked = [{"role": "user", "content": "Why?"}]
        assert client.score([(asked, "one two"), (asked, " ".join("x" * 30))]) == [0.8, 0.0]
        client.close()
    finally:
        server.kill()
        server.wait()


def test_a_name_that_no_line_has_is_refused():
    with pytest.raises(ValueError, match="should be 'potential'"):
        PairsConfig(selection="product")


def test_what_the_document_names_is_there():
    for name in re.findall(r"`((?:selfplay|reward|tests|rounds|storage|service|prompts)/[\w/]+\.py)`", TEXT):
        assert (ROOT / name).is_file() or (ROOT / "selfplay" / name).is_file(), name
    assert len(TEXT.splitlines()) <= 150
