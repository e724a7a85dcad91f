"""The command `selfplay`. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from selfplay.doctor.command import doctor
from selfplay.visible import filter_stderr, line, say, when

if TYPE_CHECKING:
    from selfplay.storage.ledger import Store

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Keeps aligning a language model by self-play. Start with `init`, then `check`, then `round` or `serve`.",
)  # fmt: skip

Config = Annotated[Path, typer.Option("--config", "-c", metavar="FILE", help="Configuration, a YAML file.")]
Set = Annotated[
    list[str],
    typer.Option("--set", metavar="A.B=C", help="Use this value instead of the configuration's; may be repeated."),
]
RunDir = Annotated[
    Path | None,
    typer.Option("--run-dir", metavar="FOLDER", help="Run folder; by default <run.dir>/<run.name> of the configuration."),
]  # fmt: skip
Source = Annotated[str, typer.Argument(metavar="FILE", help="A file, a folder or a glob, like prompts.source.")]
Column = Annotated[str | None, typer.Option(metavar="NAME", help="Column of the prompt, where it is not recognised.")]
Version = Annotated[int, typer.Argument(metavar="N", min=0, help="Number of a policy.")]
TINY = Path("configs/tiny.yaml")


def main() -> None:
    """Entry point: errors that a user can act on become two lines and an exit code."""
    from selfplay.errors import SelfplayError

    filter_stderr()
    try:
        app(prog_name="selfplay")
    except SelfplayError as error:
        _fail(str(error), error.hint, error.exit_code)
    except OSError as error:
        _fail(str(error), "see whether the file is there, and whether you may read and write it")
    except Exception as error:
        from selfplay.storage.ledger import LedgerError  # not before: it takes a third of a second

        if not isinstance(error, LedgerError):
            raise
        hint = "end what else works on it (a backup, a database shell), or restore it from a backup if it is damaged"
        _fail(f"the ledger does not answer: {error.orig}", hint)


def _fail(error: str, hint: str, code: int = 3) -> NoReturn:
    print(f"error: {error}", *([f"what to do: {hint}"] if hint else []), sep="\n", file=sys.stderr)
    sys.exit(code)


def _folder(config: Path, sets: list[str], run_dir: Path | None) -> Path:
    """The run folder that a command is about. Raises InputError where no run was started there."""
    from selfplay.config import load
    from selfplay.errors import InputError

    folder = run_dir or load(config, sets).run_dir
    if not (folder / "ledger.sqlite").is_file():
        why = "it has no ledger.sqlite" if folder.exists() else "it does not exist"
        raise InputError(
            f"{folder} is no run folder: {why}",
            "name the folder of a run with --run-dir, or its configuration with --config; `selfplay round` and "
            "`selfplay serve` start a run",
        )
    return folder


def _store(config: Path, sets: list[str], run_dir: Path | None) -> Store:
    from selfplay.storage.ledger import Store

    return Store(_folder(config, sets, run_dir))


@app.command()
def init(
    path: Annotated[Path, typer.Argument(metavar="[FILE]", help="YAML file to write.")] = Path("selfplay.yaml"),
    model: Annotated[str | None, typer.Option(help="The model to align: folder or Hub id of an instruct model.")] = None,
    reward: Annotated[str | None, typer.Option(help="A reward model, the URL of a reward server, or instructions, math, code.")] = None,
    prompts: Annotated[str | None, typer.Option(help="A file, a folder or a glob, or the id of a Hub dataset.")] = None,
    column: Column = None,
    preset: Annotated[str | None, typer.Option(help="Numbers to begin with: 0.5b, 8b-lora, 8b-full, 70b-lora.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:  # fmt: skip
    """Write a configuration for your model, reward, prompts and machine."""
    from selfplay.starting.command import run_init

    run_init(path, {"model": model, "reward": reward, "prompts": prompts}, column, preset, yes, force)


@app.command()
def check(
    config: Config = TINY, set_: Set = [], run_dir: RunDir = None,  # noqa: B006  typer wants a list
    test_webhook: Annotated[bool, typer.Option("--test-webhook", help="Also post a test alert to the webhook.")] = False,
    deep: Annotated[bool, typer.Option("--deep", help="Also do a round of four prompts, in a folder that is removed.")] = False,
) -> None:  # fmt: skip
    """See whether it would run here, and what a round would do."""
    from selfplay.checks.command import run_check
    from selfplay.rounds.command import leave

    code = run_check(config, set_, run_dir, test_webhook, deep)
    if deep:
        leave(code)
    raise typer.Exit(code)


app.command()(doctor)


@app.command("round")
def round_(
    config: Config = TINY, set_: Set = [], run_dir: RunDir = None,  # noqa: B006
    rounds: Annotated[int | None, typer.Option(metavar="N", help="Rounds that the run has at the end; by default one more than now.")] = None,
    report: Annotated[bool, typer.Option("--report", help="Write report.html and report.png at the end.")] = False,
) -> None:  # fmt: skip
    """Run one round, or finish one that was interrupted."""
    from selfplay.rounds.command import leave, run_rounds

    leave(run_rounds(config, set_, run_dir, rounds, report))


@app.command()
def serve(config: Config = TINY, set_: Set = [], run_dir: RunDir = None) -> None:  # noqa: B006
    """Run rounds on a schedule, with a page and an API."""
    from selfplay.rounds.command import leave
    from selfplay.web.serve import serve

    leave(serve(config, set_, run_dir))


@app.command()
def status(config: Config = TINY, set_: Set = [], run_dir: RunDir = None) -> None:  # noqa: B006
    """Say what the service does now."""
    from selfplay.reporting.status import lines

    store = _store(config, set_, run_dir)
    for text in lines(store, _serves((store.state("service") or {}).get("pid"))):
        say(line(text))
    store.close()


def _serves(pid: int | None) -> bool:
    """Whether this process is a service, and not another one that got the number of a service that was killed."""
    try:
        return b"serve" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


@app.command()
def rounds(
    last: Annotated[int, typer.Option(min=1, metavar="N", help="How many rounds, the newest.")] = 20,
    config: Config = TINY, set_: Set = [], run_dir: RunDir = None,  # noqa: B006
) -> None:  # fmt: skip
    """One line a round, for the newest rounds."""
    from selfplay.reporting.terminal import Display

    store = _store(config, set_, run_dir)
    Display().run_table(store, last)
    store.close()


@app.command()
def show(
    round_: Annotated[int, typer.Argument(metavar="N", min=1, help="Number of a finished round.")],
    config: Config = TINY, set_: Set = [], run_dir: RunDir = None,  # noqa: B006
) -> None:  # fmt: skip
    """Show one round: its figures, and what happened in it."""
    from selfplay.errors import InputError
    from selfplay.reporting.terminal import Display
    from selfplay.rounds.round import report

    store = _store(config, set_, run_dir)
    is_open = store.unfinished()
    finished = store.last_round() if is_open is None else is_open["round"] - 1
    if round_ > finished:
        running = is_open is not None and round_ == is_open["round"]
        raise InputError(
            f"round {round_} is not finished" if running else f"there is no round {round_}",
            f"finished: 1 to {finished}" if finished else "none is finished yet",
        )
    Display().round_table(report(store, round_))
    for event in store.events(round_):
        say(line(f" {when(event['time'])} {event['kind']}: {event['text']}"))
    store.close()


@app.command()
def answers(
    prompts: Annotated[int, typer.Option(min=1, metavar="N", help="How many audit prompts.")] = 5,
    start: Annotated[int, typer.Option("--from", min=0, metavar="N", help="Number of the first of them, from 0.")] = 0,
    rounds: Annotated[str, typer.Option(metavar="A,B", help="Rounds with an audit; by default the newest that fit.")] = "",
    config: Config = TINY, set_: Set = [], run_dir: RunDir = None,  # noqa: B006
) -> None:  # fmt: skip
    """Show what policies say to the audit prompts, and what is new in it."""
    from selfplay.errors import InputError
    from selfplay.reporting.answers import read
    from selfplay.reporting.terminal import Display

    if not re.fullmatch(r"(\d+(,\d+)*)?", rounds):
        raise InputError(f"--rounds {rounds}: not numbers of rounds", "give them with commas between, such as 4,8")
    store, display = _store(config, set_, run_dir), Display()
    chosen = sorted({int(index) for index in rounds.split(",")}) if rounds else None
    fit = display.fitting_columns
    display.answers(read(store, store.path.parent, columns=fit, rounds=chosen, start=start, prompts=prompts))
    store.close()


def _orders(given: list[tuple[str, dict[str, Any]]], config: Path, sets: list[str], run_dir: Path | None) -> None:
    """Leave orders in the ledger. Where a service runs, wait for it and print what became of them. Exit code 2: one is refused."""
    import time

    from selfplay.service.orders import submit

    store = _store(config, sets, run_dir)
    waiting = [submit(store, kind, arguments, "cli") for kind, arguments in given]
    there = _serves((store.state("service") or {}).get("pid"))
    deadline = time.monotonic() + (5 if there else 0)
    refused = False
    while waiting and time.monotonic() < deadline:
        if waiting[0] in {row["id"] for row in store.pending()}:
            time.sleep(0.1)
            continue
        row = store.order(waiting[0])
        say(line(f"order {waiting.pop(0)} {row['state']}: {row['result']}"))
        refused |= row["state"] != "done"
    store.close()
    for number in waiting:
        say(f"order {number} waits: a running service carries it out, some orders only between two rounds")
    if refused:
        raise typer.Exit(2)


@app.command("take-over")
def take_over(config: Config = TINY, set_: Set = [], run_dir: RunDir = None) -> None:  # noqa: B006
    """Say that nobody else works in a run folder that is a copy, or whose runner was on another machine."""
    from selfplay.rounds.command import take_over

    take_over(config, set_, _folder(config, set_, run_dir))


@app.command()
def pause(
    after: Annotated[str, typer.Option(metavar="WHAT", help="`stage` or `round`: what is finished first.")] = "round",
    config: Config = TINY, set_: Set = [], run_dir: RunDir = None,  # noqa: B006
) -> None:  # fmt: skip
    """Pause the service when the round, or the stage, is finished."""
    _orders([("pause", {"after": after})], config, set_, run_dir)


@app.command()
def resume(config: Config = TINY, set_: Set = [], run_dir: RunDir = None) -> None:  # noqa: B006
    """End a pause of the service."""
    _orders([("resume", {})], config, set_, run_dir)


@app.command("run-now")
def run_now(config: Config = TINY, set_: Set = [], run_dir: RunDir = None) -> None:  # noqa: B006
    """Start a round now, whatever the schedule says."""
    _orders([("run", {})], config, set_, run_dir)


@app.command()
def cancel(config: Config = TINY, set_: Set = [], run_dir: RunDir = None) -> None:  # noqa: B006
    """Give up the unfinished round; the current policy stays."""
    _orders([("cancel", {})], config, set_, run_dir)


@app.command()
def rollback(version: Version, config: Config = TINY, set_: Set = [], run_dir: RunDir = None) -> None:  # noqa: B006
    """Make an earlier policy the current one."""
    _orders([("rollback", {"version": version})], config, set_, run_dir)


@app.command()
def pin(
    version: Version,
    off: Annotated[bool, typer.Option("--off", help="End this: retention decides about it again.")] = False,
    config: Config = TINY, set_: Set = [], run_dir: RunDir = None,  # noqa: B006
) -> None:  # fmt: skip
    """Keep the weights of a policy, whatever `retention` says."""
    _orders([("pin", {"version": version, "pinned": not off})], config, set_, run_dir)


@app.command()
def prompts(
    source: Source, column: Column = None,
    model: Annotated[str | None, typer.Option(metavar="MODEL", help="Folder or Hub id of a policy: lengths in its tokens.")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", metavar="FILE", help="Configuration whose `prompts` and policy are used.")] = None,
    set_: Set = [],  # noqa: B006
) -> None:  # fmt: skip
    """Show what is read of a file of prompts: format, counts, lengths, examples."""
    from selfplay.config import load
    from selfplay.prompts.preview import shown
    from selfplay.reporting.terminal import Display

    Display().note("\n".join(shown(source, column, model, None if config is None else load(config, set_))))


@app.command("add-prompts")
def add_prompts(
    file: Source, column: Column = None,
    config: Config = TINY, set_: Set = [], run_dir: RunDir = None,  # noqa: B006
) -> None:  # fmt: skip
    """Add prompts of a file to those that later rounds draw from."""
    from selfplay.prompts.adding import rows_of
    from selfplay.prompts.formats import Reading
    from selfplay.service.orders import MAX_PROMPTS

    rows, said = rows_of(file, Reading(prompt=column))
    say(said)
    starts = range(0, len(rows), MAX_PROMPTS)
    _orders([("add_prompts", {"rows": rows[at : at + MAX_PROMPTS]}) for at in starts], config, set_, run_dir)


@app.command()
def reload(config: Config = TINY, set_: Set = [], run_dir: RunDir = None) -> None:  # noqa: B006
    """Let the service read its configuration file again."""
    _orders([("reload", {})], config, set_, run_dir)


@app.command()
def report(config: Config = TINY, set_: Set = [], run_dir: RunDir = None) -> None:  # noqa: B006
    """Write report.html and report.png into the run folder."""
    from selfplay.reporting.report import main as write

    raise typer.Exit(write([str(_folder(config, set_, run_dir))]))


@app.command()
def export(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="`pairs` or `policy`.")],
    out: Annotated[Path | None, typer.Argument(metavar="[FOLDER]", help="Folder to make.")] = None,
    version: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Policy to export; by default the current one.")
    ] = None,
    push: Annotated[str | None, typer.Option(metavar="REPO", help="Repository on the Hub for a policy; the token is in HF_TOKEN.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a repository that everybody can read.")] = False,
    config: Config = TINY, set_: Set = [], run_dir: RunDir = None,  # noqa: B006
) -> None:  # fmt: skip
    """Write pairs as a dataset for TRL, or a policy as a model.

    The folder gets a card that says where its content comes from. Nothing that exists already is written over.
    """
    from selfplay.publishing.command import run_export

    run_export(_folder(config, set_, run_dir), what, out, version, push, public)


if __name__ == "__main__":
    main()
