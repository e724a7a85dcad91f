import fnmatch
import re

from mini import ROOT


def test_the_file_list_names_every_module_and_script_and_nothing_else() -> None:
    files = (ROOT / "README.md").read_text().partition("## Files")[2].partition("\n## ")[0]
    named = set(re.findall(r"[\w*]+\.(?:py|sh|md)", files)) | {
        f"{stem}.py" for stem in re.findall(r"(\w+\*)(?=[\s.])", files)
    }
    there = {path.name for folder, kinds in (("selfplay", ("py",)), ("scripts", ("py", "sh")), ("docs", ("md",)))
             for kind in kinds for path in (ROOT / folder).glob(f"*.{kind}")} - {"__init__.py"}  # fmt: skip
    assert {name for name in there if not any(fnmatch.fnmatch(name, pattern) for pattern in named)} == set()
    known = there | {path.name for path in (ROOT / "reward").glob("*.py")}
    assert {pattern for pattern in named if not fnmatch.filter(known, pattern)} == set()
