"""The sections `policy` and `swap`: the model that is aligned, and how new weights in the engine are verified."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any

from pydantic import Field

from reward.settings import Variables
from selfplay.config.base import Dtype, Section

Mark = Annotated[str, Field(pattern=r"^\S(.*\S)?$")]


class ThinkingConfig(Section):
    """What stands between two marks at the beginning of an answer. It is trained on. An answer that never comes to the end
    mark counts as cut off. The start mark may also be the end of the prompt, as the chat template renders it."""

    start: Mark = "<think>"
    """What begins the thoughts."""
    end: Mark = "</think>"
    """What ends them."""
    hidden: bool = True
    """Rewards, judges, rubrics and people read what comes behind the end mark, and no thoughts."""


class PolicyConfig(Section):
    model: str
    """Checkpoint folder or Hub id of the initial policy."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    dtype: Dtype = "bfloat16"
    """Precision of the engine, of exported checkpoints and of the canaries."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    chat_template_kwargs: Variables = {}
    """Variables for the chat template of the policy, such as {enable_thinking: false}. Fixed for a run."""
    template_date: date | None = None
    """The date that the chat template prints, if it prints one (`strftime_now`, `date_string`). The default is the day
    on which the run began. Fixed for a run."""
    thinking: ThinkingConfig | None = None
    """How a policy that thinks marks its thoughts: {} for `<think>` and `</think>`. By default nobody looks for any."""

    def template(self, began: str) -> dict[str, Any]:
        """What a child renders conversations with (`models.rendering.Template`). began: when the run did (ISO 8601)."""
        given = dict(self.chat_template_kwargs)
        if self.template_date is not None:
            given.setdefault("date_string", self.template_date.strftime("%d %b %Y"))
        return {"kwargs": given, "today": self.template_date.isoformat() if self.template_date else began[:10]}


class SwapConfig(Section):
    canaries: Annotated[int, Field(ge=1)] = 8
    """Short fixed sequences whose log-probabilities show which weights are in the engine."""
    tolerance: Annotated[float, Field(gt=0)] | None = None
    """Largest difference between engine and checkpoint (nats a token). The default is 1e-4 in fp32. In lower precision
    it follows from the noise that the engine shows when it starts, which may be 0.1 at most."""
