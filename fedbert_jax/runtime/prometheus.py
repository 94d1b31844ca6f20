"""A server's numbers for Prometheus, at a port of the loopback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedbert_jax.errors import UserError

PREFIX = "fedbert_"


class Exporter:
    """An HTTP endpoint of gauges: round, clients, loss, bytes, seconds.

    Args:
      port: of 127.0.0.1.

    Raises:
      UserError: if another program has it.
    """

    def __init__(self, port: int):
        from prometheus_client import CollectorRegistry, Gauge, start_http_server

        registry = CollectorRegistry()
        named = {
            "round": "Rounds that are finished",
            "clients_here": "Clients who have joined",
            "clients_late": "Clients whom the step under way waits for",
            "train_loss": "Mean loss of the last round",
            "eval_loss": "Held-out loss of the last evaluation",
            "round_seconds": "How long the last round took",
            "received_bytes": "Bytes of frames from clients",
            "sent_bytes": "Bytes of frames to clients",
        }
        self._gauges = {name: Gauge(PREFIX + name, text, registry=registry) for name, text in named.items()}
        try:
            self._server, self._thread = start_http_server(port, "127.0.0.1", registry)
        except OSError as error:
            raise UserError(f"config key network.metrics_port={port}: it can't be had ({error.strerror}).") from error

    def set(self, values: Mapping[str, Any]) -> None:
        """Sets those of the gauges that are named."""
        for name, value in values.items():
            if name in self._gauges and value is not None:
                self._gauges[name].set(float(value))

    def close(self) -> None:
        """Ends the endpoint."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)
