"""The bill of materials: complete, the same each time, and whole in itself."""

import sys
import tomllib
from datetime import UTC, datetime

import pytest
from mini import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

sys.path.insert(0, str(ROOT / "scripts"))
from sbom import bill

pytestmark = pytest.mark.slow


def test_the_bill_names_all_that_is_needed_once_and_says_what_needs_what():
    made = datetime(2026, 11, 28, tzinfo=UTC)
    found = bill("selfplay", made)
    assert found == bill("selfplay", made)
    assert (found["bomFormat"], found["specVersion"]) == ("CycloneDX", "1.6")
    assert found["metadata"]["timestamp"] == "2026-11-28T00:00:00Z"
    names = [part["name"] for part in found["components"]]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {canonicalize_name(Requirement(text).name) for text in project["dependencies"]} <= set(names)
    assert len(names) == len(set(names)) > 100 and "selfplay" not in names
    refs = [part["bom-ref"] for part in (found["metadata"]["component"], *found["components"])]
    needs = {row["ref"]: row["dependsOn"] for row in found["dependencies"]}
    assert needs.keys() == set(refs) and {ref for row in needs.values() for ref in row} <= set(refs)
    assert any(ref.startswith("pkg:pypi/torch@2.") for ref in needs[refs[0]])
    assert sum("licenses" not in part for part in found["components"]) < 10
