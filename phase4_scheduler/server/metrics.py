"""GET /metrics: Prometheus. vLLM's names where the meaning is the same, so that its dashboards work; `titan:` else.

vLLM's are in `vllm/v1/metrics/loggers.py`. A registry belongs to one server: there is nothing global.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from phase4_scheduler.core.wire import Stats
from phase4_scheduler.server.meter import Meter, Totals

_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10, 20, 40, 80, 160)
_ITL = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10, 40, 80)
_E2E = (0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_N = (1, 2, 5, 10, 20, 50, 100)
REASONS = ("stop", "length", "abort", "error")
REFUSALS = ("queued_reqs", "queued_tokens", "starting", "draining", "engine")
STATES = ("starting", "ready", "hung", "restarting", "broken", "stopping", "stopped", "draining")
_ENGINE_COUNTERS = (
    ("vllm:num_preemptions", "Sequences that lost their memory and were put back.", "preemptions"),
    ("titan:recomputed_tokens", "Tokens that were computed again after that.", "recomputed_tokens"),
    ("titan:steps", "Forward passes.", "steps"),
    ("titan:busy_seconds", "Time in which a forward pass was running.", "busy_seconds"),
    ("titan:batch_seqs", "Sequences, summed over forward passes.", "batch_seqs"),
    ("titan:batch_tokens", "Tokens, summed over forward passes.", "batch_tokens"),
)


class _EngineCounters(Collector):
    """The engine's own counters, added up over its restarts."""

    def __init__(self, meter: Meter, labels: dict[str, str]) -> None:
        self._meter, self._labels = meter, labels

    def collect(self) -> list[Metric]:
        """One family for each counter."""
        found: list[Metric] = []
        totals: Totals = self._meter.totals
        for name, told, field in _ENGINE_COUNTERS:
            family = CounterMetricFamily(name, told, labels=list(self._labels))
            family.add_metric(list(self._labels.values()), getattr(totals, field))
            found.append(family)
        return found


class Metrics:
    """All metrics of one server. Requests report here; the engine's numbers are put in when somebody asks.

    Args:
        model: value of the label `model_name`.
        meter: has the engine's counters.
    """

    def __init__(self, model: str, meter: Meter) -> None:
        self._registry = CollectorRegistry()
        labels = {"model_name": model, "engine": "0"}
        self._registry.register(_EngineCounters(meter, labels))

        def histogram(name: str, told: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, told, list(labels), registry=self._registry, buckets=buckets).labels(**labels)

        def counter(name: str, told: str) -> Counter:
            return Counter(name, told, list(labels), registry=self._registry).labels(**labels)

        def gauge(name: str, told: str) -> Gauge:
            return Gauge(name, told, list(labels), registry=self._registry).labels(**labels)

        self.ttft = histogram("vllm:time_to_first_token_seconds", "From the request to its first token.", _TTFT)
        self.itl = histogram("vllm:inter_token_latency_seconds", "Between two chunks of a request.", _ITL)
        self.e2e = histogram("vllm:e2e_request_latency_seconds", "From the request to its last token.", _E2E)
        self.queue = histogram("vllm:request_queue_time_seconds", "Waiting in the engine.", _E2E)
        self.prompt_length = histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self.answer_length = histogram("vllm:request_generation_tokens", "Tokens generated for a prompt.", _TOKENS)
        self.n = histogram("vllm:request_params_n", "Sequences of a prompt.", _N)
        self.prompt_tokens = counter("vllm:prompt_tokens", "Of requests with a first token.")
        self.generation_tokens = counter("vllm:generation_tokens", "Generated.")
        self.accepted = counter("titan:requests_accepted", "Each ends once, in vllm:request_success_total.")
        ended = Counter("vllm:request_success", "Ended.", [*labels, "finished_reason"], registry=self._registry)
        self.ended = {reason: ended.labels(**labels, finished_reason=reason) for reason in REASONS}
        refused = Counter("vllm:admission_rejections", "Not let in.", [*labels, "reason"], registry=self._registry)
        self.refused = {reason: refused.labels(**labels, reason=reason) for reason in REFUSALS}
        self._running = gauge("vllm:num_requests_running", "Sequences in the batch.")
        self._waiting = gauge("vllm:num_requests_waiting", "Sequences in the queue.")
        self._swapped = gauge("titan:num_requests_swapped", "Sequences whose memory was moved out.")
        self._kv = gauge("vllm:kv_cache_usage_perc", "Share of the KV blocks in use; 1 is all.")
        self._in_flight = gauge("titan:requests_in_flight", "Prompts that were let in and have not ended.")
        self._backlog = gauge("titan:backlog_tokens", "Tokens to compute until all that was let in has ended.")
        self._busy = gauge("titan:busy_ratio", "Share of the last seconds in which a forward pass was running.")
        self._occupancy = gauge("titan:batch_occupancy", "Sequences in a forward pass, over the last seconds.")
        self._restarts = gauge("titan:engine_restarts", "Engines after the first.")
        state = Gauge("titan:state", "1 for the state that the server is in.", ["state"], registry=self._registry)
        self._state = {name: state.labels(state=name) for name in STATES}

    def render(
        self, stats: Stats, summary: dict[str, float], *, in_flight: int, backlog: float, restarts: int, state: str
    ) -> bytes:
        """The text that Prometheus reads.

        Args:
            stats: the engine's newest.
            summary: of the meter.
            in_flight: prompts.
            backlog: tokens.
            restarts: of the engine.
            state: of the server.
        """
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        self._swapped.set(stats.swapped)
        self._kv.set(kv_usage(stats))
        self._in_flight.set(in_flight)
        self._backlog.set(backlog)
        self._busy.set(summary["busy"])
        self._occupancy.set(summary["batch_occupancy"])
        self._restarts.set(restarts)
        for name, flag in self._state.items():
            flag.set(name == state)
        return generate_latest(self._registry)


def kv_usage(stats: Stats) -> float:
    """Share of the KV blocks in use."""
    return 1 - stats.kv_blocks_free / stats.kv_blocks if stats.kv_blocks else 0.0
