"""The kinds of reward that this package can serve.

A kind is one module and one line in KINDS. The module has a subclass of `Kind`, whose fields are the settings and whose
`scorers` makes what scores. KINDS says where it is, and it is imported when somebody asks for it. A kind outside of this
package needs no line: its place, "module:Class", is its name.

The process that reads the configuration imports the module of a kind to check its settings. A module with heavy imports,
such as torch, therefore has them inside of `scorers`.
"""

import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import BaseModel, ConfigDict, SecretBytes, SecretStr, ValidationError
from pydantic_core import InitErrorDetails

from reward.dialects import UNLIMITED
from reward.schema import Health
from reward.scorer import ModelRefused, Scorer

KINDS = {
    "model": "reward.settings:ModelSettings",
    "rules": "reward.settings:RulesSettings",
    "judge": "reward.settings:JudgeSettings",
    "instructions": "reward.instructions:Instructions",
    "math": "reward.mathematics:Mathematics",
    "code": "reward.programs:Programs",
}


class Kind(BaseModel):
    """The settings of a kind of reward. They are shown and stored, so a secret is never one of them: a setting such as
    `api_key_env` names the environment variable that holds it."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    access: ClassVar[frozenset[str]] = frozenset()
    """Settings that only say how fast or by which key scores are made. They have no part in which reward this is."""
    made_of: ClassVar[tuple[str, ...]] = ()
    """Further modules of this package, and other packages, that decide on a score beside the kind's own module."""

    def require(self) -> None:
        """See that this machine has what the kind needs, such as a package. Raises ModelRefused, which says what to do."""

    def unreadable(self, reference: str | None) -> str | None:
        """Why no answer can be checked by this reference; None where it can be, or where the kind reads none."""

    def scorers(self) -> Sequence[Scorer]:
        """What scores: one Scorer, or several that score at the same time. Raises ModelRefused and ValueError."""
        raise NotImplementedError(f"{type(self).__name__} has no method `scorers`")

    def which(self) -> dict[str, Any]:
        """The settings that decide which reward this is, as JSON has them. Those that have their default are left out."""
        return self.model_dump(mode="json", exclude=set(self.access), exclude_defaults=True)

    def health(self) -> Health:
        """What a server of this kind says of itself, for a kind whose scores follow from its settings and its module alone.

        Scores are kept under `weights_sha256`, which is a hash over both. A kind that reads anything else, such as a file,
        has to put that into its hash too.
        """
        module = sys.modules[type(self).__module__]
        files = {module.__name__: _sha256(Path(module.__file__).read_bytes())} if module.__file__ else {}
        files |= {name: _version(name) for name in self.made_of}
        settings = self.model_dump(mode="json", exclude=set(self.access))
        made_of = json.dumps([type(self).__qualname__, settings, files], sort_keys=True)
        return Health(
            kind=type(self).__name__,
            model=f"{type(self).__name__} {json.dumps(self.which())}",
            parameters=0,
            dtype="none",
            device="cpu",
            max_tokens=UNLIMITED,
            weights_sha256=_sha256(made_of.encode()),
            template_sha256=_sha256(b""),
            files=files,
        )


def find(name: str) -> type[Kind]:
    """The kind with this name, or at the place "module:Class". Raises ValueError, which says what there is."""
    place = KINDS.get(name, name)
    if ":" not in place:
        near = difflib.get_close_matches(name, KINDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(KINDS)}, and yours as module:Class"
        raise ValueError(f"no kind of reward is called {name!r}: {hint}")
    module, _, attribute = place.partition(":")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the code of the module raises
        raise ValueError(f"the kind {place} cannot be imported: {type(error).__name__}: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, Kind)):
        raise ValueError(f"{place} is no kind of reward: it has to be a subclass of reward.kinds.Kind")
    if secret := [n for n, field in kind.model_fields.items() if field.annotation in (SecretStr, SecretBytes)]:
        raise ValueError(f"{place}: the setting {secret[0]} is a secret; let it name an environment variable instead")
    return kind


def read(name: str, settings: Any) -> Kind:
    """The settings of this kind. Raises ValueError for a name as `find`, and pydantic's ValidationError for settings."""
    kind = find(name)
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        found = [_readable(e, list(kind.model_fields)) for e in error.errors()]
        raise ValidationError.from_exception_data(error.title, found) from None


def load(name: str, source: str) -> Kind:
    """The settings in the YAML file `source`, or in `source` itself as JSON. Raises ModelRefused."""
    try:
        if source.lstrip().startswith(("[", "{")):
            return read(name, json.loads(source))
        return read(name, yaml.safe_load(Path(source).expanduser().read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ModelRefused(f"{name}{where and f' {where}'}: {first['msg'].removeprefix('Value error, ')}") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ModelRefused(f"{name}: {error}") from error


def _readable(error: Any, known: Sequence[str]) -> InitErrorDetails:
    """The same error, as a sentence where a key at the top is unknown."""
    message = error["msg"]
    if error["type"] == "extra_forbidden" and len(error["loc"]) == 1:
        near = difflib.get_close_matches(error["loc"][0], known, n=1, cutoff=0.5)
        message = "unknown key, " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}")
    elif error["type"] == "missing":
        message = "required"
    message = message.removeprefix("Value error, ")
    context = {"error": ValueError(message)}
    return InitErrorDetails(type="value_error", loc=error["loc"], input=error["input"], ctx=context)


def _version(name: str) -> str:
    """The SHA-256 of a module of ours, or the version of a package."""
    if not name.startswith("reward."):
        return importlib.metadata.version(name)
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    return _sha256(Path(spec.origin).read_bytes())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
