"""Say what a run has changed: the initial policy and the last promoted one on the same prompts.

    python scripts/compare_answers.py runs/smollm2 [--show 4]
    python scripts/compare_answers.py runs/smollm2 --file benchmarks/ifeval.jsonl [--max-tokens 512]

The prompts need constraints (`instruction_id_list`, `kwargs`). Without `--file` they are those of the audit set, and nothing is
sampled: the answers are those that the evaluation kept, so the run needs `evaluate.audit_every`. With `--file` an engine has both
policies answer its prompts greedily; nothing may work on the run meanwhile, and nothing is kept. Intervals are paired
bootstrap intervals over prompts (95 %). Exit code 2 for a run without such answers, and for a file that cannot be asked.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from reward.instructions import constraints, follows
from selfplay.errors import InputError, SelfplayError
from selfplay.methods import gate
from selfplay.prompts.pool import Pool
from selfplay.reporting.history import Round, read
from selfplay.storage import tables
from selfplay.storage.ledger import Store
from selfplay.types import Candidate, Prompt, Scored
from selfplay.visible import visible

SAMPLES, CONFIDENCE = 2000, 0.95
Answer = Scored | Candidate


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Two policies' answers to the same prompts, (N,) each."""

    where: str
    """What prompts these are, and who answers."""
    prompts: list[Prompt]
    initial: Sequence[Answer]
    trained: Sequence[Answer]
    perplexity: float | None = None
    """Of the initial policy on what the trained one says, where that was measured."""


def load(run_dir: Path) -> Compared:
    """The audit of the last promoted round, or of the last round that has one. Raises InputError."""
    run = read(run_dir)
    folders = {r.index: run_dir / "rounds" / f"{r.index:04d}" / "evaluate" for r in run.rounds}
    audited = [r for r in run.rounds if (folders[r.index] / "audit_initial.parquet").is_file()]
    if not audited:
        raise InputError(f"{run_dir} has no round with an audit", "set evaluate.audit_every to 1 and run a round")
    chosen = ([r for r in audited if r.state == "promoted"] or audited)[-1]
    folder = folders[chosen.index]
    trained = tables.read_rows(folder / "audit.parquet", Scored)
    prompts = Pool(run_dir / "pool").read([answer.prompt_id for answer in trained])
    if not all(prompt.reference for prompt in prompts):
        raise InputError(f"the prompts of {run_dir} have no constraints", "compare runs with instruction prompts")
    initial = tables.read_rows(folder / "audit_initial.parquet", Scored)
    where = f"the audit set: the initial policy, and the candidate of round {chosen.index}"
    if chosen.state != "promoted":
        where += "\nno candidate with an audit was promoted: this one is the last, and it does not serve"
    found = initial_perplexity(folder, chosen)
    return Compared(where=where, prompts=prompts, initial=initial, trained=trained, perplexity=found)


def asked(run_dir: Path, file: Path, max_tokens: int) -> Compared:
    """What both policies answer to the prompts of a file now. Raises InputError."""
    from rich.console import Console

    from selfplay.config import Config
    from selfplay.generation.generator import Sampling
    from selfplay.generation.sampling import Request, ask
    from selfplay.prompts import suites
    from selfplay.reporting.terminal import Display
    from selfplay.rounds.run import Run

    if max_tokens < 1:
        raise InputError(f"--max-tokens {max_tokens}: at least 1")
    rows = suites.read(file)
    for number, row in enumerate(rows, 1):
        try:
            constraints(row.reference)
        except ValueError as error:
            raise InputError(f"{file}, row {number}: {error}") from None
    if (last := read(run_dir).rounds[-1:]) == []:
        raise InputError(f"{run_dir} has no round", "run one, and compare then")
    with contextlib.closing(Store(run_dir)) as store:
        config = Config.model_validate(store.config(last[0].index))
    display = Display(Console(stderr=True))
    with Run(config, run_dir, display) as run:
        prompts = []
        for number, (row, ids) in enumerate(zip(rows, run.render([row.messages for row in rows]), strict=True), 1):
            if isinstance(ids, str):
                raise InputError(f"{file}, row {number} {ids}")
            prompts.append(dataclasses.replace(row, prompt_ids=ids))
        longest = max(config.prompts.max_tokens, *(len(prompt.prompt_ids) for prompt in prompts))
        room = longest + max(config.generate.max_tokens, max_tokens) + 1
        room = max(room, config.generate.engine.max_model_len or 0)
        engine = config.generate.engine.model_copy(update={"max_model_len": room})
        run.reconfigure(config.model_copy(update={"generate": config.generate.model_copy(update={"engine": engine})}))
        policies = [run.policy(0), run.current]
        with tempfile.TemporaryDirectory() as there:
            requests = [
                Request(
                    rows=prompts,
                    policy=policy,
                    seed=lambda prompt_id: 0,
                    shards=Path(there) / str(policy.version),
                    max_tokens=max_tokens,
                    sampling=Sampling(temperature=0),
                )
                for policy in policies
            ]
            with display.stage(None, "answers", len(prompts) * len(policies), "answers") as line:
                before, after = ask(
                    run.serving.engine,
                    requests,
                    shard_prompts=config.generate.shard_prompts,
                    on_progress=lambda done: line.update(done=done),
                )
    where = f"{file}: policies 0 and {policies[1].version}, greedy, up to {max_tokens} tokens"
    return Compared(where=where, prompts=prompts, initial=before, trained=after)


def followed(prompts: Sequence[Prompt], answers: Sequence[Answer], *, loose: bool) -> list[list[bool]]:
    """For each answer whether it follows each constraint of its prompt."""
    return [
        follows(p.reference, p.messages[-1]["content"], a.text, loose=loose)
        for p, a in zip(prompts, answers, strict=True)
    ]


def repeated(token_ids: Sequence[int], n: int) -> float:
    """Share of the n-grams of an answer that it has said before; 0 for an answer without n-grams."""
    return 1 - gate.distinct_n([token_ids], n) if len(token_ids) >= n else 0.0


def perplexity(logps: Sequence[float], tokens: Sequence[int]) -> float:
    """Of a policy on answers whose log-probabilities (nats) it has told."""
    return math.exp(-sum(logps) / sum(tokens))


def table(found: Compared) -> list[tuple[str, float, float, str]]:
    """(what, before, after, difference) of each figure."""
    sides = (found.initial, found.trained)
    lines: list[tuple[str, float, float, str]] = []

    def paired(what: str, before: Sequence[float], after: Sequence[float]) -> None:
        change = np.subtract(after, before)
        low, high = gate.bootstrap(change, SAMPLES, CONFIDENCE, 0)
        text = f"{change.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
        lines.append((what, float(np.mean(before)), float(np.mean(after)), text))

    for loose in (False, True):
        kept = [followed(found.prompts, side, loose=loose) for side in sides]
        name = "loose" if loose else "strict"
        paired(f"{name}: all constraints", *([float(all(row)) for row in side] for side in kept))
        paired(f"{name}: share of constraints", *([float(np.mean(row)) for row in side] for side in kept))
    paired("tokens an answer", *([float(a.n_tokens) for a in side] for side in sides))
    paired("cut off", *([float(a.finish_reason == "length") for a in side] for side in sides))
    for n in (2, 4):
        paired(f"{n}-grams said before", *([repeated(a.token_ids, n) for a in side] for side in sides))
    before, after = (gate.distinct_n([a.token_ids for a in side]) for side in sides)
    lines.append(("distinct 2-grams of all answers", before, after, f"{after / before - 1:+.1%}" if before else ""))
    if found.perplexity is not None:
        before, after = (
            perplexity([a.logp for a in found.initial], [a.n_tokens for a in found.initial]),
            found.perplexity,
        )
        lines.append(("initial policy's perplexity", before, after, f"{after / before - 1:+.1%}"))
    return lines


def initial_perplexity(folder: Path, of: Round) -> float:
    """Of the initial policy on what the trained one answers to the prompts of the gate, where the evaluation scored them:
    log π₀(y) is on average log π(y) less the KL that it measured."""
    answers = tables.read_rows(folder / "candidate.parquet", Scored)
    kl = of.metrics["evaluate/kl_initial"]
    return perplexity([a.logp - kl for a in answers], [a.n_tokens for a in answers])


def by_constraint(found: Compared) -> list[tuple[str, int, float, float]]:
    """(instruction id, how many, share followed before, and after), strictly."""
    rows: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    both = (followed(found.prompts, side, loose=False) for side in (found.initial, found.trained))
    for prompt, before, after in zip(found.prompts, *both, strict=True):
        for (name, _), kept in zip(constraints(prompt.reference), zip(before, after, strict=True), strict=True):
            rows[name].append(kept)
    shares = {name: np.mean(kept, axis=0) for name, kept in rows.items()}
    return [(name, len(rows[name]), float(shares[name][0]), float(shares[name][1])) for name in sorted(rows)]


def show(found: Compared, count: int) -> None:
    """Print the comparison, and some answers side by side: prompts on which the two differ come first."""
    print(f"{len(found.prompts)} prompts of {found.where}")
    print(f"{'':<30}{'before':>9}{'after':>9}  difference")
    for what, before, after, change in table(found):
        print(f"{what:<30}{before:>9.3f}{after:>9.3f}  {change}")
    print(f"\n{'constraint (strict)':<50}{'answers':>8}{'before':>8}{'after':>8}")
    for name, number, before, after in by_constraint(found):
        print(f"{name:<50}{number:>8}{before:>8.2f}{after:>8.2f}")
    first, last = (followed(found.prompts, side, loose=False) for side in (found.initial, found.trained))
    order = sorted(range(len(found.prompts)), key=lambda i: all(first[i]) == all(last[i]))
    for i in order[:count]:
        print(f"\n=== {visible(found.prompts[i].messages[-1]['content'])}")
        for name, answer, kept in (("before", found.initial[i], first[i]), ("after", found.trained[i], last[i])):
            print(f"--- {name} ({sum(kept)} of {len(kept)} constraints)\n{visible(answer.text)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, help="folder of a run, such as runs/smollm2")
    parser.add_argument("--show", type=int, default=4, help="prompts whose answers are printed (default: %(default)s)")
    parser.add_argument("--file", type=Path, help="prompts in the format of IFEval, which both policies answer now")
    parser.add_argument("--max-tokens", type=int, default=512, help="of such an answer (default: %(default)s)")
    options = parser.parse_args()
    try:
        if options.file is None:
            found = load(options.run_dir)
        else:
            found = asked(options.run_dir, options.file, options.max_tokens)
        show(found, options.show)
    except SelfplayError as error:
        print(f"compare_answers: {error}" + (f"\n  {error.hint}" if error.hint else ""), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
