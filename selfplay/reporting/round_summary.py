"""What happened in one round, as rows of words. A metric that was not measured is left out."""

from __future__ import annotations

from selfplay.reporting import gold, suites
from selfplay.reporting.words import NOT_INDEPENDENT, change, interval, join, number, verdict
from selfplay.types import RoundReport


def describe(report: RoundReport) -> list[tuple[str, str]]:
    """The rows of a round's table: the name of a row, and its numbers in words. A row without numbers is left out."""
    m = report.metrics
    parts = gold.parts(m)

    def some(name: str, form: str, words: str) -> str:
        """`words` with the metric in the place of {}; empty when it was not measured."""
        return words.format(number(m[name], form)) if name in m else ""

    dropped = [f"{m[name]:.0f} {name.removeprefix('pairs/dropped_')}" for name in sorted(m) if name.startswith("pairs/dropped_") and m[name]]  # fmt: skip
    rows = [
        ("candidates", join([
            some("generate/candidates", ".0f", "{}") + some("prompts/count", ".0f", " for {} prompts"),
            some("generate/length_mean", ".1f", "{} tokens"),
            some("generate/cut_off_share", ".1%", "{} cut off"),
            some("generate/duplicate_share", ".1%", "{} duplicates"),
        ])),
        ("reward", join([
            some("score/reward_mean", ".3f", "sampled {}"),
            f"held-out {change(m, 'evaluate/reward_champion', 'evaluate/reward')}" if "evaluate/reward" in m else "",
            some("score/missing", ".0f", "{} not scored") if m.get("score/missing") else "",
        ])),
        ("pairs", join([
            some("pairs/kept", ".0f", "{} kept") + some("pairs/base", ".0f", " of {}"),
            f"dropped: {', '.join(dropped)}" if dropped else "",
            some("depth/pairs", ".0f", "trained on {}"),
        ])),
        ("margins", join([
            some("pairs/explicit_margin", ".3f", "mean explicit {}") + some("pairs/base_explicit_margin", ".3f", " (all {})"),
            some("pairs/implicit_margin", ".3f", "implicit {}") + some("pairs/base_implicit_margin", ".3f", " (all {})"),
            some("pairs/potential", ".2f", "potential {}"),
        ])),
        ("β", join([
            change(m, "train/beta_start", "train/beta", ".4g"),
            some("train/loss", ".3f", "loss {}") + some("train/steps", ".0f", " after {} steps"),
        ])),
        ("update", join([
            some("train/update_relative_norm", ".2e", "relative norm {}"),
            some("train/share_changed", ".1%", "{} of the elements changed"),
        ])),
        ("win rate", join([
            interval(m),
            some("evaluate/win_rate_length_controlled", ".3f", "length-controlled {}"),
        ])),
        ("", NOT_INDEPENDENT if m.get("evaluate/independent") == 0 else ""),
        ("length, KL", join([
            some("evaluate/length_ratio", ".2f", "length ratio {}"),
            some("evaluate/kl_current", ".2f", "KL {} nats to current") + some("evaluate/kl_initial", ".2f", ", {} to initial"),
        ])),
        ("gold", join([
            f"{part} {told}" for part in parts if (told := change(m, *gold.champion_and_candidate(part)))
        ])),
        ("vs initial", join([
            some("evaluate/audit_win_rate", ".3f", "win rate {}"),
            some("evaluate/audit_gold_win_rate", ".3f", "by gold {}"),
            *(f"gold {part} {told}" for part in parts if (told := change(m, *gold.initial_and_candidate(part)))),
        ])),
        *((f"suite {name}", join([
            change(m, *suites.champion_and_candidate(name)),
            f"difference {interval(m, suites.difference(name))}",
        ])) for name in suites.names(m)),
        ("swap", join([
            some("promote/swap_seconds", ".3f", "{} s") + some("promote/first_token_seconds", ".3f", ", first new token after {} s"),
            some("promote/engine_start_seconds", ".1f", "engine start {} s"),
        ])),
        ("seconds", join([
            *(f"{stage} {seconds:.1f}" for stage, seconds in report.seconds.items()),
            f"total {sum(report.seconds.values()):.1f}" if report.seconds else "",
        ])),
        ("verdict", verdict(report.outcome, report.policy, report.reasons)),
    ]  # fmt: skip
    return [(name, text) for name, text in rows if text]
