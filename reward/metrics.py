"""What a reward server counts, in Prometheus' text format."""

from collections import Counter as Counts
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from reward.scorer import Score, Scorer

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """The counters of one server. `inside`: requests that wait or are scored, now."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, scorers: Sequence[Scorer], inside: Callable[[], int]) -> None:
        registry = self._registry = CollectorRegistry()
        self._requests = Counter(
            "reward_requests", "Requests answered, by path and HTTP status", ["path", "status"], registry=registry
        )
        self._seconds = Histogram(
            "reward_request_seconds", "Seconds from a request to its answer", buckets=SECONDS, registry=registry
        )
        self._items = Counter("reward_items", "Items answered, with a score or without", ["result"], registry=registry)
        for result in ("scored", "set_aside"):
            self._items.labels(result)
        Gauge("reward_requests_inside", "Requests that wait or are scored", registry=registry).set_function(inside)
        workers = Gauge("reward_workers", "Scorers that work at the same time", registry=registry)
        workers.set(len(scorers))
        registry.register(_Counts(scorers))

    def answered(self, path: str, status: int, seconds: float) -> None:
        self._requests.labels(path, str(status)).inc()
        self._seconds.observe(seconds)

    def scored(self, scores: Sequence[Score]) -> None:
        good = sum(s.value is not None for s in scores)
        self._items.labels("scored").inc(good)
        self._items.labels("set_aside").inc(len(scores) - good)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Counts(Collector):
    """The scorers' own counts, such as a judge's verdicts that could not be read."""

    def __init__(self, scorers: Sequence[Scorer]) -> None:
        self._scorers = scorers

    def collect(self) -> Iterator[CounterMetricFamily]:
        total: Counts[str] = Counts()
        for scorer in self._scorers:
            for name, count in list(scorer.counts.items()):
                total[name] += count
        family = CounterMetricFamily("reward_scorer", "What the scorers count themselves", labels=["what"])
        for name, count in sorted(total.items()):
            family.add_metric([name], count)
        yield family
