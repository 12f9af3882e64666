"""Counters for Prometheus, on a port of their own; no question or answer is in them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ..errors import MissingDependencyError, UsageError
from ..text import one_line
from .settings import MetricsSettings

if TYPE_CHECKING:
    from prometheus_client.core import Metric

__all__ = ["MetricsServer"]

# Name, what it is, its labels; a number's label holds their values with spaces between.
_COUNTERS = {
    "sounds": ("Sounds that rose above the room", ("source",)),
    "answers": ("Questions by what became of them", ("question", "status")),
    "unanswered": ("Sounds about which nothing was asked", ("reason",)),
    "heard_seconds": ("Sound heard", ("source",)),
    "away_seconds": ("Time for which a source was lost", ("source",)),
    "overflows": ("Times that sound was lost because the machine was too busy", ("source",)),
    "bad_samples": ("Samples that were no numbers", ("source",)),
    "answer_seconds": ("Time the model took", ()),
    "clips_not_kept": ("Clips that could not be written", ()),
    "dropped": ("Records given up", ("outlet",)),
}
_GAUGES = {
    "waiting": ("Sounds that wait for the model", ()),
    "source_up": ("Whether a source is heard", ("source",)),
    "undelivered": ("Records that wait for delivery", ("outlet",)),
}

Numbers = dict[tuple[str, str], float]


class MetricsServer:
    """``/metrics`` over HTTP."""

    def __init__(self, settings: MetricsSettings, numbers: Callable[[], Numbers]) -> None:
        """Serve what ``numbers`` gives, from :meth:`begin` on.

        Raises:
            MissingDependencyError: prometheus-client is not installed.
        """
        if importlib.util.find_spec("prometheus_client") is None:
            raise MissingDependencyError(
                "[metrics] needs prometheus-client; run: pip install 'tinygiant[listen]'"
            )
        self._settings = settings
        self._numbers = numbers
        self._server: Any = None

    def begin(self) -> None:
        """Open the port.

        Raises:
            UsageError: it is taken, or not of this machine.
        """
        from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server

        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(self)
        host, port = self._settings.host, self._settings.port
        assert port is not None
        try:
            self._server, _ = start_http_server(port, host, registry)
        except OSError as error:
            reason = error.strerror or one_line(error)
            raise UsageError(
                f"[metrics] {host} port {port} cannot be served ({reason}); choose another"
            ) from error

    def close(self) -> None:
        """Close the port."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def collect(self) -> Iterator[Metric]:
        """All numbers in Prometheus' form; it calls this."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        numbers = self._numbers()
        for table, family in ((_COUNTERS, CounterMetricFamily), (_GAUGES, GaugeMetricFamily)):
            for name, (text, labels) in table.items():
                metric = family(f"tinygiant_listen_{name}", text, labels=labels)
                for (found, label), number in numbers.items():
                    if found == name:
                        metric.add_metric(label.split(" ") if labels else [], number)
                yield metric
