#!/usr/bin/env python
"""What gradient features cost, and what fewer layers cost in agreement: `python scripts/bench_features.py [--run-dir RUN]`.

For the policy and the pairs of a run's last round («tiny») and for a random Llama of hidden 512, 4 layers and 32k words
(«wide»), in batches of 16 pairs of like length, forward and backward, no optimizer, one thread:

    features   selfplay.methods.features, all layers: projected gradients of each pair
    plain      one forward and backward a batch, with weight gradients, the logits of the responses whole
    lean       the same with training's fused log-probabilities, no logits
    one        one backward a pair to the weights of the same layers, then the same projections (LESS); logits whole
    one-lean   the same with fused log-probabilities

`features` is held against `plain` in time and memory, and against `one` in pairs a second, after a check that its features
are those of `one`. Repeats are interleaved; memory is the peak resident set of a fork less that before its work.

Then the whole rounds of RUN, or of a run of the tiny world made for it (scripts/make_tiny.py first): the share of the
features in a round; and the features of the last round done again with fewer layers: time, and rank correlation of
closeness with that of all layers, beside the one that all layers have with themselves under another projection and other
clusters. One line a figure.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

BATCH, DIM, SEEDS, MEMORY_REPEATS = 16, 1024, 5, 3
Batch = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, help="a run whose depth follows gradients (default: one is made)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the run that is made (default: 3)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cases", nargs="*", choices=["tiny", "wide", "round"], default=["tiny", "wide", "round"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run_dir = args.run_dir
        if run_dir is None and set(args.cases) != {"wide"}:
            run_dir = Path(folder) / "run"
            make_run(run_dir, args.rounds)
        import torch

        torch.set_num_threads(1)
        for case in ("tiny", "wide"):
            if case in args.cases:
                step(case, *(of_run(run_dir) if case == "tiny" else wide()), args.repeats)
        if "round" in args.cases:
            rounds(run_dir, Path(folder), args.repeats)


def make_run(run_dir: Path, count: int) -> None:
    from selfplay.config import load
    from selfplay.reporting.terminal import Display
    from selfplay.rounds.round import run_round
    from selfplay.rounds.run import Run

    config = load(ROOT / "configs" / "tiny.yaml", ["depth.method=gradient", "evaluate.gate.win_rate_lower=0"])
    with Run(config, run_dir, Display()) as run:
        for _ in range(count):
            run_round(run)


# --- one batch --------------------------------------------------------------------------------------------------------


def of_run(run_dir: Path) -> tuple[Any, list[dict[str, Any]]]:
    """The policy that sampled the last round, and that round's kept base pairs."""
    from selfplay.models import weights
    from selfplay.training.depth_job import read_pairs

    folder, policy = last_round(run_dir)
    return weights.load(policy).eval(), read_pairs(folder / "pairs" / "pairs.parquet")


def wide() -> tuple[Any, list[dict[str, Any]]]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=32_768, hidden_size=512, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=False,
    )).eval()  # fmt: skip

    def ids(low: int, high: int) -> list[int]:
        found: list[int] = torch.randint(3, 32_768, (int(torch.randint(low, high, (1,))),)).tolist()
        return found

    return model, [
        {"prompt_ids": ids(12, 32), "chosen_ids": ids(8, 24), "rejected_ids": ids(8, 24)} for _ in range(BATCH)
    ]


def step(case: str, model: Any, pairs: list[dict[str, Any]], repeats: int) -> None:
    """Time and memory of each arm over the pairs, and how they compare."""
    import torch

    from selfplay.methods.features import PairGradients
    from selfplay.training.depth_job import batches, collate, tokens

    parts = batches([tokens(pair) for pair in pairs], BATCH)
    together = [collate([pairs[i] for i in part]) for part in parts]
    alone = [collate([pairs[i]]) for part in parts for i in part]

    def features() -> Any:
        with PairGradients(model, DIM, 0) as gradients:
            return torch.cat([gradients(batch, beta=0.1) for batch in together])

    gradients = PairGradients(model, DIM, 0)
    arms: dict[str, Callable[[], Any]] = {
        "features": features,
        "plain": lambda: backward(model, together, plain_logps),
        "lean": lambda: backward(model, together, fused_logps),
        "one": lambda: one_by_one(model, gradients.layers, alone, plain_logps),
        "one-lean": lambda: one_by_one(model, gradients.layers, alone, fused_logps),
    }
    ours, exact = features(), arms["one"]()
    error = float(((ours - exact).norm(dim=1) / exact.norm(dim=1)).max())
    assert error < 1e-4, error
    own, padded = (
        sum(int(f(batch)) for batch in together) for f in (attended, lambda batch: batch["input_ids"].numel())
    )
    print(f"{case}: {len(pairs)} pairs in {len(together)} batches, {own} tokens, {padded} with padding; "
          f"features equal those of one backward a pair to {error:.1e}", flush=True)  # fmt: skip
    growth: dict[str, list[float]] = {name: [] for name in arms}
    wall: dict[str, list[float]] = {name: [] for name in arms}
    cpu: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats):
        for name in [*arms][repeat % len(arms) :] + [*arms][: repeat % len(arms)]:
            before = time.perf_counter(), time.process_time()
            arms[name]()
            wall[name].append(time.perf_counter() - before[0])
            cpu[name].append(time.process_time() - before[1])
            if repeat < MEMORY_REPEATS:
                growth[name].append(memory(arms[name]))
    for name in arms:
        print(
            f"{case}: {name:8s} wall {spread(wall[name])} s, CPU {spread(cpu[name])} s, memory {spread(growth[name])} MB"
        )
    for unit, found in (("wall", wall), ("CPU", cpu)):
        median = {name: statistics.median(values) for name, values in found.items()}
        for other in ("plain", "lean"):
            ratio(f"{case}: {unit}, features / {other}", median["features"] / median[other], "≤", 1.0)
        for other in ("one", "one-lean"):
            ratio(f"{case}: pairs a {unit} second, features / {other}", median[other] / median["features"], "≥", 1.5)
    for other in ("plain", "lean"):
        used = statistics.median(growth["features"]) / statistics.median(growth[other])
        ratio(f"{case}: memory, features / {other}", used, "≤", 1.0)


def attended(batch: Batch) -> Any:
    return batch["attention_mask"].sum()


def response(batch: Batch) -> tuple[Any, Any]:
    """Mask (2B, R) over the positions that predict response tokens, and those tokens (N,)."""
    mask = batch["completion_mask"][:, 1:].bool()
    first = int(mask.any(dim=0).int().argmax())
    return mask[:, first:], batch["input_ids"][:, first + 1 :][mask[:, first:]]


def plain_logps(model: Any, batch: Batch) -> Any:
    """log π of the response tokens, from logits that exist whole."""
    from selfplay.methods.epsilon_dpo import chosen_logps

    mask, targets = response(batch)
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False,
        logits_to_keep=mask.size(1) + 1,
    ).logits  # fmt: skip
    return chosen_logps(logits[:, :-1][mask], targets)


def fused_logps(model: Any, batch: Batch) -> Any:
    """log π of the response tokens, as training makes them."""
    from selfplay.methods.epsilon_dpo import lean_logps

    mask = batch["completion_mask"][:, 1:].bool()
    targets = batch["input_ids"][:, 1:][mask]
    logp, _ = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False,
        at_head=lambda hidden, head: lean_logps(hidden[:, :-1][mask], head.weight, targets),
    )  # fmt: skip
    return logp


def losses(logp: Any, batch: Batch) -> Any:
    """Losses (B,) where the policy is its own reference."""
    from selfplay.methods.epsilon_dpo import pair_losses

    mask, _ = response(batch)
    chosen, rejected = mask_sum(logp - logp.detach(), mask).chunk(2)
    return pair_losses(chosen - rejected, 0.1 * (chosen * 0 + 1).detach())


def mask_sum(values: Any, mask: Any) -> Any:
    return values.new_zeros(mask.shape).masked_scatter(mask, values).sum(dim=1)


def backward(model: Any, batches: list[Batch], logps: Callable[[Any, Batch], Any]) -> None:
    """Forward and backward of each batch, with every weight gradient."""
    for batch in batches:
        model.zero_grad(set_to_none=True)
        losses(logps(model, batch), batch).mean().backward()
    model.zero_grad(set_to_none=True)


def one_by_one(model: Any, layers: dict[str, Any], alone: list[Batch], logps: Callable[[Any, Batch], Any]) -> Any:
    """Features (B, dim) from one backward a pair to the chosen weights."""
    import torch

    from selfplay.methods.features import projection

    weights = [layer.weight for layer in layers.values()]
    projections = [projection(0, name, tuple(layer.weight.shape), DIM) for name, layer in layers.items()]
    frozen = [p for p in model.parameters() if p.requires_grad and not any(p is w for w in weights)]
    for parameter in frozen:
        parameter.requires_grad_(False)
    rows = []
    for batch in alone:
        found = torch.autograd.grad(losses(logps(model, batch), batch).sum(), weights)
        rows.append(sum((left @ g @ right.T).flatten() for (left, right), g in zip(projections, found, strict=True)))
    for parameter in frozen:
        parameter.requires_grad_(True)
    return torch.stack(rows)


def memory(work: Callable[[], Any]) -> float:
    """MB by which the resident set of a fork grows at most while it works; 0 of what it keeps from before counts."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        work()  # what libraries keep from a first call is not the step's
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("VmRSS")
        work()
        os.write(writer, str(resident("VmHWM") - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader) as found:
        return float(found.read())


def resident(name: str) -> float:
    """A figure of /proc/self/status in MB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024


# --- whole rounds -----------------------------------------------------------------------------------------------------


def last_round(run_dir: Path) -> tuple[Path, Path]:
    """The folder of the last finished round, and the policy that sampled it."""
    from selfplay.storage.ledger import Store
    from selfplay.storage.policies import Policies

    store = Store(run_dir)
    row = [row for row in store.rounds() if row["state"] in ("promoted", "rejected")][-1]
    store.close()
    return run_dir / "rounds" / f"{row['round']:04d}", Path(Policies(run_dir).get(row["sampler"]).path)


def rounds(run_dir: Path, folder: Path, repeats: int) -> None:
    """The share of the features in whole rounds, and what fewer layers change."""
    from selfplay.storage.ledger import Store

    store = Store(run_dir)
    found = [(sum(store.seconds(r["round"]).values()), store.metrics(r["round"])) for r in store.rounds()]
    config = store.config(store.rounds()[-1]["round"])
    store.close()
    warm = [(total, metrics) for total, metrics in found if "depth/seconds_features" in metrics][1:]
    if not warm:
        sys.exit(f"{run_dir} has no second round whose depth followed gradients: depth.method=gradient, two rounds")
    print(f"round: wall {spread([t for t, _ in warm])} s over {len(warm)} warm rounds")
    parts = [sum(m[f"depth/seconds_{part}"] for part in ("load", "features", "cluster")) / t for t, m in warm]
    print(f"round: share of loading, features and clusters {spread([100 * p for p in parts])} %")
    alone = [m["depth/seconds_features"] / t for t, m in warm]
    print(f"round: share of features alone {spread([100 * p for p in alone])} %")
    ratio("round: share of loading, features and clusters", statistics.median(parts), "≤", 0.08)
    fewer_layers(run_dir, folder, config, repeats)


def fewer_layers(run_dir: Path, folder: Path, config: dict[str, Any], repeats: int) -> None:
    """Do the features of the last round again, with all layers and with fewer."""
    import numpy as np
    import pyarrow.parquet as pq

    from selfplay.methods import depth, features
    from selfplay.models import weights
    from selfplay.training.depth_job import features as do
    from selfplay.training.jobs import FeaturesJob, LoraJob

    round_folder, policy = last_round(run_dir)
    blocks = int(next(reversed(features.linear_layers(weights.load(policy)))).partition(".")[0]) + 1
    lora = config["train"]["lora"]
    kept = len(pq.read_table(round_folder / "depth" / "gradients.parquet", columns=["prompt_id"]))
    clusters = config["depth"]["clusters"] or max(1, round(kept**0.5))
    choices = {
        "all layers": None,
        **{f"last {n} of {blocks} blocks": n for n in sorted({blocks // 2, 1}) if n < blocks},
    }
    rows: dict[tuple[str, int], np.ndarray] = {}
    wall: dict[str, list[float]] = {name: [] for name in choices}
    cpu: dict[str, list[float]] = {name: [] for name in choices}

    def job(layers: int | None, seed: int) -> FeaturesJob:
        return FeaturesJob(
            pairs=round_folder / "pairs" / "pairs.parquet", policy=policy, reference=policy,
            out=folder / "gradients.parquet", dim=config["depth"]["dim"], layers=layers, clusters=clusters, seed=seed,
            micro_batch_pairs=config["train"]["micro_batch_pairs"], beta=config["train"]["beta"],
            lora=None if lora is None else LoraJob.model_validate(lora),
        )  # fmt: skip

    do(job(None, 0), lambda _: None)
    for repeat in range(max(repeats, SEEDS + 1)):
        for name, layers in choices.items():
            before = time.process_time()
            metrics = do(job(layers, repeat), lambda _: None)
            assert metrics is not None
            wall[name].append(metrics["seconds_features"] or 0.0)
            cpu[name].append(time.process_time() - before)
            column = pq.read_table(folder / "gradients.parquet")["feature"].combine_chunks()
            rows[name, repeat] = column.flatten().to_numpy().reshape(len(column), -1)
    for name in choices:
        print(f"{name}: features {spread(wall[name])} s wall; with loading and clusters {spread(cpu[name])} s CPU")
    every = "all layers"
    for name in [*choices][1:]:
        cost = statistics.median(cpu[name]) / statistics.median(cpu[every])
        print(f"{name}: CPU seconds / those of all layers {cost:.3f}")

    def agreement(name: str, seed: int, other: int) -> tuple[float, float]:
        """Rank correlation of closeness and correlation of the pairs' cosines, with all layers under a projection `other`."""
        a, b = rows[name, seed], rows[every, other]
        ours, theirs = depth.cluster(a, clusters, 0)[1], depth.cluster(b, clusters, 0)[1]
        above = np.triu_indices(len(a), 1)
        cosines = [(x / np.linalg.norm(x, axis=1, keepdims=True)) for x in (a, b)]
        pairs = [(x @ x.T)[above] for x in cosines]
        return depth.rank_correlation(ours, theirs), float(np.corrcoef(pairs)[0, 1])

    for name in choices:
        for which, step in (("the same projection", 0), ("another projection", 1)):
            found = [agreement(name, seed, seed + step) for seed in range(SEEDS)]
            print(f"{name}: closeness, rank correlation with all layers under {which} {spread([c for c, _ in found])}; "
                  f"cosines between pairs, correlation {spread([c for _, c in found])}")  # fmt: skip
    directions(rows[every, 0], clusters)


def directions(found: Any, clusters: int) -> None:
    """What there is for clusters to find in features (n, d) of all layers."""
    import numpy as np

    from selfplay.methods import depth

    unit = found / np.linalg.norm(found, axis=1, keepdims=True)
    cosines = (unit @ unit.T)[np.triu_indices(len(unit), 1)]
    print(f"cosines between pairs: mean {cosines.mean():.4f}, standard deviation {cosines.std():.4f}; of unrelated features "
          f"of this dimension 0 and {found.shape[1] ** -0.5:.4f}")  # fmt: skip
    starts = [depth.cluster(found, clusters, seed) for seed in range(SEEDS)]
    same = [depth.rank_correlation(a[1], b[1]) for a, b in itertools.pairwise(starts)]
    print(f"closeness, rank correlation between two starts of K-means {spread(same)}")
    for name, of in (
        ("closeness", lambda s: s[1]),
        ("closeness to the others", lambda s: depth.closeness_to_others(found, s[0])),
    ):
        by_size = [depth.rank_correlation(of(s), depth.sizes(s[0])) for s in starts]
        print(f"{name}: rank correlation with the size of the cluster {spread(by_size)}, mean "
              f"{spread([float(np.nanmean(of(s))) for s in starts])}")  # fmt: skip


def spread(values: list[float]) -> str:
    return f"median {statistics.median(values):.3f} (min {min(values):.3f}, max {max(values):.3f}, n {len(values)})"


def ratio(what: str, value: float, relation: str, target: float) -> None:
    met = value <= target if relation == "≤" else value >= target
    print(f"{what} {value:.3f} (target {relation} {target:g}: {'met' if met else 'MISSED'})", flush=True)


if __name__ == "__main__":
    main()
