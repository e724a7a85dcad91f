"""Build the tiny world: a policy and reward models from scratch, train and held-out prompts. No downloads.

    python scripts/make_tiny.py [--out .cache/tiny] [--size full|mini] [--seed 0]

`selfplay.worlds.tiny.builder` says how it is built. The world lies under a hash of its recipe (constants, seed, sources,
library versions), so the same call again returns at once. It is written beside its place and then renamed, and `current`
points to it.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from selfplay.worlds.tiny.builder.build import Event, build, read_world, sweep
from selfplay.worlds.tiny.builder.recipe import SIZES, recipe_hash


def show(events: Iterator[Event]) -> None:
    """Print progress: on a terminal a bar for each stage, elsewhere a plain line when a stage ends."""
    if sys.stdout.isatty():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description:<18}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns) as bars:
            known: dict[str, Any] = {}
            for event in events:
                stage = event["stage"]
                if stage not in known:
                    known[stage] = bars.add_task(stage, total=event["total"], note="")
                note = f"loss {event['loss']:.3f}" if "loss" in event else ""
                bars.update(known[stage], completed=event["done"], note=note)
        return
    started = time.monotonic()
    for event in events:
        if event["done"] == event["total"]:
            note = f", loss {event['loss']:.3f}" if "loss" in event else ""
            print(
                f"  {event['stage']}: {event['total']} of {event['total']}{note} ({time.monotonic() - started:.0f} s)",
                flush=True,
            )


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Build the tiny world: policy, reward model, prompts. Cached by a hash of its recipe."
    )
    parser.add_argument("--out", type=Path, default=Path(".cache/tiny"), help="folder of worlds (default: .cache/tiny)")
    parser.add_argument("--size", choices=sorted(SIZES), default="full", help="full (the demo) or mini (the tests)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default: 0)")
    options = parser.parse_args()
    recipe = replace(SIZES[options.size], seed=options.seed)
    name = recipe_hash(recipe)
    out = options.out.resolve()
    target = out / name
    try:
        if read_world(target) is not None:
            print(f"tiny world {name} is there already: {target}")
        else:
            sweep(out)
            print(
                f"building tiny world {name} (size {options.size}, seed {options.seed}, worker processes: {recipe.workers})",
                flush=True,
            )
            build(recipe, target, show)
            world = read_world(target)
            assert world is not None
            print(f"built in {world['wall_seconds']:.0f} s ({world['cpu_seconds']:.0f} CPU seconds): {target}")
        link = out / f".current.{os.getpid()}"
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        link.rename(out / "current")
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind, the same command starts again", file=sys.stderr)
        return 130
    except (OSError, RuntimeError) as error:
        print(f"make_tiny: the tiny world could not be built in {out}: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
