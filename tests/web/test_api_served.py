"""The API on a real port, its description, and what it imports."""

import contextlib
import json
import math
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from served_world import config

from selfplay.config import ServiceConfig
from selfplay.errors import ConfigError
from selfplay.storage.ledger import Store
from selfplay.web.api import create_app
from selfplay.web.server import serve_in_thread

pytestmark = pytest.mark.service


@pytest.fixture
def served(run):
    """The app on a real port."""
    app = create_app(run[0], config(), run[1], None, page=False)
    server, port = serve_in_thread(app, ServiceConfig(port=0))
    yield run[0], f"http://127.0.0.1:{port}"
    server.stop()
    assert not server.thread.is_alive()


def test_events_are_streamed_as_they_happen_and_resumed(served):
    run_dir, base = served
    store = Store(run_dir)
    before = store.events()[-1]["id"]
    found, ready = [], threading.Event()

    def listen():
        with httpx.stream("GET", f"{base}/api/events/stream", timeout=30) as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            ready.set()
            for line in stream.iter_lines():
                found.append(line)
                if line == f"id: {before + 2}":
                    return

    listener = threading.Thread(target=listen)
    listener.start()
    assert ready.wait(10)
    time.sleep(0.3)
    store.event("note", "two\nlines \u2028 and <b>", 5)
    store.event("note", "last")
    listener.join(15)
    assert not listener.is_alive()
    data = [json.loads(line.removeprefix("data: ")) for line in found if line.startswith("data: ")]
    assert [(d["id"], d["text"]) for d in data] == [(before + 1, "two\nlines \u2028 and <b>"), (before + 2, "last")]
    for headers, params, expected in (
        ({"last-event-id": str(before + 1)}, {}, before + 2),
        ({}, {"after": before}, before + 1),
        ({"last-event-id": "x"}, {"after": 0}, 1),
    ):
        with httpx.stream("GET", f"{base}/api/events/stream", headers=headers, params=params, timeout=30) as stream:
            assert next(line for line in stream.iter_lines() if line.startswith("id: ")) == f"id: {expected}"
    store.close()


def test_a_server_with_open_streams_stops_in_time(run):
    server, port = serve_in_thread(create_app(run[0], config(), run[1], None, page=False), ServiceConfig(port=0))
    with httpx.stream("GET", f"http://127.0.0.1:{port}/api/events/stream", timeout=30):
        started = time.monotonic()
        server.stop()
        server.stop()
        assert time.monotonic() - started < 6
    assert not server.thread.is_alive()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/healthz")


def test_a_port_that_is_taken(served, run):
    port = int(served[1].rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"127.0.0.1:{port} cannot be listened on"):
        serve_in_thread(create_app(run[0], config(), run[1], None, page=False), ServiceConfig(port=port))
    with pytest.raises(ConfigError, match="no-such-host"):
        serve_in_thread(
            create_app(run[0], config(), run[1], None, page=False), ServiceConfig(host="no-such-host.invalid")
        )


def test_the_description_names_every_answer(client):
    schema = client.get("/api/openapi.json").json()
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            assert operation.get("summary") and operation.get("description"), path
            good = next(a for status, a in operation["responses"].items() if status.startswith("2"))
            if path not in ("/metrics", "/api/events/stream"):
                assert good["content"]["application/json"]["schema"], path
    assert schema["components"]["schemas"]["Pause"]["additionalProperties"] is False


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_no_request_makes_the_server_fail(run, mode):
    """Schemathesis makes requests up from the description, valid and not: no 5xx, and every answer as described."""
    import hypothesis
    import schemathesis
    from schemathesis.specs.openapi import checks

    app = create_app(run[0], config(), run[1], None, page=False)
    schema = schemathesis.openapi.from_asgi("/api/openapi.json", app, headers={"host": "localhost"})
    promised = [
        schemathesis.checks.not_a_server_error, checks.status_code_conformance, checks.response_schema_conformance,
        checks.content_type_conformance,
    ]  # fmt: skip
    statuses = []
    for found in schema.exclude(path="/api/events/stream").get_all_operations():
        operation = found.ok()
        try:
            cases = operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode))
        except hypothesis.errors.Unsatisfiable:
            continue

        @hypothesis.given(case=cases)
        @hypothesis.settings(
            max_examples=10,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        def check(case):
            answer = case.call(headers={"host": "localhost"})
            statuses.append(answer.status_code)
            case.validate_response(answer, checks=promised)

        with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # nothing about it can be invalid
            check()
    good, bad = sum(s < 300 for s in statuses), sum(400 <= s < 500 for s in statuses)
    assert (good if mode == "positive" else bad) > 60, (good, bad)


def test_what_the_controller_imports_stays_small():
    """API and page together, and an app made of them: without torch, and within the memory of a controller."""
    code = (
        "import sys, tempfile, pathlib\n"
        "from selfplay.storage import tables\n"
        "tables.leave_pandas_out()\n"
        "import selfplay.service.daemon\n"
        "from selfplay.web.api import create_app\n"
        "from selfplay.config import load\n"
        "from selfplay.types import Prompt\n"
        "folder = pathlib.Path(tempfile.mkdtemp())\n"
        "create_app(folder, load('configs/tiny.yaml'), dict, None)\n"
        "tables.write_rows(folder / 'x.parquet', [Prompt(prompt_id='a', messages=[], prompt_ids=[1], split='train')], Prompt)\n"
        "print(int(open('/proc/self/statm').read().split()[1]) * 4096 / 1e6)\n"
        "print([m for m in ('torch', 'transformers', 'vllm', 'trl', 'sklearn', 'datasets', 'matplotlib', 'pandas') if m in sys.modules])\n"
    )
    root = Path(__file__).parents[2]
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    ).stdout.split("\n")
    assert float(out[0]) < 260 and out[1] == "[]", out
    assert not math.isnan(float(out[0]))
