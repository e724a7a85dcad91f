"""The dialects against scripted servers, and OpenRLHF's against ours; vLLM's against a real one in test_reward_vllm.py."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_reward import ITEMS, QUICK, fake, send, status
from reward_world import CONTROL, bare_scores, conversation, process_of, reward_model, tokenizer_with
from transformers import PreTrainedTokenizerFast

from reward.client import RewardClient, RewardRefused, RewardUnavailable
from reward.openrlhf import Unrender
from reward.schema import GetRewardRequest

pytestmark = pytest.mark.service


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reward_model(tmp_path_factory.mktemp("dialects") / "reward")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another template than the reward model's."""
    template = (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}\n{{ m.content }}<|eot_id|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant\n{% endif %}"
    )
    path = tmp_path_factory.mktemp("dialects") / "policy"
    tokenizer_with(template).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def url(folder: Path, policy: Path) -> Iterator[str]:
    with process_of("--model", str(folder), "--policy", str(policy), "--device", "cpu,cpu") as (_, line):
        yield line["url"]


def numbers(field: str, **change: Any) -> Any:
    """vLLM's answer: the number of tokens of each input."""

    def answer(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        rows = [{"index": i, field: [float(len(ids))]} | change for i, ids in enumerate(asked["input"])]
        send(handler, 200, json.dumps({"object": "list", "data": rows}).encode())

    return answer


@pytest.mark.parametrize(
    ("dialect", "path", "field"), [("vllm-classify", "/classify", "probs"), ("vllm-pooling", "/pooling", "data")]
)
def test_vllm_gets_the_ids_of_the_template(dialect: Any, path: str, field: str, folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    items = [conversation(i, n) for i, n in enumerate([1, 40, 3])]
    rendered = [
        tokenizer.apply_chat_template([*m, {"role": "assistant", "content": r}], tokenize=True, return_dict=False) for m, r in items
    ]  # fmt: skip
    with fake(default=numbers(field)) as server:
        client = RewardClient(server.url, dialect=dialect, tokenizer=str(folder), model="rm", **QUICK)
        assert client.score([items[0], (items[0][0], "x" * 10**6), *items[1:]]) == [
            len(rendered[0]), None, len(rendered[1]), len(rendered[2])
        ]  # fmt: skip
        (asked,) = server.asked
    assert asked.pop("path") == path
    extra = {"task": "classify"} if dialect == "vllm-pooling" else {}
    assert asked == {"model": "rm", "input": rendered, "use_activation": False} | extra


def test_vllm_answers_that_cannot_be_matched_are_faults(folder: Path) -> None:
    settings = {"dialect": "vllm-classify", "tokenizer": str(folder), **QUICK}
    for wrong in (
        numbers("probs", index=7),
        numbers("probs", probs=[0.5, 0.5]),
        numbers("data", data=None),
        status(200, b'{"data": []}'),
    ):
        with fake(wrong, default=numbers("probs")) as server, RewardClient(server.url, **settings) as client:
            assert None not in client.score(ITEMS[:3])
            assert len(server.asked) == 2


def test_vllm_needs_a_tokenizer_and_no_torch(folder: Path) -> None:
    import subprocess
    import sys

    with pytest.raises(ValueError, match="needs the tokenizer"):
        RewardClient("http://127.0.0.1:9", dialect="vllm-classify")
    with pytest.raises(ValueError, match="no tokenizer at /nowhere"):
        RewardClient("http://127.0.0.1:9", dialect="vllm-classify", tokenizer="/nowhere")
    with pytest.raises(ValueError, match="no dialect 'grpc'"):
        RewardClient("http://127.0.0.1:9", dialect="grpc")  # type: ignore[arg-type]
    code = (
        "import sys; from reward.client import RewardClient\n"
        f"RewardClient('http://a', dialect='vllm-classify', tokenizer={str(folder)!r})\nprint('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_a_key_is_sent_and_nothing_else_is() -> None:
    keys: list[str | None] = []

    def note(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        keys.append(handler.headers.get("authorization"))
        send(handler, 200, b'{"scores": [1.0]}')

    with fake(default=note) as server:
        RewardClient(server.url, api_key="secret\n").score(ITEMS[:1])  # as a file has it
        RewardClient(server.url).score(ITEMS[:1])
    assert keys == ["Bearer secret", None]

    def repeat(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        send(handler, 401, b"no such key: " + handler.headers["authorization"].encode())

    with fake(default=repeat) as server, pytest.raises(RewardRefused, match="no such key: Bearer …") as refused:
        RewardClient(server.url, api_key="secret\n").score(ITEMS[:1])
    assert "secret" not in str(refused.value)


def test_openrlhf_texts(policy: Path) -> None:
    def answer(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        send(
            handler,
            200,
            json.dumps(
                {
                    "rewards": [
                        float(q[len(p) :].split()[-1]) for q, p in zip(asked["query"], asked["prompts"], strict=True)
                    ]
                }
            ).encode(),
        )

    with fake(default=answer) as server:
        with RewardClient(server.url, dialect="openrlhf", **QUICK) as client:
            assert client.score(ITEMS[:3], references=["a", None, "c"]) == [0.0, 1.0, 2.0]
            assert server.asked[0] == {
                "query": [f"question {i}answer {i}" for i in range(3)],
                "prompts": [f"question {i}" for i in range(3)],
                "labels": ["a", "", "c"],
                "path": "/get_reward",
            }
            assert client.health().kind == "openrlhf"
        with RewardClient(server.url, dialect="openrlhf", tokenizer=str(policy), **QUICK) as client:
            assert client.score(ITEMS[:1]) == [0.0]
            rendered = "<|begin_of_text|><|start_header_id|>user\nquestion 0<|eot_id|>\n<|start_header_id|>assistant\n"
            assert server.asked[-1]["prompts"] == [rendered]
    with (
        fake(default=status(200, b'{"rewards": [1.0]}')) as server,
        pytest.raises(RewardUnavailable, match="1 scores for 3"),
    ):
        RewardClient(server.url, dialect="openrlhf", **QUICK | {"deadline": 0.3}).score(ITEMS[:3])


def test_our_server_answers_openrlhf_by_two_workers(url: str, folder: Path, policy: Path) -> None:
    items = [conversation(i, n) for i, n in enumerate([1, 40, 3, 17, 60, 2, 25, 8])]
    expected = bare_scores(folder, items)
    with RewardClient(url, dialect="openrlhf", tokenizer=str(policy), batch_size=2) as client:
        assert client.score(items) == pytest.approx(expected, abs=1e-5)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(policy)
    prompts = [tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m, _ in items]
    # as OpenRLHF sends it: decoded with the token that ended the response
    asked = {
        "query": [p + r + "<|eot_id|>" for p, (_, r) in zip(prompts, items, strict=True)],
        "prompts": prompts,
        "labels": [""] * 8,
    }
    answer = httpx.post(f"{url}/get_reward", json=asked | {"images": None}, timeout=60, trust_env=False)
    assert answer.json()["rewards"] == pytest.approx(expected, abs=1e-5)
    assert 'reward_requests_total{path="/get_reward",status="200"}' in httpx.get(f"{url}/metrics", trust_env=False).text


@pytest.mark.parametrize(
    ("asked", "code", "says"),
    [
        ({"query": ["a"]}, 422, "`prompts` is needed"),
        ({"query": ["a", "b"], "prompts": ["a"]}, 422, "2 queries, 1 prompts"),
        ({"query": "a", "prompts": ["a"]}, 422, "not a score request"),
    ],
)
def test_what_is_no_openrlhf_request_is_refused(url: str, asked: dict[str, Any], code: int, says: str) -> None:
    answer = httpx.post(f"{url}/get_reward", json=asked, timeout=60, trust_env=False)
    assert answer.status_code == code
    assert says in answer.json()["error"]


def test_a_query_that_is_not_its_prompts_has_no_reward_and_others_have_theirs(url: str) -> None:
    asked = {"query": ["abc", "other", "ab"], "prompts": ["a", "b", "a"]}
    given = httpx.post(f"{url}/get_reward", json=asked, timeout=60, trust_env=False).json()
    assert [r is None for r in given["rewards"]] == [False, True, False]
    assert given["errors"][1] == "the query does not begin with its prompt"


def test_unrender(policy: Path) -> None:
    def items(prompt: str, response: str, unrender: Unrender) -> tuple[str, str]:
        (item,) = unrender.items(GetRewardRequest(query=[prompt + response], prompts=[prompt]))
        assert not isinstance(item, str)
        return item.messages[0].content, item.response

    known = Unrender(str(policy))
    bos, _, start, _, eot = CONTROL
    prompt = f"{bos}{start}user\nHello{eot}\n{start}assistant\n"
    assert items(prompt, f"Hi.{eot}\n", known) == ("Hello", "Hi.")
    assert items(prompt, f"{eot}Hi.", known) == ("Hello", f"{eot}Hi.")  # one inside the response stays, to be split
    assert items("Hello", "Hi.", known) == ("Hello", "Hi.")
    assert items(prompt, f"Hi.{eot}", Unrender(None)) == (prompt, f"Hi.{eot}")
    with pytest.raises(ValueError, match="no tokenizer with a chat template"):
        Unrender("/nowhere")
