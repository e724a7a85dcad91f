"""The child alone, spoken to by hand."""

import dataclasses
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from engine_world import EOS, logps, prompts, seed, write_experts, write_policy
from transformers import AutoModelForCausalLM

from selfplay.generation.worker import WorkerOrders
from selfplay.processes.child import Child, ChildError
from selfplay.storage import answers, tables
from selfplay.types import Candidate, Prompt

pytestmark = pytest.mark.service

SAMPLING = {"n": 4, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "stop": [], "max_tokens": 48, "stop_token_ids": [EOS]}
LONG = [i % 250 + 3 for i in range(100)]  # three blocks of the KV cache and a bit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def models(folder):
    return [write_policy(folder, version, seed=version).path for version in (1, 2)]


def started(folder):
    argv = [sys.executable, "-m", "selfplay.generation.engine", "--cpu-kv-cache-gib", "0.125"]
    child = Child("generator", argv, run_dir=folder, log=folder / "engine.log")
    child.start()
    child.wait_for("ready")
    return child


@pytest.fixture(scope="module")
def engine(folder, models):
    child = started(folder)
    with pytest.raises(ChildError, match="no config"):
        load(child, str(folder / "nowhere"))
    child.info = load(child, models[0])
    yield child
    child.stop()


def load(child, model):
    return child.order(
        "load", model=model, dtype="float32", seed=0, max_model_len=160, max_num_seqs=256, gpu_memory_utilization=0.8,
        tensor_parallel=1, nodes=1, trust_remote_code=False, sleep_mode=True,
    )  # fmt: skip


def generate(child, some=None, on_event=None, start=0, count=None, policy=1, **sampling):
    """The candidates that the engine wrote for a range of prompts."""
    some = prompts(48) if some is None else some
    count = len(some) if count is None else count
    asked, out = child.log.parent / "asked.parquet", child.log.parent / "answers.parquet"
    tables.write_rows(asked, some, Prompt)
    said = child.order(
        "generate", on_event, prompts=str(asked), start=start, count=count, out=str(out), policy=policy,
        seeds=[seed(p.prompt_id) for p in some[start : start + count]], sampling={**SAMPLING, **sampling},
    )  # fmt: skip
    rows = tables.read_rows(out, Candidate)
    assert (said["rows"], said["tokens"]) == (len(rows), sum(len(c.token_ids) for c in rows)) and said["seconds"] > 0
    return rows


def reload(child, path):
    child.order("reload", path=path)
    child.order("reset")


def test_load_says_what_runs(engine):
    info = engine.info
    assert info["dtype"] == "float32" and info["eos_ids"] == [EOS] and info["max_model_len"] == 160
    if info["device"] == "cpu":
        assert info["block_size"] == 32
        assert info["supports_sleep"] is False
        assert engine.order("sleep", level=2) == {"supported": False}
        assert engine.order("wake", tags=["weights"]) == {"supported": False}


def test_candidates_are_what_transformers_says_they_are(engine, models):
    rows = generate(engine, policy=5)
    assert [(c.prompt_id, c.index) for c in rows] == [(f"p{i}", k) for i in range(48) for k in range(4)]
    assert {c.finish_reason for c in rows} == {"stop", "length"}
    for c in rows:
        stopped = c.finish_reason == "stop"
        assert (c.token_ids[-1] == EOS) == stopped and EOS not in c.token_ids[:-1]
        assert stopped or len(c.token_ids) == 48
        assert "<eos>" not in c.text
        assert (c.n_tokens, c.policy) == (len(c.token_ids), 5)
        assert c.digest == answers.digest(c.token_ids)
    model = AutoModelForCausalLM.from_pretrained(models[0])
    for i in range(0, 48, 8):
        ids = prompts(48)[i].prompt_ids
        for c in rows[4 * i : 4 * i + 4]:
            assert c.logp == pytest.approx(logps(model, ids + c.token_ids, len(ids)), abs=1e-4)


def test_logp_is_at_temperature_1_over_the_whole_vocabulary(engine):
    some = prompts(4)
    rows = generate(engine, some, temperature=0.7, top_k=20, top_p=0.9)
    sequences = [
        {"token_ids": some[i // 4].prompt_ids + c.token_ids, "start": len(some[i // 4].prompt_ids)}
        for i, c in enumerate(rows)
    ]
    scored = engine.order("logps", sequences=sequences)
    assert [c.logp for c in rows] == pytest.approx(scored, abs=1e-4)


def test_answers_are_scored_behind_their_prompts(engine):
    """In a range that begins and ends within a prompt, over several row groups."""
    rows = generate(engine, prompts(80))
    folder, seen = engine.log.parent, []

    def score(start, count, answered=folder / "answers.parquet", **fields):
        return engine.order(
            "answer_logps", seen.append, prompts=str(folder / "asked.parquet"), answers=str(answered), start=start,
            count=count, **{"per_prompt": 4, "greedy": False, **fields},
        )  # fmt: skip

    assert tables.count_rows(folder / "answers.parquet") == 320 > tables.GROUP_ROWS
    assert score(3, 310) == pytest.approx([c.logp for c in rows[3:313]], abs=1e-4)
    done = [event["done"] for event in seen]
    assert done == sorted(done) and done[-1] == seen[-1]["total"] == 310
    with pytest.raises(ChildError, match="row 3 of .* is no answer to prompt 1 of") as caught:
        score(0, 8, per_prompt=3)
    assert caught.value.kind == "input"
    with pytest.raises(ChildError, match="ends at row 320; 324 were asked for"):
        score(316, 8)
    long = [dataclasses.replace(rows[0], token_ids=[5] * 160)]
    tables.write_rows(folder / "long.parquet", long, Candidate)
    with pytest.raises(ChildError, match="an answer behind its prompt has 171 tokens"):
        score(0, 1, folder / "long.parquet")


def test_candidates_do_not_depend_on_the_shard(engine):
    whole = generate(engine)
    engine.order("reset")
    parts = [c for start in range(0, 48, 16) for c in generate(engine, start=start, count=16)]
    if engine.info["device"] == "cpu":
        assert parts == whole  # ids, text and log-probabilities, to the bit
    assert len({c.digest for c in whole}) > 0.9 * 48 * 4


def test_more_prompt_tokens_than_a_step_takes(engine):
    """vLLM dies on a CPU where a seeded prompt is cut at the budget of a step (4096 tokens)."""
    many = [
        dataclasses.replace(p, prompt_ids=[1] + [(i + j) % 250 + 3 for j in range(100)])
        for i, p in enumerate(prompts(60))
    ]
    assert len(generate(engine, many, n=1, max_tokens=2)) == 60


@pytest.mark.parametrize(
    ("ids", "what"), [([], "has 0 tokens"), ([5] * 113, "room for 1 to 112"), ([280], "outside 0"), ([-1], "outside 0")]
)
def test_bad_prompts_are_refused_and_the_engine_lives_on(engine, ids, what):
    good = prompts(1)
    with pytest.raises(ChildError, match=what) as caught:
        generate(engine, [*good, dataclasses.replace(prompts(2)[1], prompt_ids=ids)])
    assert caught.value.kind == "input" and "prompt p1 (number 1)" in str(caught.value)
    assert len(generate(engine, good)) == 4


def test_bad_sequences_are_refused(engine):
    for sequence in (
        {"token_ids": [1, 2], "start": 0},
        {"token_ids": [1, 2], "start": 2},
        {"token_ids": [5] * 160, "start": 1},
    ):
        with pytest.raises(ChildError) as caught:
            engine.order("logps", sequences=[sequence])
        assert caught.value.kind == "input"


def test_progress_reaches_the_end(engine):
    events = []
    rows = generate(engine, prompts(8), events.append)
    assert (events[-1]["done"], events[-1]["total"]) == (8, 8)
    assert events[-1]["tokens"] == sum(len(c.token_ids) for c in rows)


def test_a_full_disk_is_named_and_the_engine_lives_on(engine, small_disk):
    asked, out = engine.log.parent / "asked.parquet", small_disk("4k") / "answers.parquet"
    before = generate(engine, prompts(8))
    with pytest.raises(ChildError, match="the disk of .* is full") as caught:
        engine.order(
            "generate", prompts=str(asked), start=0, count=8, out=str(out), policy=1, seeds=[0] * 8, sampling=SAMPLING
        )
    assert caught.value.kind == "disk" and "free some space" in caught.value.hint
    assert generate(engine, prompts(8)) == before


def test_reload_changes_every_weight_the_output_layer_included(engine, models):
    """vLLM keeps its repacked copy of a tied output layer on a CPU; ours is renewed."""
    before = generate(engine)
    reload(engine, models[1])
    ids = LONG[:40]
    (scored,) = engine.order("logps", sequences=[{"token_ids": ids, "start": 1}])
    assert scored == pytest.approx(logps(AutoModelForCausalLM.from_pretrained(models[1]), ids), abs=1e-3)
    same = engine.order("compare_weights", path=models[1])
    other = engine.order("compare_weights", path=models[0])
    assert same["supported"] and same["max_abs_diff"] == 0.0 and other["max_abs_diff"] > 0.1
    # Tied: the embeddings are counted under both names.
    model = AutoModelForCausalLM.from_pretrained(models[1])
    assert same["compared"] == sum(p.numel() for p in model.parameters()) + model.lm_head.weight.numel()
    reload(engine, models[0])
    assert generate(engine) == before


def test_weights_are_forgotten_unless_kernels_keep_copies(engine, models):
    before = generate(engine)
    if engine.order("forget")["supported"]:
        assert engine.order("compare_weights", path=models[0])["max_abs_diff"] > 0
        reload(engine, models[0])
    assert generate(engine) == before

    model = AutoModelForCausalLM.from_pretrained(models[0]).requires_grad_(False)
    worker = WorkerOrders()
    worker.model_runner = SimpleNamespace(get_model=lambda: model)
    assert worker.forget_weights() and not any(p.any() for p in model.parameters())
    model.lm_head.cpu_linear = None
    model.model.norm.weight.fill_(1.0)
    assert not worker.forget_weights() and model.model.norm.weight.all()


def test_a_stale_prefix_cache_shows_in_what_is_generated_and_not_in_scores(engine, models):
    def canary():
        said = engine.order("canary_generate", prompt_ids=LONG, seed=3, n=8)
        (scored,) = engine.order("logps", sequences=[{"token_ids": LONG + said["token_ids"], "start": len(LONG)}])
        return said["cached_tokens"], abs(math.fsum(said["logps"]) - scored) / 8

    engine.order("reset")
    assert canary()[0] == 0
    cached, error = canary()
    assert cached == 96 and error < 1e-5
    engine.order("reload", path=models[1])
    cached, error = canary()
    assert cached == 96 and error > 0.01
    engine.order("reset")
    cached, error = canary()
    assert cached == 0 and error < 1e-5
    reload(engine, models[0])


def test_a_path_that_is_not_there_is_an_error_and_a_good_reload_saves_the_engine(engine, models, tmp_path):
    before = generate(engine, prompts(2))
    with pytest.raises(ChildError):
        engine.order("reload", path=str(tmp_path / "nowhere"))
    reload(engine, models[0])
    assert generate(engine, prompts(2)) == before


def test_memory_does_not_grow_with_the_sizes_of_batches_that_were_seen(engine):
    """On a CPU a kernel is made for each number of tokens in a step. 150 steps of other sizes come after 150 that may fill
    what is kept of them; were all kept, they would take 50 MiB and more."""
    if engine.info["device"] != "cpu":
        pytest.skip("the kernels of a GPU take any number of tokens")
    rng = random.Random(0)

    def resident() -> float:
        (child,) = (int(pid) for pid in Path(f"/proc/{engine.pid}/task/{engine.pid}/children").read_text().split())
        status = dict(line.split(":", 1) for line in Path(f"/proc/{child}/status").read_text().splitlines())
        return int(status["VmRSS"].split()[0]) / 1024

    def score(steps: int) -> None:
        for _ in range(steps):
            lengths = [rng.randrange(2, 150) for _ in range(rng.randrange(1, 12))]
            engine.order("logps", sequences=[{"token_ids": [7] * n, "start": n - 1} for n in lengths])

    score(150)
    before = resident()
    score(150)
    assert resident() - before < 8


@pytest.fixture
def other_engine(tmp_path):
    """A process of its own: vLLM makes the groups of a mixture's experts with the first model that a process loads."""
    child = started(tmp_path)
    yield child
    child.stop()


def test_experts_of_a_mixture_are_renewed_by_a_reload(other_engine, folder):
    """The kernels of a CPU pack them when they are loaded first."""
    engine = other_engine
    paths = [write_experts(folder / f"experts-{seed}", seed) for seed in (1, 2)]
    load(engine, str(paths[0]))
    models = [AutoModelForCausalLM.from_pretrained(path) for path in paths]
    for which in (0, 1, 0):
        reload(engine, str(paths[which]))
        (scored,) = engine.order("logps", sequences=[{"token_ids": LONG[:40], "start": 1}])
        assert scored == pytest.approx(logps(models[which], LONG[:40]), abs=2e-3)
