"""Orders to a running service: what can be asked, and the checks that need no service.

CLI, API and page leave orders in the ledger (`Store.submit`); whoever runs the folder obeys them and records what came
of it. So an order outlives a crash of either side, and who asked for what, and when, stays known.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from selfplay.errors import InputError
from selfplay.storage.ledger import Store
from selfplay.storage.reader import CANCEL, Standing

MAX_PROMPTS = 10_000  # in one order
WITHIN = ("pause", CANCEL)  # what orders left in the ledger that decides on the round that is open


class _Order(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)  # true is not policy 1


class RunNow(_Order):
    """Start a round now, whatever the schedule says."""

    kind: Literal["run"] = "run"


class Pause(_Order):
    """Start no further round; an open one stops after its stage, or is finished first."""

    kind: Literal["pause"] = "pause"
    after: Literal["stage", "round"] = "round"


class Resume(_Order):
    """End a pause."""

    kind: Literal["resume"] = "resume"


class Cancel(_Order):
    """Give up the open round; the current policy stays."""

    kind: Literal["cancel"] = "cancel"


class Rollback(_Order):
    """Make an earlier policy the current one, by a verified swap; between rounds."""

    kind: Literal["rollback"] = "rollback"
    version: Annotated[int, Field(ge=0)]


class Pin(_Order):
    """Keep the weights of a policy whatever retention says, or no longer."""

    kind: Literal["pin"] = "pin"
    version: Annotated[int, Field(ge=0)]
    pinned: bool = True


def why_not_stored(row: dict[str, Any]) -> str | None:
    """Of what Python's JSON reads but no file of ours can hold: NaN, half of a surrogate pair, endless nesting."""
    try:
        json.dumps(row, allow_nan=False, ensure_ascii=False).encode()
        pydantic_core.to_json(row)
    except (ValueError, RecursionError) as error:
        return type(error).__name__
    return None


class AddPrompts(_Order):
    """Let prompts join the pool of the next rounds; between rounds."""

    kind: Literal["add_prompts"] = "add_prompts"
    rows: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_PROMPTS)]
    """Each with `prompt` or `messages`, as in a prompt file."""

    @field_validator("rows")
    @classmethod
    def _can_be_stored(cls, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for number, row in enumerate(rows):
            if why := why_not_stored(row):
                raise ValueError(f"row {number} cannot be stored: {why}")
        return rows


class Reload(_Order):
    """Take over the configuration file; between rounds."""

    kind: Literal["reload"] = "reload"


Order = Annotated[RunNow | Pause | Resume | Cancel | Rollback | Pin | AddPrompts | Reload, Field(discriminator="kind")]
KINDS: dict[str, type[Order]] = {
    model.model_fields["kind"].default: model
    for model in (RunNow, Pause, Resume, Cancel, Rollback, Pin, AddPrompts, Reload)
}
_adapter: TypeAdapter[Order] = TypeAdapter(Order)


def parse(kind: str, arguments: dict[str, Any]) -> Order:
    """The order of a kind with its arguments. Raises InputError."""
    try:
        return _adapter.validate_python({**arguments, "kind": kind})
    except ValidationError as error:
        what = "; ".join(f"{'.'.join(map(str, e['loc'][1:])) or kind}: {e['msg']}" for e in error.errors())
        raise InputError(f"order {kind}: {what}") from None


def is_cancelled(standing: Standing) -> bool:
    """Whether the open round is to be given up; the state names it, so that no later one is taken for it."""
    return standing.open is not None and standing.states.get(CANCEL) == standing.open


def submit(store: Store, kind: str, arguments: dict[str, Any], origin: str) -> int:
    """Check an order and leave it in the ledger; returns its number. Raises InputError for what can never be obeyed."""
    order = parse(kind, arguments)
    if isinstance(order, Rollback | Pin):
        policy = store.policy(order.version)
        if policy is None:
            raise InputError(f"there is no policy {order.version}", "`selfplay rounds` lists them")
        if not policy["weights"]:
            raise InputError(f"the weights of policy {order.version} were deleted (retention)", "pin what you may need")
    return store.submit(kind, order.model_dump(mode="json", exclude={"kind"}), origin)
