"""Looks at what scores: servers and judges have to answer, rules have to be valid, and keys have to be set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from reward.client import UNNAMED, RewardClient, RewardRefused, RewardUnavailable
from reward.http import HttpError, ask, bearer
from reward.proxies import proxy_of
from reward.scorer import ModelRefused
from reward.settings import JudgeSettings, Rule
from selfplay.checks.finding import Finding
from selfplay.config import Config, RewardSource
from selfplay.processes.children import inherited_environment
from selfplay.prompts.references import readers

SECONDS = 10.0  # for an answer
MODELS = 8 * 2**20  # bytes of a list of models, which some services have thousands of
MAKE_RULES = "import sys; from reward import kinds; kinds.load('rules', sys.argv[1]).scorers()"


def sources(config: Config, run_dir: Path) -> Iterator[Finding]:
    """Findings for each source of the reward and of the judge, and whether the judge is independent."""
    for key, source in config.all_sources().items():
        own = source.served()
        for name in (source.api_key_env, getattr(own[1], "api_key_env", None) if own else None):
            if name and not os.environ.get(name):
                text = f"the environment variable {name} is not set"
                yield Finding.error(f"{key} api_key_env", text)
        for url in source.url:
            yield _server(key, source, url)
        if source.chat_judge is not None:
            for url in source.chat_judge.url:
                yield _judge(key, source.chat_judge, url)
        if source.rules:
            yield _rules(key, source.rules)
        if source.source is not None:
            yield _kind(key, source)
    if config.evolve.every and (kinds := readers(config, held_out=False)):
        yield Finding.error(
            "evolve.every",
            f"a rewritten prompt has no reference, and the reward ({type(kinds[0]).__name__}) checks answers by one: set it to 0",
        )
    if config.evaluate.judge is None:
        yield Finding.warning(
            "gate", "gate not independent: the reward that trains also judges (evaluate.judge names no other)"
        )


def _kind(key: str, source: RewardSource) -> Finding:
    """Whether this machine has what a kind needs."""
    served = source.served()
    assert served is not None, "a source with a kind is served by a child"
    name, settings = served
    try:
        settings.require()
    except ModelRefused as error:
        return Finding.error(key, str(error))
    return Finding.ok(key, f"the settings of {name} are valid; whether it scores, a round will show")


def _server(key: str, source: RewardSource, url: str) -> Finding:
    secret = os.environ.get(source.api_key_env) if source.api_key_env else None
    try:
        with RewardClient(
            url,
            dialect=source.dialect,
            tokenizer=source.tokenizer,
            api_key=secret,
            proxy=proxy_of(source.proxy_env),
            deadline=SECONDS,
        ) as client:
            health = client.health()
    except (RewardUnavailable, RewardRefused, ValueError) as error:
        return Finding.error(key, f"{url} does not answer: {error}")
    if health is UNNAMED:
        text = f"{url} has no /healthz: only a round will show which model it serves, and whether it scores"
        return Finding.warning(key, text)
    if source.dialect == "openrlhf":
        return Finding.ok(key, f"{url} cannot be asked which model it serves: its format has no such question")
    return Finding.ok(key, f"{url} serves {health.model}")


def _judge(key: str, judge: JudgeSettings, url: str) -> Finding:
    """Ask a chat endpoint for its list of models. That needs the key too, and costs nothing."""
    secret = os.environ.get(judge.api_key_env) if judge.api_key_env else None
    try:
        headers = {"authorization": bearer(secret)} if secret else {}
        answer = ask(
            "GET",
            f"{url.rstrip('/')}/v1/models",
            headers=headers,
            seconds=SECONDS,
            limit=MODELS,
            proxy=proxy_of(judge.proxy_env),
        )
    except (HttpError, ValueError) as error:
        return Finding.error(key, f"the judge at {url} does not answer: {type(error).__name__}: {error}")
    if answer.status in (401, 403):
        return Finding.error(key, f"the judge at {url} refuses the key ({answer.status})")
    try:
        names = [row["id"] for row in json.loads(answer.content if answer.success else b"")["data"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = f"the judge at {url} answers, but not with a list of models ({answer.status})"
        return Finding.warning(key, text)
    if judge.model not in names:
        known = ", ".join(map(str, names[:5])) or "none"
        return Finding.error(key, f"the judge at {url} has no model {judge.model}; it has {known}")
    return Finding.ok(key, f"the judge at {url} has the model {judge.model}")


def _rules(key: str, rules: list[Rule]) -> Finding:
    """Make the rules, with their patterns, files and functions, in a process like the one that will serve them."""
    given = json.dumps([rule.model_dump(mode="json") for rule in rules])
    root = str(Path(__file__).resolve().parents[2])
    environment = inherited_environment() | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", MAKE_RULES, given], capture_output=True, text=True, timeout=60, env=environment
    )
    names = ", ".join(rule.rule for rule in rules)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Finding.error(key, last.partition("ModelRefused: ")[2] or last)
    return Finding.ok(key, f"the rules can be applied: {names}")
