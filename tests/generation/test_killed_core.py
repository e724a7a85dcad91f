"""vLLM's engine core in a process of its own, as on a GPU, and somebody kills it. vLLM itself would wait for it for ever."""

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from engine_world import config, prompts, sample, write_policy

from selfplay.generation.generator import Generator
from selfplay.generation.liveness import gone, was_killed
from selfplay.processes import reaping

pytestmark = [pytest.mark.service, pytest.mark.timeout(900)]

NOTICED = 60.0  # seconds: a busy machine takes some of them, and vLLM alone would wait for ever


def kill_core(generator):
    """SIGKILL to the engine core, which names itself; returns when that was."""
    below = reaping.descendants(generator.engines[0].warm.child.pid)
    (core,) = [pid for pid in below if "EngineCore" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(core, signal.SIGKILL)
    return time.monotonic()


@pytest.mark.long
def test_a_killed_engine_core_is_noticed_whatever_it_did_and_replaced(tmp_path, monkeypatch):
    monkeypatch.delenv("SELFPLAY_TEMPLATES", raising=False)  # the core is looked for below the engine
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # its worker would build kernels and the headers for them
    run_dir = tmp_path / "run"
    policy, events, killed = write_policy(run_dir / "policies", 1, seed=1), [], []
    generator = Generator(
        config(run_dir), run_dir, run_dir / "engine.log",
        on_event=lambda kind, text: events.append((kind, text, time.monotonic())),
    )  # fmt: skip
    try:
        generator.load(policy)
        whole = sample(generator, prompts(160), tmp_path)

        def on_progress(done):
            if not killed:
                killed.append(kill_core(generator))

        assert sample(generator, prompts(160), tmp_path, on_progress=on_progress) == whole
        ((kind, text, when),) = events
        assert kind == "engine_restart" and when - killed[0] < NOTICED, text
        # Idle: nobody asks it anything, and the next call finds it dead.
        when = kill_core(generator)
        while generator.engines[0].warm.child.alive:
            assert time.monotonic() - when < NOTICED
            time.sleep(0.02)
    finally:
        generator.stop()
    assert reaping.marked(run_dir) == []


def test_a_core_that_was_killed_before_it_served_is_told_from_one_that_failed():
    said = "Engine core initialization failed. See root cause above. Failed core proc(s): {{'EngineCore': {}}}"
    assert was_killed(RuntimeError(said.format(-9)))
    assert not was_killed(RuntimeError(said.format(1))) and not was_killed(RuntimeError("no blocks"))


def test_an_engine_without_a_core_of_its_own_is_gone_with_its_workers():
    def llm(**client):
        return SimpleNamespace(llm_engine=SimpleNamespace(engine_core=SimpleNamespace(**client)))

    def inside(executor):
        return llm(engine_core=SimpleNamespace(model_executor=executor))

    assert not gone(None) and not gone(inside(SimpleNamespace())) and not gone(inside(SimpleNamespace(is_failed=False)))
    assert gone(inside(SimpleNamespace(is_failed=True)))
    assert gone(llm(resources=SimpleNamespace(engine_dead=True)))
