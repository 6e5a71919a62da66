"""What Prometheus may ask: vLLM's names with a prefix of ours, so that dashboards fit."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from llmquant.server.engine import Engine

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Of one server."""

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        for name, told, of in (
            ("num_requests_running", "Requests whose turn comes.", lambda: len(engine.active)),
            ("num_requests_waiting", "Requests that will follow.", lambda: len(engine.waiting)),
            (
                "kv_cache_usage_perc",
                "Of the caches' room, what is reserved; 1 is all.",
                lambda: engine.reserved / engine.room,
            ),
        ):
            Gauge(f"llmquant:{name}", told, registry=self._registry).set_function(of)
        self.prompt_tokens = self._counter("prompt_tokens", "Of requests that were admitted.")
        self.generation_tokens = self._counter("generation_tokens", "New tokens.")
        self.success = self._counter("request_success", "Answers that ended.", "finished_reason")
        self.rejections = self._counter("admission_rejections", "Requests that were not admitted.", "reason")
        self.first_token = self._seconds("time_to_first_token_seconds", "From a request to its first token.")
        self.between_tokens = self._seconds("inter_token_latency_seconds", "From one token to the next.")
        self.whole = self._seconds("e2e_request_latency_seconds", "From a request to the end of its answer.")

    def page(self) -> bytes:
        return generate_latest(self._registry)

    def _counter(self, name: str, told: str, *labels: str) -> Counter:
        return Counter(f"llmquant:{name}", told, labels, registry=self._registry)

    def _seconds(self, name: str, told: str) -> Histogram:
        return Histogram(f"llmquant:{name}", told, buckets=SECONDS, registry=self._registry)
