#!/usr/bin/env python
"""The software bill of materials of this environment: `python scripts/sbom.py [--out dist/selfplay.cdx.json]`.

CycloneDX 1.6 as JSON: selfplay, and every installed distribution that it needs, directly or by others, with its version,
license, package URL, and what it needs in turn. Extras count where they are installed. What the environment has beside
that, such as pip, is left out. SOURCE_DATE_EPOCH sets the time, so that a build can be repeated to the byte.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

NAME = "selfplay"
LONGEST_LICENSE = 64  # characters; some put the whole text there


@dataclass(frozen=True, slots=True)
class Part:
    """An installed distribution. Its metadata is parsed once, which takes most of the time."""

    name: str  # canonical
    data: Any  # as of email.message
    wants: frozenset[str]  # names of what it asks for on this machine, for each of its extras too

    @property
    def url(self) -> str:
        """The package URL, by which parts name each other."""
        return f"pkg:pypi/{self.name}@{self.data['Version'].replace('+', '%2B')}"


def parts() -> dict[str, Part]:
    """All installed distributions by name. Of two with one name the first on the path counts: that one is imported."""
    found: dict[str, Part] = {}
    for each in distributions():
        data = each.metadata
        name = canonicalize_name(data["Name"])
        extras = [*(data.get_all("Provides-Extra") or ()), ""]
        wants = set()
        for requirement in map(Requirement, data.get_all("Requires-Dist") or ()):
            asked = extras if "extra" in str(requirement.marker) else [""]
            if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in asked):
                wants.add(canonicalize_name(requirement.name))
        found.setdefault(name, Part(name, data, frozenset(wants - {name})))
    return found


def needed(root: str, installed: dict[str, Part]) -> dict[str, Part]:
    """What a distribution needs, itself among them. What is not installed is an extra, or overridden by the project."""
    found: dict[str, Part] = {}
    waiting = {root}
    while waiting:
        name = waiting.pop()
        found[name] = installed[name]
        waiting |= (installed[name].wants & installed.keys()) - found.keys()
    return found


def bill(root: str, made: datetime) -> dict[str, Any]:
    """The document for an installed distribution and all that it needs."""
    found = needed(root, parts())
    ordered = [found[name] for name in sorted(found)]
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "timestamp": made.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "lifecycles": [{"phase": "build"}],
            "component": component(found[root], "application"),
        },
        "components": [component(part, "library") for part in ordered if part.name != root],
        "dependencies": [
            {"ref": part.url, "dependsOn": [found[name].url for name in sorted(part.wants & found.keys())]}
            for part in ordered
        ],
    }
    content = json.dumps(document, sort_keys=True)
    return document | {"serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, content)}"}


def component(part: Part, kind: str) -> dict[str, Any]:
    found = {
        "type": kind,
        "bom-ref": part.url,
        "name": part.name,
        "version": part.data["Version"],
        "purl": part.url,
        "description": (part.data.get("Summary") or "").strip(),
        "licenses": licenses(part.data),
    }
    return {name: value for name, value in found.items() if value}


def licenses(data: Any) -> list[dict[str, Any]]:
    """What the metadata says of the license: an SPDX expression, or names as they stand there."""
    if expression := data.get("License-Expression"):
        return [{"expression": expression}]
    named = [c.rpartition("::")[2].strip() for c in data.get_all("Classifier") or () if c.startswith("License ::")]
    text = (data.get("License") or "").strip()
    if not named and text and len(text) <= LONGEST_LICENSE and "\n" not in text:
        named = [text]
    return [{"license": {"name": name}} for name in named]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file to write; by default the standard output")
    args = parser.parse_args()
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    made = datetime.now(UTC) if epoch is None else datetime.fromtimestamp(int(epoch), UTC)
    text = json.dumps(bill(NAME, made), indent=1) + "\n"
    if args.out is None:
        sys.stdout.write(text)
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
