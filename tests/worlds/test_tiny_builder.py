"""How a tiny world is built: its hash, its workers, and what is left behind."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest

from selfplay.worlds.tiny.builder import recipe as recipes
from selfplay.worlds.tiny.builder.build import Event, build, read_world, sweep
from selfplay.worlds.tiny.builder.recipe import SIZES, Recipe, recipe_hash

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def quiet(events: Iterator[Event]) -> None:
    for _ in events:
        pass


def test_the_hash_follows_the_recipe_and_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe()
    seen = {recipe_hash(recipe)}
    assert recipe_hash(Recipe()) in seen
    for field in fields(recipe):
        seen.add(recipe_hash(replace(recipe, **{field.name: getattr(recipe, field.name) + 1})))
    assert len(seen) == 1 + len(fields(recipe))

    copied = shutil.copytree(recipes.SOURCES, tmp_path / "tiny")
    monkeypatch.setattr(recipes, "SOURCES", copied)
    facts = (copied / "facts.py").read_text(encoding="utf-8")
    (copied / "facts.py").write_text("# a remark\n" + facts, encoding="utf-8")
    assert recipe_hash(recipe) in seen
    for changed in (copied / "facts.py", copied / "builder" / "reward.py"):
        source = changed.read_text(encoding="utf-8")
        changed.write_text(source + "\nMORE = 1\n", encoding="utf-8")
        assert recipe_hash(recipe) not in seen
        changed.write_text(source, encoding="utf-8")


def test_help_needs_no_torch() -> None:
    heavy = {"torch", "transformers", "tokenizers", "rich", "pyarrow"}
    code = f"import sys, make_tiny; print({heavy} & sys.modules.keys())"
    scripts = {"cwd": ROOT / "scripts", "capture_output": True, "text": True, "check": True}
    assert subprocess.run([sys.executable, "-c", code], **scripts).stdout == "set()\n"
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "make_tiny.py"), "--help"], capture_output=True, text=True, check=True
    )
    assert "--size" in done.stdout


def test_a_failing_worker_leaves_nothing_and_says_why(tmp_path: Path) -> None:
    broken = replace(SIZES["mini"], heads=3, sft_examples=3000)  # 64 is no multiple of 3
    with pytest.raises(RuntimeError, match="shape"):
        build(broken, tmp_path / "world", quiet)
    assert list(tmp_path.iterdir()) == []


def test_equal_recipes_build_equal_worlds_and_one_that_is_not_whole_is_replaced(tmp_path: Path) -> None:
    """To the byte, with two workers whose gradients are summed; what was measured names the time it took."""
    recipe = replace(
        SIZES["mini"], workers=2, scale=0.05, sft_examples=480, group_prompts=48, judge_prompts=24, hidden=32
    )

    def built() -> dict[str, bytes]:
        build(recipe, tmp_path / "world", quiet)
        found = {path.relative_to(tmp_path).as_posix(): path for path in tmp_path.rglob("*") if path.is_file()}
        del found["world/world.json"]
        return {name: path.read_bytes() for name, path in found.items()}

    first = built()
    assert {f"world/{part}/model.safetensors" for part in ("policy", "reward", "judge")} < first.keys()
    (tmp_path / "world" / "world.json").write_text("")
    (tmp_path / "world" / "policy" / "model.safetensors").write_bytes(b"")
    assert built() == first
    assert read_world(tmp_path / "world")["recipe"]["workers"] == 2


def test_what_a_killed_build_left_is_swept(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / f".abc.{ended.pid}" / "policy").mkdir(parents=True)
    (tmp_path / f".current.{ended.pid}").symlink_to("abc")
    (tmp_path / f".abc.{os.getpid()}").mkdir()
    (tmp_path / "abc").mkdir()
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f".abc.{os.getpid()}", "abc"}


def test_a_world_that_is_there_is_not_built_again(mini_world: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in mini_world.rglob("*")}
    command = [
        sys.executable,
        str(ROOT / "scripts" / "make_tiny.py"),
        "--size",
        "mini",
        "--out",
        str(mini_world.parent),
    ]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert time.monotonic() - began < 5
    assert "there already" in done.stdout
    assert str(mini_world) in done.stdout
    assert {path: path.stat().st_mtime_ns for path in mini_world.rglob("*")} == before
    assert (mini_world.parent / "current").resolve() == mini_world
