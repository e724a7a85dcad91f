"""Every Python process that a test starts imports this first. Engines, trainers and reward models are forked from a template.

Their imports take 8 to 12 CPU seconds, and the tests start some two hundred of them. A template (`template.py`) has done the
imports. The process that was to become a child stays where it is: it has the process id, the environment and the parent that the
product knows. It asks the template for a fork, which gets its pipes, arguments and environment, runs the module, and dies with it.
`SELFPLAY_TEMPLATES` names the folder of the templates' sockets; where it is not set, everything is as without this file.
"""

import os
import sys

FOLDER = os.environ.get("SELFPLAY_TEMPLATES")
TEMPLATES = {
    "selfplay.generation.engine": "vllm",
    "vllm.entrypoints.openai.api_server": "vllm",
    "selfplay.training.trainer": "trl",
    "selfplay.checks.loading": "trl",
    "selfplay.prompts.importer": "trl",
    "selfplay.evaluation.harness_job": "trl",
    "reward.server": "trl",
}


def module() -> str | None:
    """The module that this process is to run, if it was started as `python [-u] -m MODULE …`."""
    words = [word for word in sys.orig_argv[1:] if word not in ("-u", "-P")]
    if words[:1] != ["-m"] or (
        words[1:2] == ["reward.server"] and "model" not in words
    ):  # rules import nothing that is slow
        return None
    return words[1]


if FOLDER and (template := TEMPLATES.get(module() or "")):
    from asking import ask  # beside this file

    ask(os.path.join(FOLDER, template))
