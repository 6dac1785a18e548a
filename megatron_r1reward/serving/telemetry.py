"""What /metrics shows: requests, judgements, the servers behind the service, and samples that got no reward."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from megatron_r1reward.servers.member import ServerStatus


class Telemetry(Collector):
    """Counted as it happens, or asked for when somebody looks.

    Args:
        servers: the state of each server.
    """

    def __init__(self, servers: Callable[[], Sequence[ServerStatus]]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "r1reward_requests_total", "Requests by route and HTTP status", ("route", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "r1reward_request_seconds",
            "Time from admission to answer",
            ("route",),
            buckets=(0.1, 0.3, 1, 3, 10, 30, 100, 300),
            registry=self.registry,
        )
        self.judgements = Counter("r1reward_judgements_total", "Judgements made", registry=self.registry)
        self.unparsable = Counter(
            "r1reward_unparsable_total", "Judgements without a readable verdict", registry=self.registry
        )
        self.in_progress = Gauge("r1reward_requests_in_progress", "Requests being worked on", registry=self.registry)
        self._servers = servers
        self.cohorts: Mapping[str, int] = {}  # `CohortBuffer.counts`
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        servers = self._servers()
        states = GaugeMetricFamily("r1reward_servers", "vLLM servers by state", labels=["state"])
        for state, count in Tally(server.state for server in servers).items():
            states.add_metric([state], count)
        failures = CounterMetricFamily(
            "r1reward_server_failures", "Requests and health checks that a server did not answer", labels=["server"]
        )
        restarts = CounterMetricFamily(
            "r1reward_server_restarts", "Starts of a server but for the first", labels=["server"]
        )
        for server in servers:
            failures.add_metric([server.name], server.failures)
            restarts.add_metric([server.name], server.restarts)
        cohorts = CounterMetricFamily(
            "r1reward_cohorts", "Samples of other trainers, their cohorts, and what got no reward", labels=["what"]
        )
        for what, count in self.cohorts.items():
            cohorts.add_metric([what], count)
        yield from (states, failures, restarts, cohorts)
