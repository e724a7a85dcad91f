"""A run folder as a served run leaves it: a real ledger and real artifacts, made up numbers; and an app served from it.

`python tests/served_world.py RUN_DIR` serves API and page in a process of its own (the page can be mounted once in one),
prints the port, and obeys words on its input: `round N`, `state NAME WHY`.
"""

import dataclasses
import json
import math
import random
import sys
from functools import cache
from pathlib import Path
from typing import Any

from selfplay.config import Config, load
from selfplay.storage import folders, tables
from selfplay.storage.ledger import Store
from selfplay.storage.policies import Manifest, Policies
from selfplay.types import Pair, Prompt, Scored

ROOT = Path(__file__).parents[1]
HOSTILE = (
    "<script>window.pwned=1</script><img src=x onerror=\"window.pwned=2\"><svg onload=window.pwned=3> [a](javascript:window.pwned=4)"
    " **bold** {{ window.pwned=5 }} ${window.pwned=6} `x` &lt;b&gt; \u202egnp.exe\u202c \u200b\x07\x00 </pre></div>'\";-- שלום"
)  # fmt: skip
WORDS = "the a of river stone light quick seven blue under gives takes answer because therefore number list short long".split()


def config(*overrides: str) -> Config:
    return load(ROOT / "configs" / "tiny.yaml", ["service.port=0", *overrides])


@cache
def plain() -> dict[str, Any]:
    """The settings of each round."""
    return config().model_dump(mode="json")


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words)).capitalize() + "."


def pair(rng: random.Random, prompt_id: str, **changes: Any) -> Pair:
    explicit, implicit = round(rng.gammavariate(2, 0.5), 4), round(rng.gauss(0, 0.2), 4)
    n, m = rng.randrange(8, 30), rng.randrange(8, 30)
    made = Pair(
        prompt_id=prompt_id, prompt_ids=[1, 2], chosen_index=0, rejected_index=3, chosen=sentence(rng, n), rejected=sentence(rng, m),
        chosen_ids=list(range(n)), rejected_ids=list(range(m)), chosen_reward=explicit, rejected_reward=0.0, chosen_logp=-1.5 * n,
        rejected_logp=-1.4 * m, explicit_margin=explicit, implicit_margin=abs(implicit), implicit_signed=implicit,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def add_round(run_dir: Path, store: Store, index: int, pairs: int = 40, hostile: bool = False, state: str = "") -> None:
    """A finished round with its artifacts: some pairs kept, some dropped, one too noisy, the kept ones in clusters."""
    rng = random.Random(index)
    state = state or ("rejected" if index % 5 == 4 else "promoted")
    rows = [pair(rng, f"{index:04x}{i:012x}") for i in range(pairs)]
    if hostile:
        rows[0] = dataclasses.replace(rows[0], chosen=HOSTILE, rejected=HOSTILE.replace("script", "b") + "x" * 100_000)
    potentials = [rng.gauss(0, 1.4) for _ in rows]
    cut = sorted(potentials)[len(rows) // 2]
    rows = [
        dataclasses.replace(
            p, potential=v, **({"kept_because": "base"} if v > cut else {"dropped_because": "potential"})
        )
        for p, v in zip(rows, potentials, strict=True)
    ]
    rows[-1] = dataclasses.replace(
        rows[-1], potential=None, kept_because=None, dropped_because="noise", explicit_margin=1e-5
    )
    rows[-2] = dataclasses.replace(
        rows[-2],
        potential=None,
        kept_because=None,
        dropped_because="nonfinite",
        implicit_margin=math.nan,
        implicit_signed=math.nan,
    )
    deepened = [
        q
        for i, p in enumerate(rows) if p.kept_because
        for q in (
            dataclasses.replace(p, cluster=i % 3, closeness=0.5),
            dataclasses.replace(p, cluster=i % 3, closeness=0.5, chosen_index=1, kept_because="depth"),
        )
    ]  # fmt: skip
    question = HOSTILE if hostile else "What follows from this?"
    prompts = [
        Prompt(
            prompt_id=p.prompt_id,
            messages=[{"role": "user", "content": f"{question} {i}"}],
            prompt_ids=[1, 2],
            split="train",
        )
        for i, p in enumerate(rows)
    ]
    folder = run_dir / "rounds" / f"{index:04d}"
    for stage, name, values, kind in (
        ("prompts", "prompts", prompts, Prompt),
        ("pairs", "pairs", rows, Pair),
        ("depth", "pairs", deepened, Pair),
    ):
        (folder / stage).mkdir(parents=True)
        tables.write_rows(folder / stage / f"{name}.parquet", values, kind)
    store.open_round(index, max(0, index - 1), (0, 0), "f" * 64, plain())
    drift = index / (index + 20)
    store.record_stage(index, "prompts", 0.02, {"count": pairs})
    store.record_stage(
        index, "generate", 3.1, {"candidates": 8 * pairs, "tokens_per_second": 5200 + 10 * index, "tokens": 9000}
    )
    store.record_stage(index, "score", 0.8, {"reward_mean": drift - 0.2})
    store.record_stage(index, "guard", 0.1, {"ties": 0.125, "shift": 0.25})
    store.record_stage(
        index,
        "pairs",
        0.03,
        {"base": pairs, "kept": pairs // 2, "explicit_margin": 1.1, "implicit_margin": 0.12, "potential": 0.9},
    )
    store.record_pairs(index, rows)
    store.record_stage(index, "depth", 0.4, {"pairs": len(deepened), "added": len(deepened) // 2})
    store.record_stage(
        index, "train", 5.2, {"beta_start": 0.1, "beta": 0.1 * 0.985 ** (index % 40), "update_relative_norm": 2e-3}
    )
    win = 0.5 + rng.uniform(-0.05, 0.15)
    store.record_stage(index, "evaluate", 2.2, {
        "independent": 0, "reward": drift + rng.uniform(0, 0.05), "reward_champion": drift, "win_rate": win, "win_rate_low": win - 0.05,
        "win_rate_high": win + 0.05, "gold_total": 0.5 + drift / 3, "gold_content": 0.4 + drift / 4, "length_ratio": rng.uniform(0.95, 1.1),
        "kl_current": rng.uniform(0.3, 0.6), "kl_initial": 8 * drift, "audit_win_rate": 0.5 + drift / 2, "audit_gold_total": 0.48 + drift / 3,
        **(write_audit(run_dir, index, hostile) if index % 2 else {}),
    })  # fmt: skip
    store.record_policy(
        index, "candidate", round=index, parent=max(0, index - 1), reference=max(0, index - 1), beta=0.09
    )
    store.record_policy(index, state)
    why = [f"win rate {win:.3f} is not above 0.47 {HOSTILE if hostile else ''}"] if state == "rejected" else []
    store.close_round(index, state, index, why)
    store.event(state, "; ".join(why) or f"policy {index} is current", index)


def write_audit(run_dir: Path, index: int, hostile: bool = False, prompts: int = 12) -> dict[str, float]:
    """The audit of a round: answers that change a little from one to the next; returns its metrics."""
    folder = run_dir / "rounds" / f"{index:04d}" / "evaluate"
    folder.mkdir(parents=True)
    ids = [f"{i:016x}" for i in range(prompts)]
    asked = [
        HOSTILE if i == 1 else f"What follows from number {i}? {sentence(random.Random(i), 12)}" for i in range(prompts)
    ]

    def said(i: int, policy: int) -> Scored:
        rng = random.Random(i)
        words = [sentence(rng, rng.randrange(6, 24)) for _ in range(rng.randrange(1, 4))]
        text = " ".join([*words, *(f"Round {n} adds this." for n in range(1, policy + 1) if (n + i) % 3 == 0)])
        return Scored(
            prompt_id=ids[i], index=0, text=HOSTILE if i == 1 and policy else text, token_ids=[1] * 9, logp=-1.0, n_tokens=9 + i,
            finish_reason="length" if i == 2 else "stop", policy=policy, reward=None if i == 3 else round(i / 10 + policy / 50, 3),
            thinking=4 if i == 4 else None,
        )  # fmt: skip

    for name, rows in (
        ("audit", [said(i, index) for i in range(prompts)]),
        ("audit_initial", [said(i, 0) for i in range(prompts)]),
    ):
        tables.write_rows(folder / f"{name}.parquet", rows, Scored)
    questions = [
        Prompt(prompt_id=p, messages=[{"role": "user", "content": text}], prompt_ids=[1], split="audit", meta={"gold": "secret"})
        for p, text in zip(ids, asked, strict=True)
    ]  # fmt: skip
    tables.write_rows(folder / "audit_prompts.parquet", questions, Prompt)
    return {"audit_reward": 0.5 + index / 50, "audit_reward_initial": 0.5}


def build(run_dir: Path, rounds: int = 12, pairs: int = 40) -> Store:
    """A run of some rounds whose first one has hostile texts; the service ran in this process."""
    run_dir.mkdir(parents=True, exist_ok=True)
    store = Store(run_dir)
    store.open_run("tiny", {"run.seed": 0})
    store.record_policy(0, "initial", round=0)
    for index in range(1, rounds + 1):
        add_round(run_dir, store, index, pairs, hostile=index == 1, state="rejected" if index == 1 else "")
    policies = Policies(run_dir)
    manifest = Manifest(
        version=rounds, parent=0, round=rounds, beta=0.1, reference=0, reference_sha256=None, fingerprint="", packages={}, update={},
        files={}, canaries={},
    )  # fmt: skip
    policies.folder(rounds).mkdir(parents=True)
    folders.write_json(policies.folder(rounds) / folders.MANIFEST, dataclasses.asdict(manifest))
    policies.set_current(rounds)
    store.event("engine_restart", f"the generator died and was started again: {HOSTILE}", 2)
    store.event("warning", "prompts set aside: 3 × too long")
    store.answer(store.submit("pin", {"version": 2, "pinned": True}, "cli"), "done", "policy 2 is pinned")
    return store


class Progress:
    """What a daemon would say of itself."""

    def __init__(self) -> None:
        self.said: dict[str, Any] = {
            "state": "running", "why": "", "round": 13, "stage": "generate", "done": 64, "total": 192, "unit": "prompts",
            "text": "5.2 k tokens/s", "seconds": 12.5,
        }  # fmt: skip

    def __call__(self) -> dict[str, Any]:
        return dict(self.said)


def main(run_dir: Path, *overrides: str) -> None:
    from selfplay.web.access import read_token
    from selfplay.web.api import create_app
    from selfplay.web.server import serve_in_thread

    tables.leave_pandas_out()
    settings, progress = config(*overrides), Progress()
    app = create_app(run_dir, settings, progress, read_token(settings.service))
    server, port = serve_in_thread(app, settings.service)
    print(json.dumps({"port": port}), flush=True)
    store = Store(run_dir)
    for line in sys.stdin:
        word, _, rest = line.strip().partition(" ")
        if word == "round":
            add_round(run_dir, store, int(rest))
        elif word == "state":
            name, _, why = rest.partition(" ")
            progress.said = {"state": name, "why": why}
        elif word == "rss":
            pass
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        print(json.dumps({"did": line.strip(), "rss_mb": pages * 4096 / 1e6}), flush=True)
    server.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
