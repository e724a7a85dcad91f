"""The layout that docs/architecture.md promises: imports go downwards only, and modules stay small."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from mini import ROOT

LAYERS: list[set[str]] = [
    {"types", "errors", "kinds", "seeds", "visible"},
    {"progress", "methods", "planning"},
    {"config"},
    {"stage"},
    {"storage", "processes"},
    {"models", "tracking", "reporting"},
    {"prompts", "generation", "rewards", "pairs", "training"},
    {"evaluation", "publishing", "cluster"},
    {"rounds"},
    {"service"},
    {"web"},
    {"checks", "doctor", "worlds"},
    {"starting"},
    {"cli", "__init__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MOST_LINES = 400


def modules() -> list[Path]:
    return sorted((ROOT / "selfplay").rglob("*.py"))


def dotted(path: Path) -> str:
    name = "selfplay." + ".".join(path.relative_to(ROOT / "selfplay").with_suffix("").parts)
    return name.removesuffix(".__init__")


@cache
def known() -> set[str]:
    return {dotted(path) for path in modules()}


@cache
def imports(path: Path) -> set[str]:
    """The modules of selfplay that a module imports: at its top, in its functions, and for type checkers."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import, which is not followed here"
            if node.module and node.module.split(".")[0] == "selfplay":
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found.update(name if name in known() else str(node.module) for name in names)
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name.startswith("selfplay."))
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.expr):  # an expression holds no import
                visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def package(path: Path) -> str:
    parts = path.relative_to(ROOT / "selfplay").with_suffix("").parts
    return parts[0]


def test_imports_go_downwards():
    upwards = []
    for path in modules():
        own = package(path)
        assert own in LEVEL, f"{own} is in no layer of docs/architecture.md"
        others = {name: name.split(".")[1] for name in imports(path)}
        upwards += [
            f"{path.relative_to(ROOT)} imports {name}, which is not below it"
            for name, other in others.items()
            if other != own and LEVEL[other] >= LEVEL[own]
        ]
    assert upwards == []


def test_no_module_is_part_of_a_circle():
    edges = {dotted(path): imports(path) & known() - {dotted(path)} for path in modules()}
    done: set[str] = set()

    def walk(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " → ".join([*way[way.index(name) :], name])
        if name not in done:
            for other in edges[name]:
                walk(other, (*way, name))
            done.add(name)

    for name in edges:
        walk(name, ())


@pytest.mark.parametrize("folder", ["selfplay", "reward", "scripts"])
def test_modules_stay_small(folder):
    long = {
        path.relative_to(ROOT).as_posix(): lines
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MOST_LINES
    }
    assert not long, f"modules of more than {MOST_LINES} lines: {long}"


def test_reward_knows_nothing_of_selfplay():
    for path in sorted((ROOT / "reward").rglob("*.py")):
        assert not imports(path), path


def test_nothing_waits_with_select():
    """It takes no descriptor above 1023, and a service that many connect to has such."""
    for folder in ("selfplay", "reward", "scripts"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            assert "select.select(" not in text and "from select import" not in text, path


def test_heavy_libraries_are_imported_in_one_module_each():
    """But SQLAlchemy, which the modules of the ledger share."""
    where: dict[str, set[str]] = {"vllm": set(), "trl": set(), "apscheduler": set(), "ray": set(), "sqlalchemy": set()}
    texts = {path: path.read_text(encoding="utf-8") for path in modules()}
    named = re.compile(rf"(?:import|from) (?:{'|'.join(where)})\b")
    for path in (path for path, text in texts.items() if named.search(text)):
        for node in ast.walk(ast.parse(texts[path])):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if name.split(".")[0] in where:
                    where[name.split(".")[0]].add(path.relative_to(ROOT).as_posix())
    assert all(path.startswith("selfplay/storage/") for path in where.pop("sqlalchemy")), where
    assert all(len(files) == 1 for files in where.values()), where
