"""What Prometheus is told.

Invariant: labels come from a fixed set, so no client can make the page grow.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shoal.serving.backend import Engine
from shoal.serving.gate import Gate

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """One server's counters."""

    def __init__(self, engine: Engine, gate: Gate) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("shoal_http_requests", "Requests answered.", ("path", "status"), registry=registry)
        self.seconds = Histogram(
            "shoal_http_request_seconds", "Time to the end.", ("path",), buckets=SECONDS, registry=registry
        )
        self.first_piece = Histogram(
            "shoal_time_to_first_piece_seconds",
            "From a stream's start to its first text.",
            buckets=SECONDS,
            registry=registry,
        )
        registry.register(_Engine(engine, gate))

    def page(self) -> bytes:
        return generate_latest(self.registry)


class _Engine(Collector):
    """Reads the engine's and the gate's numbers when the page is asked for."""

    def __init__(self, engine: Engine, gate: Gate) -> None:
        self._engine, self._gate = engine, gate

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        counters = {
            "shoal_tokens_drawn": ("Tokens drawn.", stats.tokens_drawn),
            "shoal_prompt_tokens": ("Prompt tokens computed.", stats.prompt_tokens),
            "shoal_prompt_tokens_reused": ("Prompt tokens copied from the prefix store.", stats.reused_tokens),
            "shoal_tokens_rebuilt": ("Tokens computed again because stages were lost.", stats.rebuilt_tokens),
            "shoal_speculation_rounds": ("Passes with drafts, once for each sequence.", stats.rounds),
            "shoal_tokens_drafted": ("Tokens that the drafter proposed.", stats.drafted),
            "shoal_tokens_accepted": ("Drafted tokens that stayed.", stats.accepted),
            "shoal_engine_busy_seconds": ("Time in the engine's steps.", stats.busy_s),
            "shoal_turned_away": ("Requests answered 429.", self._gate.turned_away),
        }
        gauges = {
            "shoal_sequences_live": ("Sequences being drawn.", stats.live),
            "shoal_sequences_filling": ("Sequences whose prompts are being computed.", stats.filling),
            "shoal_sequences_waiting": ("Sequences that wait for a place.", stats.waiting),
            "shoal_completions_inside": ("Completions admitted.", self._gate.inside),
            "shoal_cache_bytes": ("Memory of the key-value cache.", stats.cache_bytes),
            "shoal_prefix_bytes": ("Memory of the prefix store.", stats.prefix_bytes),
            "shoal_policy_version": ("Version of the weights in place.", self._engine.version),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(name, text, value=float(value))
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=float(value))
