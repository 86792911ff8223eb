"""The server's figures in the form that Prometheus reads. Needs prometheus-client.

Counts are read where they are kept when somebody asks; only what happens to a request is noted
here. Each server has a registry of its own, so that several in one process stay apart.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from pyengine.serve.front import LEFT
from pyengine.serve.queue import Hear, Job, Said, Worker
from pyengine.task import Result

OUTCOMES = ("answered", "refused", "busy", "failed", "left")
# From a short prompt's time to that of a long one behind others
FIRST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)


class Metrics:
    """What one server tells of itself."""

    def __init__(self, worker: Worker) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(Counts(worker))
        self._requests = Counter(
            "pyengine_requests",
            "Requests for an answer by outcome: refused for what they ask (4xx), busy when there "
            "was no place (429, 503), left by their client.",
            ["outcome"],
            registry=self._registry,
        )
        for outcome in OUTCOMES:  # a series that is there from the start has a rate
            self._requests.labels(outcome)
        self._first = Histogram(
            "pyengine_time_to_first_token_seconds",
            "From the end of a request to the first token of each of its texts.",
            buckets=FIRST_S,
            registry=self._registry,
        )
        self._each = Histogram(
            "pyengine_time_per_token_seconds",
            "Mean time per token behind the first, one observation per text that ended; with the "
            "time that it waited for a client that reads slowly.",
            buckets=TOKEN_S,
            registry=self._registry,
        )

    def count(self, status: int) -> None:
        """A request that ended with this status."""
        self._requests.labels(outcome_of(status)).inc()

    def timed(self, job: Job, came: float) -> Hear:
        """The job's ``hear``, noting when its tokens are heard; ``came`` is by perf_counter."""
        echoes = {index for index, ask in enumerate(job.asks) if ask.echo is not None}
        begun: dict[int, tuple[float, float]] = {}  # by text, when its first and newest tokens came

        async def hear(wait_s: float | None) -> Said | Exception | None:
            said = await job.hear(wait_s)
            if not isinstance(said, Said):
                return said
            index, what = said
            if isinstance(what, Result):
                first, newest = begun.get(index, (0.0, 0.0))
                if len(what.tokens) > 1:
                    self._each.observe((newest - first) / (len(what.tokens) - 1))
            elif index in echoes:  # its first step is the prompt
                echoes.remove(index)
            elif what.tokens:
                now = time.perf_counter()
                if index not in begun:
                    self._first.observe(now - came)
                begun[index] = begun.get(index, (now, now))[0], now
            return said

        return hear

    def page(self, accept: str) -> tuple[bytes, str]:
        """All figures in the format that an Accept header asks for, and its media type."""
        encode, media_type = choose_encoder(accept)
        return encode(self._registry), media_type


class Counts(Collector):
    """What the worker and its engine count themselves."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def collect(self) -> Iterator[Metric]:
        worker, totals = self._worker, self._worker.totals
        for name, help_text, value in (
            ("streams", "Most texts under way at once.", worker.streams),
            ("requests_running", "Requests whose turn has come.", worker.running),
            ("requests_waiting", "Requests in line.", worker.waiting),
            ("texts_active", "Texts whose prompt or answer is under way.", worker.texts),
            (
                "cache_bytes",
                "Memory of keys and values, of texts under way and of prefixes kept.",
                worker.cache_bytes,
            ),
        ):
            yield GaugeMetricFamily(f"pyengine_{name}", help_text, value)
        for name, what in (("held", "Pages of texts and beginnings."), ("free", "Free pages.")):
            pages = GaugeMetricFamily(f"pyengine_pages_{name}", what, labels=["layers"])
            for kind, counts in worker.pages.items():
                pages.add_metric([kind], counts[name])
            yield pages
        for name, help_text, value in (
            ("prompt_tokens", "Prompt tokens, once per text.", totals.prompt_tokens),
            (
                "prompt_tokens_reused",
                "Prompt tokens that a prefix or another text had.",
                totals.reused_tokens,
            ),
            ("tokens", "Tokens generated.", totals.tokens),
            ("rounds", "Calls of the target for blocks of all texts.", totals.rounds),
            ("blocks", "Blocks in those rounds, one per text and round.", totals.blocks),
            ("drafts", "Drafts made.", totals.drafted),
            ("drafts_accepted", "Drafts accepted.", totals.accepted),
        ):
            yield CounterMetricFamily(f"pyengine_{name}", help_text, value)
        for key, name, help_text in (
            ("rounds", "drafter_blocks", "Blocks with drafts, by the drafter that made them."),
            ("drafted", "drafter_drafts", "Drafts made, by drafter."),
            ("accepted", "drafter_drafts_accepted", "Drafts accepted, by drafter."),
        ):
            family = CounterMetricFamily(f"pyengine_{name}", help_text, labels=["drafter"])
            for drafter, counts in totals.by_drafter.copy().items():
                family.add_metric([drafter], counts[key])
            yield family


def outcome_of(status: int) -> str:
    if status == LEFT:
        return "left"
    if status in (429, 503):
        return "busy"
    return "answered" if status < 400 else "refused" if status < 500 else "failed"
