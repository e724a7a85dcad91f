"""The child that opens a run (`python -m selfplay.prompts.importer`): reads and renders prompts, splits them, imports policy 0.

A process of its own because it needs a tokenizer and the initial model, which the controller never loads. Orders:

    {"order": "import", "config": …, "template": …, "out": folder, "work": folder}
                                                                      the pool and what policy 0 needs
    {"order": "render", "policy": folder, "trust_remote_code": …, "template": …, "conversations": […]}
                                                                      token ids of each, or why it has none
    {"order": "encode", "policy": folder, "trust_remote_code": …, "texts": […]}     token ids of each

`template` is what conversations are rendered with (`PolicyConfig.template`). The import reads its sources twice (`survey.py`,
`parts.py`), in as many processes as the importer may use processors. Its progress is {"text", "done", "total"}. Finished parts
stay in `work` until the pool is whole. What it says of an import are events, as [kind, text].
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selfplay import seeds
from selfplay.config import Config
from selfplay.errors import SelfplayError
from selfplay.models import initial
from selfplay.models.rendering import Renderer, Template, load_tokenizer, run_encode, run_render
from selfplay.processes.protocol import protocol, quick_imports
from selfplay.prompts import parts, pool, references, sealing
from selfplay.prompts import survey as surveys
from selfplay.prompts.draw import subset
from selfplay.prompts.files import copies
from selfplay.prompts.files.part import all_parts
from selfplay.prompts.files.sources import files_of, is_local
from selfplay.prompts.formats import Reading
from selfplay.prompts.orders import Orders
from selfplay.prompts.workers import cores
from selfplay.storage import folders, hashes, seals, tables
from selfplay.types import Split

INITIAL = "initial.json"
CANARY_TOKENS = 64
FORMAT = 4  # of a part: another number, and parts that were written before are made again

OnProgress = Callable[[str, int, int], None]
"""What is done, how much of it, and of how much."""


def survey(config: Config, workers: int | None = None) -> surveys.Survey:
    """What the files of prompts hold, without rendering any. Raises InputError."""
    sources = {
        split: all_parts(source, Reading.of(config.prompts), config.prompts.split, config.prompts.config)
        for split, source in _sources(config).items()
    }
    return surveys.survey(config, sources, workers or cores())


def _sources(config: Config) -> dict[Split, str]:
    """The files or datasets that prompts are read from, by what their prompts are for."""
    given: dict[Split, str | None] = {
        "train": config.prompts.source, "heldout": config.prompts.heldout, "audit": config.prompts.audit,
    }  # fmt: skip
    return {split: source for split, source in given.items() if source is not None}


def import_pool(
    config: Config,
    render: parts.Render,
    out: Path,
    work: Path,
    *,
    about: object = None,
    workers: int | None = None,
    on_progress: OnProgress = lambda text, done, total: None,
    on_recognised: Callable[[str], None] = lambda said: None,
) -> tuple[Counter[str], Counter[str]]:
    """Read, split and render all prompts, and make their pool in the folder `out`. Raises InputError.

    `work`: where finished parts are kept; the next call goes on with them where it has the same sources and settings, and
    says the same `about` what renders. `on_recognised` is told what each source is, in words. Returns how many prompts each
    split has, and how many rows were set aside for what.
    """
    workers = workers or cores()
    settings, seed = config.prompts, config.run.seed
    folder = _work_folder(config, work, about)
    reading = Reading.of(settings)
    sources = {
        split: copies.in_parts(source, reading, settings.split, settings.config, folder / f"source-{i}", workers)
        for i, (split, source) in enumerate(_sources(config).items())
    }
    found = surveys.survey(config, sources, workers, lambda n, of: on_progress("reading", n, of))
    for said in found.recognised:
        on_recognised(said)
    made = parts.make(
        found.chosen, settings, seed, render, folder, workers, lambda n, of: on_progress("rendering", n, of)
    )
    splits, set_aside = Counter[str](), Counter(found.set_aside)
    for part in made:
        splits.update(part.counts)
        set_aside.update(part.set_aside)
    surveys.require_both_sides(splits, set_aside)
    pool.assemble(out, made)
    Orders(seed, out / pool.ORDERS).order(0, pool.Pool(out).training()[0])
    return splits, set_aside


def _work_folder(config: Config, work: Path, about: object) -> Path:
    """Where the parts of these sources and settings are kept; parts of others are deleted."""
    settings = config.prompts
    found = [files_of(source, settings.split, settings.config) for source in _sources(config).values()]
    paths = [path for source in found if source is not None for path in source.paths]
    paths += [path for path in map(Path, settings.benchmarks) if path.is_file()]
    stats = [(str(path), s.st_size, s.st_mtime_ns, s.st_ino) for path in paths for s in [path.stat()]]
    read_by = [references.which(references.readers(config, held_out=held_out)) for held_out in (False, True)]
    key = json.dumps([FORMAT, config.fixed(), stats, about, read_by], sort_keys=True, default=str)
    folder = work / hashlib.sha256(key.encode()).hexdigest()[:16]
    for other in work.iterdir() if work.is_dir() else ():
        if other != folder:
            shutil.rmtree(other)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def canary_ids(prompts: pool.Pool, config: Config, vocabulary: int) -> list[list[int]]:
    """The fixed sequences of a run: held-out prompts, cut to 64 tokens, at least 8 tokens each."""
    kept_apart = [*prompts.ids("heldout"), *prompts.ids("audit")]
    rows = prompts.read(subset(kept_apart, config.swap.canaries, config.run.seed, "canary"))
    filler = [seeds.derive(config.run.seed, "canary", i) % vocabulary for i in range(8)]
    return [(p.prompt_ids + filler[: max(0, 8 - len(p.prompt_ids))])[:CANARY_TOKENS] for p in rows]


def run_import(config: Config, template: Template, out: Path, work: Path, on_progress: OnProgress) -> dict[str, Any]:
    """Write the pool and what the manifest of policy 0 needs to `out`; returns counts."""
    policy = initial.prepare(config.policy, out / pool.POLICY)
    tokenizer = load_tokenizer(policy.folder, config.policy.trust_remote_code)
    if all(map(is_local, _sources(config).values())):  # the loader of a Hub dataset may need it
        tables.leave_pandas_out()
    about = _renders(policy.folder)
    if dated := template.prints_date(tokenizer):  # what was rendered on another day is rendered anew
        about["today"] = template.today.isoformat()
    recognised: list[str] = []
    splits, set_aside = import_pool(
        config, Renderer(tokenizer, template), out, work, about=about, on_progress=on_progress,
        on_recognised=recognised.append,
    )  # fmt: skip
    on_progress("canaries of the initial policy", 0, 1)
    import torch  # after the workers were forked

    from selfplay.models import weights

    ids = canary_ids(pool.Pool(out), config, len(tokenizer))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, config.policy.dtype)
    if policy.adapter is not None:
        on_progress("the adapter is merged with its base", 0, 1)
        initial.merge(policy, dtype, config.policy.trust_remote_code)
    model = weights.load(policy.folder, dtype, config.policy.trust_remote_code)
    logps = weights.sequence_logps(model.to(device).eval(), ids)
    folders.write_json(
        out / INITIAL,
        {"source": str(policy.source), "canaries": {"token_ids": ids, "logps": logps}, "set_aside": dict(set_aside)},
    )
    sealing.seal(out)
    shutil.rmtree(work)
    return {"prompts": dict(splits), "set_aside": dict(set_aside), "dated": dated,
            "said": [*(("import", said) for said in [policy.said] if said),
                     *(("import", f"prompts: {said}") for said in recognised),
                     *(("repaired", said) for said in seals.repairs())]}  # fmt: skip


def _renders(policy: Path) -> dict[str, str]:
    """What decides on the token ids of a conversation: the files of the policy that are no weights, and the libraries."""
    import tokenizers
    import transformers

    files = [
        p for p in sorted(policy.iterdir()) if p.is_file() and p.suffix in (".json", ".jinja", ".txt", ".model", ".py")
    ]
    found = dict(zip([p.name for p in files], hashes.sha256_of(files), strict=True))
    return {**found, "transformers": transformers.__version__, "tokenizers": tokenizers.__version__}


def main() -> None:
    channel = protocol()
    # The importer has processes of its own, and those a tokenizer each.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with quick_imports():
        import transformers.models.auto  # noqa: F401
    channel.ready()
    for order in channel.orders():

        def progress(text: str, done: int, total: int, order: Any = order) -> None:
            channel.progress(order, text=text, done=done, total=total)

        try:
            if order["order"] == "render":
                channel.result(order, run_render(order))
            elif order["order"] == "encode":
                channel.result(order, run_encode(order))
            else:
                config = Config.model_validate(order["config"])
                template = Template.read(order["template"])
                channel.result(order, run_import(config, template, Path(order["out"]), Path(order["work"]), progress))
        except SelfplayError as error:
            channel.error(order, "input", str(error), error.hint)
        except Exception as error:  # the boundary: the controller hears of whatever it is
            traceback.print_exc()
            channel.error(order, "internal", f"{type(error).__name__}: {error}", "the importer's log has the traceback")


if __name__ == "__main__":
    main()
