"""README and documents name what is there: packages, commands, documents, files."""

import re
from pathlib import Path

import pytest
from mini import ROOT
from typer.main import get_command

from selfplay import cli

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)


def anchor(title: str) -> str:
    """What a heading is linked by: lower case, punctuation gone, a dash for each space."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_the_layout_names_every_package_and_nothing_else() -> None:
    layout = README.partition("## Layout")[2].partition("\n## ")[0].partition("reward/")[0]
    named = set(re.findall(r"[a-z]+", "\n".join(line[:62] for line in layout.splitlines()))) - {"selfplay"}
    folder = ROOT / "selfplay"
    packages = {path.parent.name for path in folder.glob("*/__init__.py")}
    modules = {path.stem for path in folder.glob("*.py")}
    assert packages <= named <= packages | modules


def test_the_readme_stays_short() -> None:
    assert len(README.splitlines()) <= 150


def test_the_index_has_every_document() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    there = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert there <= set(re.findall(r"\]\(([\w.-]+\.md)\)", index))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if link.startswith("https://"):
            continue
        file, _, title = link.partition("#")
        target = document.parent / file if file else document
        assert target.exists(), link
        if title:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert title in {anchor(heading) for heading in headings}, link


def test_modules_and_files_that_are_named_exist() -> None:
    for document in DOCUMENTS:
        if document.name == "CHANGELOG.md":  # it names what is gone
            continue
        text = re.sub(r"```python.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)  # yours to write
        for path in re.findall(r"(?<![\w/])(?:selfplay|reward|scripts|configs|tests)/[\w/.-]+\.(?:py|yaml|sh)\b", text):
            assert (ROOT / path).is_file(), (document.name, path)
        for module in re.findall(r"`(selfplay(?:\.\w+)+)`", text):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").is_file() or path.is_dir(), (document.name, module)


def test_commands_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    known = {f"make {target}" for target in targets}
    known |= {f"selfplay {command}" for command in get_command(cli.app).commands}  # type: ignore[attr-defined]
    named = {
        (document.name, command)
        for document in DOCUMENTS
        for command in re.findall(
            r"(?:^    |`|PYTHON=\S+ )(make [a-z]+|selfplay [a-z][a-z-]*)",
            document.read_text(encoding="utf-8"),
            re.MULTILINE,
        )
    }
    assert len(named) > 20
    assert {(document, command) for document, command in named if command not in known} == set()
