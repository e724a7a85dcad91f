"""What `/metrics` tells Prometheus: read from the ledger at each scrape, so nothing is lost when the service restarts."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from selfplay.config import GuardConfig, Limits
from selfplay.reporting import suites
from selfplay.storage import figures, paging
from selfplay.storage.ledger import RESTARTS
from selfplay.web.view import View

LONGEST_WHY = 200  # characters of a reason in a label
STATES = ("starting", "running", "waiting", "paused", "retrying", "ended", "stopped")
# name, what it is, label, and the ledger's metric for each value of the label
GAUGES: list[tuple[str, str, str, dict[str, str]]] = [
    ("tokens_per_second", "Tokens sampled a second", "stage", {"generate": "generate/tokens_per_second"}),
    ("reward", "Mean reward: of sampled candidates; of held-out answers of champion and candidate", "answers", {"sampled": "score/reward_mean", "champion": "evaluate/reward_champion", "candidate": "evaluate/reward"}),
    ("margin", "Mean margin of the pairs kept: explicit in reward units, implicit in nats a token", "kind", {"explicit": "pairs/explicit_margin", "implicit": "pairs/implicit_margin"}),
    ("potential", "Mean alignment potential of the pairs kept, in standard deviations", "pairs", {"kept": "pairs/potential"}),
    ("pairs", "Pairs of a round: base pairs, those kept, those trained on", "pairs", {"base": "pairs/base", "kept": "pairs/kept", "trained": "depth/pairs"}),
    ("beta", "β of ε-DPO", "at", {"start": "train/beta_start", "end": "train/beta"}),
    ("win_rate", "Share of held-out prompts where the candidate wins (ties half), with its interval", "bound", {"mean": "evaluate/win_rate", "low": "evaluate/win_rate_low", "high": "evaluate/win_rate_high"}),
    ("kl_nats", "Estimated KL of the candidate policy, nats an answer", "to", {"current": "evaluate/kl_current", "initial": "evaluate/kl_initial"}),
    ("guard", "Signs that the reward or the answers go wrong, by their names in the section guard of the configuration", "sign", {name: f"guard/{name}" for name, field in GuardConfig.model_fields.items() if field.annotation is Limits}),
    ("length_ratio", "Mean answer length of the candidate over the champion's", "answers", {"heldout": "evaluate/length_ratio"}),
]  # fmt: skip


class RunCollector(Collector):
    """The run as Prometheus metrics; gauges hold the newest value of the last rounds."""

    def __init__(self, view: View) -> None:
        self._view = view

    def collect(self) -> Iterator[Metric]:
        run, store = self._view.summary(), self._view.store
        happened, spent = store.totals("events"), store.totals("stages")
        latest = figures.latest(store, [metric for *_, metrics in GAUGES for metric in metrics.values()])
        yield InfoMetricFamily("selfplay", "Run and version", value={"run": run.name, "version": run.version})
        state = GaugeMetricFamily("selfplay_state", "1 for the state the service is in", labels=["state"])
        for name in STATES:
            state.add_metric([name], float(run.service.state == name))
        yield state
        if (pause := store.state("pause")) is not None:
            kind, why = pause.get("kind", "ordered"), pause["why"][:LONGEST_WHY]
            paused = GaugeMetricFamily(
                "selfplay_pause_info", "A pause: ordered, or the service's own (failed, rejected, skipped), and why", labels=["kind", "why"]
            )  # fmt: skip
            paused.add_metric([kind, why], 1.0)
            yield paused
        now = run.service
        queue = GaugeMetricFamily("selfplay_queue_depth", "What the stage that runs has not done yet", labels=["stage"])
        if now.stage is not None and now.total is not None:
            queue.add_metric([now.stage], max(now.total - now.done, 0))
        yield queue
        rounds = CounterMetricFamily("selfplay_rounds", "Rounds by how they ended", labels=["state"])
        for name in ("promoted", "rejected", "skipped", "cancelled"):
            rounds.add_metric([name], run.rounds.get(name, 0))
        yield rounds
        yield GaugeMetricFamily("selfplay_policy", "Policy that serves", value=run.current_policy or 0)
        yield GaugeMetricFamily(
            "selfplay_gate_independent",
            "1 where another reward judges at the gate than trains",
            value=float(run.gate_independent),
        )
        yield GaugeMetricFamily(
            "selfplay_webhook_failing", "1 where alerts do not arrive at the webhook", value=float(bool(run.webhook))
        )
        yield GaugeMetricFamily("selfplay_orders_pending", "Orders that wait", value=run.orders_pending)
        yield GaugeMetricFamily("selfplay_disk_free_bytes", "Free on the disk of the run folder", value=run.free_bytes)
        restarts = CounterMetricFamily(
            "selfplay_restarts", "Restarts of children: engine, reward server or judge, trainer", labels=["kind"]
        )
        for kind in RESTARTS:
            restarts.add_metric([kind], happened.get(kind, 0))
        yield restarts
        events = CounterMetricFamily("selfplay_events", "Events of the ledger", labels=["kind"])
        for kind, count in happened.items():
            events.add_metric([kind], count)
        yield events
        seconds = CounterMetricFamily("selfplay_stage_seconds", "Seconds in finished stages", labels=["stage"])
        for stage, total in spent.items():
            seconds.add_metric([stage], total)
        yield seconds
        last = next(iter(self._view.rounds(limit=1)), None)
        if last is not None:
            yield GaugeMetricFamily("selfplay_round", "The newest round", value=last.round)
            newest = GaugeMetricFamily("selfplay_last_stage_seconds", "Seconds of each stage of the newest round", labels=["stage"])  # fmt: skip
            for row in paging.stages(store, last.round):
                newest.add_metric([row["stage"]], row["seconds"])
            yield newest
        yield from self._suites()
        for name, what, label, metrics in GAUGES:
            gauge = GaugeMetricFamily(f"selfplay_{name}", what, labels=[label])
            for value, metric in metrics.items():
                if metric in latest:
                    gauge.add_metric([value], latest[metric])
            yield gauge

    def _suites(self) -> Iterator[Metric]:
        """The newest scores of the suites, with their bounds."""
        store = self._view.store
        names = suites.recorded(store)
        sides = ("candidate", "champion", "difference")
        score = {
            (name, side): metric
            for name in names
            for side, metric in zip(
                sides, (*suites.champion_and_candidate(name)[::-1], suites.difference(name)), strict=True
            )
        }
        bounds = {"mean": "", "low": "_low", "high": "_high"}
        latest = figures.latest(store, [f"{metric}{suffix}" for metric in score.values() for suffix in bounds.values()])
        gauge = GaugeMetricFamily(
            "selfplay_suite_score",
            "Mean score on a benchmark: of candidate, champion and their difference, with its interval",
            labels=["suite", "of", "bound"],
        )
        for (name, side), metric in score.items():
            for bound, suffix in bounds.items():
                if f"{metric}{suffix}" in latest:
                    gauge.add_metric([name, side, bound], latest[f"{metric}{suffix}"])
        yield gauge


def registry(view: View) -> CollectorRegistry:
    """The metrics of the run, and those of the process (memory, descriptors, CPU)."""
    found = CollectorRegistry(auto_describe=False)
    ProcessCollector(registry=found)
    found.register(RunCollector(view))
    return found
