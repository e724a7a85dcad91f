"""What `selfplay check` says of rewards and of the judge."""

import http.server
import importlib.util
import json
import threading

import pytest
from check_world import model, said, settings

from reward.sandbox import run
from selfplay.checks.reward import sources


@pytest.mark.slow
def test_rules_are_made_and_their_functions_imported(tmp_path):
    policy = model(tmp_path / "policy")
    assert said(settings(tmp_path, policy), tmp_path, "reward") == ("ok", "the rules can be applied: length")
    for rule, why in (
        ("{rule: function, function: 'nowhere:score'}", "the rule function: No module named 'nowhere'"),
        ("{rule: exact, references: none.jsonl}", "the rule exact: "),
    ):
        level, text = said(settings(tmp_path, policy, f"reward.rules=[{rule}]"), tmp_path, "reward")
        assert level == "error" and text.startswith(why)


@pytest.mark.parametrize(
    ("kind", "package", "why"),
    [
        ("math", "math_verify", "math needs the package math-verify: pip install 'selfplay[verify]'"),
        ("instructions", "langdetect", "instructions need the package langdetect: pip install 'selfplay[verify]'"),
    ],
)
def test_a_reward_whose_package_is_missing_is_an_error(tmp_path, monkeypatch, kind, package, why):
    config = settings(tmp_path, model(tmp_path / "policy"), f"reward={{source: {{kind: {kind}}}}}")
    assert said(config, tmp_path, "reward")[0] == "ok"
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == package else found(name, *more)
    )
    assert said(config, tmp_path, "reward") == ("error", why)


def test_code_needs_a_sandbox(tmp_path, monkeypatch):
    config = settings(tmp_path, model(tmp_path / "policy"), "reward={source: {kind: code}}")
    assert said(config, tmp_path, "reward")[0] == "ok"
    monkeypatch.setattr(run, "LAUNCH", run.LAUNCH.replace("libc.unshare(NEW)", "-1"))
    level, text = said(config, tmp_path, "reward")
    assert level == "error" and text.startswith("code needs a sandbox, and none can be had here: new namespaces: ")


@pytest.mark.slow
def test_a_reward_that_reads_references_and_rewritten_prompts_that_have_none(tmp_path):
    policy = model(tmp_path / "policy")
    for source, why in (
        ("kind: instructions", "a rewritten prompt has no reference"),
        ("kind: rules, rules: [{rule: json}]", ""),
    ):
        config = settings(tmp_path, policy, f"reward={{source: {{{source}}}}}", "evolve.every=2")
        found = [f.text for f in sources(config, tmp_path) if f.about == "evolve.every"]
        assert len(found) == bool(why) and all(why in text for text in found)


@pytest.mark.slow
def test_an_unknown_instruction_is_named_with_its_prompt(tmp_path):
    config = settings(tmp_path, model(tmp_path / "policy"), "reward={source: {kind: instructions}}")
    rows = [{"prompt": f"train {i}", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]} for i in range(9)]
    rows += [{"prompt": "without"}, {"prompt": "Shout!", "instruction_id_list": ["change_case:shout"], "kwargs": [{}]}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    (tmp_path / "heldout.jsonl").write_text(
        "".join(json.dumps(row | {"prompt": f"held out {i}"}) + "\n" for i in range(9) for row in rows[:1])
    )
    level, text = said(config, tmp_path, "prompts")
    assert level == "warning" and text.startswith("9 to train on, ")
    assert "1 × no reference: the prompt needs instruction_id_list and kwargs" in text
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    level, text = said(config, tmp_path, "prompts")
    assert level == "error" and "the prompt 'Shout!': unknown instruction id 'change_case:shout'" in text


@pytest.mark.slow
def test_a_judge_behind_a_chat_endpoint_is_asked_for_its_models(tmp_path, monkeypatch):
    class Models(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            allowed = self.headers["authorization"] == "Bearer secret"
            self.send_response(200 if allowed and self.path == "/v1/models" else 401)
            self.end_headers()
            self.wfile.write(b'{"data": [{"id": "big"}]}' if allowed else b"")

        def log_message(self, *args):
            pass

    policy, key = model(tmp_path / "policy"), "evaluate.judge"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Models) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"

        def asked(name):
            judge = f"evaluate.judge={{chat_judge: {{url: ['{url}'], model: {name}, api_key_env: JUDGE_KEY}}}}"
            return settings(tmp_path, policy, judge)

        unset = said(asked("big"), tmp_path, "evaluate.judge api_key_env")
        assert unset == ("error", "the environment variable JUDGE_KEY is not set")
        assert said(asked("big"), tmp_path, key) == ("error", f"the judge at {url} refuses the key (401)")
        monkeypatch.setenv("JUDGE_KEY", "secret")
        assert said(asked("big"), tmp_path, key) == ("ok", f"the judge at {url} has the model big")
        assert said(asked("small"), tmp_path, key) == ("error", f"the judge at {url} has no model small; it has big")
        server.shutdown()
    level, text = said(asked("big"), tmp_path, key)
    assert level == "error" and "does not answer: ConnectError" in text
