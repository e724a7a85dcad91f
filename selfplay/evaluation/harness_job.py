"""The child that runs lm-evaluation-harness (`python -m selfplay.evaluation.harness_job`). No other module imports it.

    {"order": "evaluate", "suite": SuiteConfig, "tokenizer": {policy, trust_remote_code, template}, "context", "max_tokens", "folder",
     "policies": versions}

While it works it asks by the event «ask» {kind: sample | logps, asked, said, sampling, max_tokens}, whose files are rows of
`Prompt` and `Candidate`, and is answered by {"order": "answers", "files": for each policy the files of its answers}. The result is
a file of `SuiteAnswer` rows for each policy. The harness runs once for each policy, and asks at the first time only, since what it
asks does not depend on the answers.

`python -m selfplay.evaluation.harness_job SUITE` (a SuiteConfig as JSON) only looks whether the task can be loaded.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from reward import hub
from selfplay.config import SuiteConfig
from selfplay.errors import InputError, SelfplayError
from selfplay.models.rendering import Template, load_tokenizer
from selfplay.processes.protocol import Channel, Event, protocol
from selfplay.storage import tables
from selfplay.types import SuiteAnswer

SEED = 1234  # of examples that a task draws, the harness's own default


def load(suite: SuiteConfig) -> Any:
    """The tasks of a suite with their data. Raises InputError for one that there is not, or whose data cannot be had."""
    hub.bounded()
    from lm_eval.tasks import TaskManager

    assert suite.task is not None
    manager = TaskManager(include_path=None if suite.include_path is None else str(suite.include_path))
    if suite.task not in manager.all_tasks:
        where = "" if suite.include_path is None else f" or in {suite.include_path}"
        raise InputError(
            f"lm-evaluation-harness has no task {suite.task!r}{where}",
            "python -m lm_eval ls tasks lists those that there are",
        )
    try:
        with _no_code_of_others(suite):
            return manager.load([suite.task])
    except InputError:
        raise
    except Exception as error:  # the harness, its datasets and its tasks raise errors of any type
        raise InputError(
            f"the task {suite.task} cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())[:500]}",
            "a task whose data lie on the Hub needs a network, or a copy in the cache of an earlier download",
        ) from error


class Refused(BaseException):
    """Not an Exception: the harness would take that for a metric that there is not, and go on."""


@contextlib.contextmanager
def _no_code_of_others(suite: SuiteConfig) -> Iterator[None]:
    """Raise InputError where a task takes something from the library `evaluate`, unless the suite trusts that."""
    import evaluate as library

    def refuse(path: str, *args: Any, **kwargs: Any) -> NoReturn:
        raise Refused(path)

    if not suite.trust_remote_code:
        library.load = refuse
    try:
        yield
    except Refused as refused:
        raise InputError(
            f"the task {suite.task} takes {refused} from the library evaluate, which fetches it from the Hub as code and runs it",
            "take another task, or set `trust_remote_code: true` at the suite where you trust that code",
        ) from None


def evaluate(order: Event, ask: Callable[..., list[list[str]]]) -> list[str]:
    """Run the harness for each policy; returns the files of its rows."""
    from lm_eval import evaluator

    from selfplay.evaluation.harness_model import Asking

    suite, folder = SuiteConfig.model_validate(order["suite"]), Path(order["folder"])
    tokenizer = load_tokenizer(Path(order["tokenizer"]["policy"]), order["tokenizer"]["trust_remote_code"])
    loaded = load(suite)
    template = Template.read(order["tokenizer"]["template"])
    model = Asking(tokenizer, template, ask, folder, order["context"], order["max_tokens"])
    files = []
    for side, version in enumerate(order["policies"]):
        model.begin(side)
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=SEED)
        with _no_code_of_others(suite):
            found = evaluator.evaluate(
                lm=model, task_dict=loaded, limit=suite.prompts, bootstrap_iters=0, log_samples=True,
                apply_chat_template=suite.chat, fewshot_as_multiturn=suite.chat,
            )  # fmt: skip
        rows = list(graded(suite, loaded["tasks"], found["samples"], version))
        file = folder / f"graded-{version}.parquet"
        tables.write_rows(file, rows, SuiteAnswer)
        files.append(str(file))
    return files


def graded(
    suite: SuiteConfig, tasks: Any, samples: dict[str, list[dict[str, Any]]], version: int
) -> Iterator[SuiteAnswer]:
    """One row for each document, with all metrics that are numbers; the one that counts is its score."""
    for name, of_task in samples.items():
        documents: dict[int, list[dict[str, Any]]] = {}
        for sample in of_task:
            documents.setdefault(sample["doc_id"], []).append(sample)
        for number, filtered in sorted(documents.items()):
            parts = {
                metric if sample["filter"] == "none" else f"{metric},{sample['filter']}": float(sample[metric])
                for sample in filtered
                for metric in sample["metrics"]
                if isinstance(sample[metric], int | float) or getattr(sample[metric], "ndim", None) == 0
            }
            metric = suite.metric or next(iter(parts), None)
            if metric not in parts:
                raise InputError(
                    f"the task {name} has no metric {metric!r} that is a number for each document; it has {', '.join(parts) or 'none'}",
                    "name one of them as the `metric` of the suite",
                )
            if tasks[name].higher_is_better().get(metric.partition(",")[0]) is False:
                raise InputError(
                    f"the metric {metric} of the task {name} is better when it is lower, so a fall of it says nothing",
                    "name another one as the `metric` of the suite",
                )
            yield SuiteAnswer(
                prompt_id=f"{name}:{number}:{filtered[0]['doc_hash'][:8]}", text=_text(filtered[0]["filtered_resps"]),
                n_tokens=None, finish_reason=None, policy=version,
                reward=parts[metric] if math.isfinite(parts[metric]) else None, reward_parts=parts,
            )  # fmt: skip


def _text(responses: Sequence[Any]) -> str:
    return responses[0] if responses and isinstance(responses[0], str) else json.dumps(responses, default=str)


def main() -> None:
    channel = protocol()
    orders = channel.orders()
    for order in orders:
        try:
            channel.result(order, evaluate(order, _asking(channel, order, orders)))
        except SelfplayError as error:
            channel.error(order, "input", str(error), error.hint)
        except Exception as error:  # the boundary: tasks are code and data of others
            traceback.print_exc()
            channel.error(order, "internal", f"{type(error).__name__}: {error}", "logs/harness.log has the traceback")


def _asking(channel: Channel, order: Event, orders: Iterator[Event]) -> Callable[..., list[list[str]]]:
    def ask(**fields: Any) -> list[list[str]]:
        channel.send({"id": order["id"], "event": "ask", **fields})
        found: list[list[str]] = next(orders)["files"]
        return found

    return ask


def look(suite: str) -> None:
    """Print as JSON why a task cannot be loaded (null where it can), whether that is for want of a network, and how many
    documents it has."""
    try:
        tasks = load(SuiteConfig.model_validate_json(suite))["tasks"].values()
    except InputError as error:
        offline = isinstance(error.__cause__, ConnectionError)  # as `datasets` and the Hub's library say it
        print(json.dumps({"why": f"{error}; {error.hint}", "offline": offline, "documents": 0}))
    else:
        documents = sum(len(task.eval_docs) for task in tasks)
        print(json.dumps({"why": None, "offline": False, "documents": documents}))


if __name__ == "__main__":
    look(sys.argv[1]) if len(sys.argv) > 1 else main()
