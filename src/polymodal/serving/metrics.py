"""What a server tells Prometheus of itself: requests, seconds, tokens, caches, memory."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from polymodal.backends.base import Reply, StreamEvent
from polymodal.serving.models import Served
from polymodal.serving.scheduler import Job, Scheduler

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
STEPS = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
"""Upper ends of the classes of seconds of a request, and between two of its tokens."""


class Metrics:
    """The figures of one server."""

    def __init__(self, models: Mapping[str, Served], media: Scheduler) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(_Now(models, media))
        say: Any = {"labelnames": ["model"], "registry": registry, "namespace": "polymodal"}
        self.answered = Counter("http_responses", "responses", ["status"], registry=registry, namespace="polymodal")
        outcomes = {**say, "labelnames": ["model", "outcome"]}
        self.requests = Counter("requests", "requests that are over: done, cancelled, or what failed", **outcomes)
        self.first = Histogram("first_token_seconds", "to the first token, waiting included", buckets=SECONDS, **say)
        self.step = Histogram("between_tokens_seconds", "from a token to the next", buckets=STEPS, **say)
        self.whole = Histogram("request_seconds", "of whole requests, waiting included", buckets=SECONDS, **say)
        self.prompt = Counter("prompt_tokens", "positions before answers", **say)
        self.cached = Counter("cached_prompt_tokens", "those that were read for an earlier request", **say)
        self.made = Counter("generated_tokens", "tokens of answers", **say)
        for name, served in models.items():
            served.scheduler.watch = Watch(self, name)


class Watch:
    """Keeps the figures of a model's requests."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.metrics, self.model = metrics, model

    def begin(self, job: Job) -> Callable[[int, StreamEvent], None]:
        """What is told of each event of a request."""
        metrics, model, last = self.metrics, self.model, dict[int, float]()

        def see(index: int, event: StreamEvent) -> None:
            now = time.perf_counter()
            if isinstance(event, Reply):
                usage = event.usage
                metrics.made.labels(model).inc(usage.completion_tokens or 0)
                metrics.cached.labels(model).inc(usage.cached_tokens or 0)
                metrics.prompt.labels(model).inc(usage.prompt_tokens or 0)
            elif index in last:
                metrics.step.labels(model).observe(now - last[index])
            elif not last:
                metrics.first.labels(model).observe(now - job.begun)
            last[index] = now

        return see

    def end(self, job: Job, outcome: str) -> None:
        """A request is over."""
        self.metrics.requests.labels(self.model, outcome).inc()
        self.metrics.whole.labels(self.model).observe(time.perf_counter() - job.begun)


class _Now(Collector):
    """What is so at the moment."""

    def __init__(self, models: Mapping[str, Served], media: Scheduler) -> None:
        self.models, self.media = models, media

    def collect(self) -> Iterator[Metric]:
        """Requests of each model, and its caches with what they may hold; requests of the routes of media."""
        found: dict[str, dict[str, float]] = {}
        for model, served in self.models.items():
            running, waiting = served.scheduler.sizes
            values: dict[str, float] = {"requests_running": running, "requests_waiting": waiting}
            if (batcher := served.scheduler.batcher) is not None:
                media = batcher.media
                values |= {"media_cache_bytes": media.nbytes, "media_cache_hits_total": media.hits}
                values |= {"media_cache_misses_total": media.misses, "media_cache_limit_bytes": media.most_bytes}
                if (prefixes := batcher.prefixes) is not None:
                    values |= {"prefix_cache_bytes": prefixes.nbytes, "prefix_cache_hit_tokens_total": prefixes.hits}
                    values |= {"prefix_cache_asked_tokens_total": prefixes.asked}
                    values |= {"prefix_cache_limit_bytes": prefixes.most_bytes or 0}
            for name, value in values.items():
                found.setdefault(name, {})[model] = value
        for name, each in found.items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            family = kind(f"polymodal_{name}", name.replace("_", " "), labels=["model"])
            for model, value in each.items():
                family.add_metric([model], value)
            yield family
        for name, count in zip(("running", "waiting"), self.media.sizes, strict=True):
            yield GaugeMetricFamily(f"polymodal_media_requests_{name}", f"media requests {name}", count)


async def metrics(request: Request) -> Response:
    """The figures, as Prometheus reads them."""
    return Response(generate_latest(request.app.state.metrics.registry), media_type=CONTENT_TYPE_LATEST)


ROUTES = [Route("/metrics", metrics)]
