"""What this package uses of NVFlare, rebuilt in a few lines, so that its tests run where NVFlare isn't installed.

Cells hand messages over by function calls. As NVFlare's do, they stream: filters see the first chunk's headers, a refused
stream ends as an error in a sentence of the sender's own, and a callback's future is waited for.
"""

from __future__ import annotations

import concurrent.futures
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import pytest


class Message:
    def __init__(self, headers: dict[str, Any] | None = None, payload: Any = None):
        self.headers, self.payload = dict(headers or {}), payload

    def get_header(self, key: str, default: Any = None) -> Any:
        return self.headers.get(key, default)

    def add_headers(self, headers: dict[str, Any]) -> None:
        self.headers |= headers


def make_reply(code: str, error: str = "", body: Any = None) -> Message:
    return Message({"return_code": code} | ({"error": error} if error else {}), body)


class StreamError(Exception):
    pass


class Signal:
    triggered = False

    def trigger(self, value: Any) -> None:
        self.triggered = True


class Shareable(dict[str, Any]):
    def __init__(self) -> None:
        self.code, self.headers = "OK", dict[str, Any]()

    def get_return_code(self) -> str:
        return self.code

    def set_header(self, key: str, value: Any) -> None:
        self.headers[key] = value

    def get_header(self, key: str) -> Any:
        return self.headers.get(key)


def make_shareable(code: str) -> Shareable:
    found = Shareable()
    found.code = code
    return found


class Component:
    """A controller or an executor: only the constructor and the log are NVFlare's."""

    def __init__(self) -> None:
        import logging

        self.logger = logging.getLogger("flare")

    def log_error(self, fl_ctx: Any, text: str) -> None:
        self.logger.error(text)


class Task:
    def __init__(self, name: str, data: Any, result_received_cb: Any = None):
        self.name, self.data, self.result_received_cb = name, data, result_received_cb


class Names:
    """Constants that are called as what they stand for."""

    def __init__(self, **names: str):
        self.__dict__.update(names)


MODULES: dict[str, dict[str, Any]] = {
    "nvflare.fuel.f3.message": {"Message": Message},
    "nvflare.fuel.f3.cellnet.utils": {"make_reply": make_reply},
    "nvflare.fuel.f3.cellnet.defs": {
        "MessageHeaderKey": Names(ORIGIN="origin", TOPIC="topic", RETURN_CODE="return_code", ERROR="error"),
        "ReturnCode": Names(OK="ok"),
    },
    "nvflare.fuel.f3.cellnet.fqcn": {"FQCN": types.SimpleNamespace(ROOT_SERVER="server", join=".".join)},
    "nvflare.fuel.f3.streaming.stream_const": {
        "STREAM_CHANNEL": "stream",
        "STREAM_DATA_TOPIC": "data",
        "StreamHeaderKey": Names(CHANNEL="sch", TOPIC="stp", SIZE="sz", PAYLOAD_ENCODING="pe"),
    },
    "nvflare.fuel.f3.streaming.stream_types": {"StreamError": StreamError},
    "nvflare.apis.controller_spec": {"ClientTask": object, "Task": Task},
    "nvflare.apis.executor": {"Executor": Component},
    "nvflare.apis.fl_constant": {
        "FLContextKey": Names(SECURE_MODE="secure"),
        "ReturnCode": Names(
            OK="OK", TASK_UNKNOWN="TASK_UNKNOWN", TASK_ABORTED="TASK_ABORTED", EXECUTION_EXCEPTION="EXECUTION_EXCEPTION"
        ),
    },
    "nvflare.apis.fl_context": {"FLContext": object},
    "nvflare.apis.impl.controller": {"Controller": Component},
    "nvflare.apis.shareable": {"Shareable": Shareable, "make_reply": make_shareable},
    "nvflare.apis.signal": {"Signal": Signal},
}


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts these in NVFlare's place."""
    for name, members in MODULES.items():
        parts = name.split(".")
        for n in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:n]), types.ModuleType(".".join(parts[:n])))
        module = types.ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)


class Cell:
    """One of the cells of a net, which is a dict of them by their full names."""

    def __init__(self, name: str, net: dict[str, Cell]):
        self.name, self.net = name, net
        self.core_cell = self.byte_receiver = self
        self._looks: list[Callable[[Message], Any]] = []
        self._answers: dict[str, Callable[[Message], Any]] = {}
        self._rejected = ""
        net[name] = self

    def get_fqcn(self) -> str:
        return self.name

    def add_incoming_request_filter(self, channel: str, topic: str, cb: Callable[[Message], Any]) -> None:
        assert (channel, topic) == ("stream", "data")
        self._looks.append(cb)

    def register_request_cb(self, channel: str, topic: str, cb: Callable[[Message], Any]) -> None:
        assert topic == "*"
        self._answers[channel] = cb

    def reject(self, message: Message, error: StreamError) -> None:
        message.headers["rejected"] = str(error)

    def send_request(
        self, channel: str, topic: str, target: str, request: Message, timeout: float, abort_signal: Signal | None
    ) -> Message:
        there = self.net.get(target)
        if there is None:
            return make_reply("comm_error", "cannot send to it")
        data = request.payload
        encoding, size = ("bytes", len(data)) if isinstance(data, bytes) else ("fobs", 100)
        stream = {"sch": channel, "stp": topic, "sz": size, "pe": encoding}
        chunk = Message(request.headers | stream | {"origin": self.name})
        for look in there._looks:
            if look(chunk) is not None:
                return make_reply("comm_error", f"Tx[SID:1 to {target}] received error: {chunk.headers['rejected']}")
        whole = memoryview(data) if isinstance(data, bytes) else data
        answer = there._answers[channel](Message(chunk.headers | {"topic": topic}, whole))
        end = time.monotonic() + timeout
        while isinstance(answer, concurrent.futures.Future):
            try:
                answer = answer.result(0.02)
            except concurrent.futures.TimeoutError:
                if time.monotonic() > end or (abort_signal is not None and abort_signal.triggered):
                    return make_reply("timeout")
            except Exception:
                return make_reply("process_exception")
        return answer

    def stop(self) -> None:
        self.net.pop(self.name, None)
