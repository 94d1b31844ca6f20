"""The two components of an NVFlare job: the server's runs task=serve, each client's task=join, over the job's own cells.

launch/nvflare/make_job.py writes a job of them. A site runs it if NVFlare and this package are installed there, and its
local/resources.json allows these two classes; a job brings no code along.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nvflare.apis.controller_spec import ClientTask, Task
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.fuel.f3.cellnet.fqcn import FQCN

from fedbert_jax import cli
from fedbert_jax import config as config_lib
from fedbert_jax.config import Config
from fedbert_jax.errors import UserError
from fedbert_jax.runtime import frames
from fedbert_jax.runtime.calls import Abort
from fedbert_jax.runtime.nvflare import Client, Server
from fedbert_jax.runtime.turns import DONE

TASK = "join"
WHY = "fedbert.why"  # header of a client's result: the sentence that it ended with
LAST_WORDS = 60.0  # seconds that the server waits for the clients' results, once it has served them


class Serve(Controller):
    """The server of a federation, in an NVFlare job's process at the server.

    Args:
      config: what differs from the defaults: values by dotted keys.
      workdir: where the run is kept; a job with the same one goes on with it.
    """

    def __init__(self, config: dict[str, Any], workdir: str):
        super().__init__()
        self.config, self.workdir = config, workdir
        self._over: dict[str, str] = {}  # how a client's part has ended, by its name; "" if well
        self._server: Server | None = None
        self._spare = 0  # how many clients the others can do without

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Nothing has to be made before `control_flow`."""

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Nothing is left after `control_flow`."""

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Lets all clients join, and serves them to the last round."""
        # Slow imports come once the job is under way.
        from fedbert_jax.devices.interrupts import Interrupts
        from fedbert_jax.serve import serve

        cell = self._engine.get_cell()
        names = {FQCN.join([c.get_fqcn(), fl_ctx.get_job_id()]): c.name for c in self._engine.get_clients()}

        def listen(service: Any) -> Server:
            self._server = Server(service, cell, names, ended)
            return self._server

        def ended() -> bool:
            return abort_signal.triggered or (len(self._lost(patience)) > self._spare and self._trains())

        try:
            with cli.foreseen(), speaking(self.logger.info) as console:
                if not fl_ctx.get_prop(FLContextKey.SECURE_MODE):
                    raise UserError("this NVFlare runs without certificates: anybody could call under a client's name.")
                config = read(self.config, {"task": "serve", "federated.num_clients": len(names)})
                # Without a quorum the others would wait for ever: no process that is lost comes back in this job.
                self._spare, patience = len(names) - (config.network.quorum or len(names)), config.network.patience
                task = Task(TASK, Shareable(), result_received_cb=self._hear)
                self.broadcast(task, fl_ctx, min_responses=len(names))
                serve(config, Path(self.workdir), console, listen, Interrupts(ended))
        except UserError as error:
            self.system_panic(str(error), fl_ctx)
            return
        end = time.monotonic() + LAST_WORDS
        while len(lost := self._lost(patience)) <= self._spare and not abort_signal.triggered:
            if len(self._over.keys() | lost.keys()) == len(names) or time.monotonic() > end:
                break
            time.sleep(0.2)
        self.cancel_task(task, fl_ctx=fl_ctx)
        if len(lost) > self._spare and not abort_signal.triggered:
            self.system_panic("; ".join(f"{name} {why}" for name, why in lost.items()), fl_ctx)

    def _hear(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        """Takes a client's result: its part is over, and it doesn't come back in this job."""
        result, name = client_task.result, client_task.client.name
        code = result.get_return_code()
        why = "" if code == ReturnCode.OK else str(result.get_header(WHY) or code)
        self._over[name] = f"has ended: {why}" if why else ""
        if why:
            self.log_error(fl_ctx, f"{name} has ended: {why}")
        if why and self._spare and self._server is not None:
            with contextlib.suppress(Abort):
                self._server.service.call("leave", name, frames.encode({}))  # no round waits for it any more

    def _lost(self, patience: float) -> dict[str, str]:
        """Returns what has become of the clients that don't come back in this job."""
        names = self._server.silent(patience) if self._server is not None else []
        silent = dict.fromkeys(names, f"was not heard of for {patience:.0f} s")
        return {name: why for name, why in (silent | self._over).items() if why}

    def _trains(self) -> bool:
        """Whether there are rounds to come; after the last one, the others still fetch what is theirs."""
        assert self._server is not None
        status, _ = frames.decode(self._server.service.call("status", "", frames.encode({})), 1 << 20)
        return bool(status["state"] != DONE)

    def process_result_of_unknown_task(self, *args: Any) -> None:
        """Ignores what comes after the end."""


class Join(Executor):
    """A client of a federation, in an NVFlare job's process at a site.

    Args:
      config: what differs from the defaults: values by dotted keys.
      workdir: where the run is kept; a job with the same one goes on with it.
    """

    def __init__(self, config: dict[str, Any], workdir: str):
        super().__init__()
        self.config, self.workdir = config, workdir

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """Takes part until training is over; returns NVFlare's code for how that went."""
        from fedbert_jax.devices.interrupts import Interrupts
        from fedbert_jax.join import LIMIT, join

        if task_name != TASK:
            return make_reply(ReturnCode.TASK_UNKNOWN)
        server = FQCN.join([FQCN.ROOT_SERVER, fl_ctx.get_job_id()])
        transport = Client(fl_ctx.get_engine().get_cell(), server, LIMIT, abort_signal)
        interrupts = Interrupts(lambda: abort_signal.triggered)
        transport.beat()
        try:
            with cli.foreseen(), speaking(self.logger.info) as console:
                config = read(self.config, {"task": "join", "network.name": fl_ctx.get_identity_name()})
                code = join(config, Path(self.workdir), console, transport, interrupts)
        except UserError as error:
            self.log_error(fl_ctx, str(error))
            reply = make_reply(ReturnCode.EXECUTION_EXCEPTION)
            reply.set_header(WHY, str(error))
            return reply
        finally:
            transport.close()
        return make_reply(ReturnCode.OK if code == 0 else ReturnCode.TASK_ABORTED)


def read(values: Mapping[str, Any], own: Mapping[str, Any]) -> Config:
    """Returns a party's config.

    Args:
      values: the job's, by dotted keys.
      own: what the party itself knows better.

    Raises:
      ConfigError: for an unknown key or a value that can't be used.
    """
    nested: dict[str, Any] = {}
    for key, value in (dict(values) | dict(own)).items():
        *sections, name = key.split(".")
        node = nested
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return config_lib.from_dict(nested)


@contextlib.contextmanager
def speaking(say: Callable[[str], None]) -> Any:
    """A console whose lines go to NVFlare's log of the job."""
    from fedbert_jax.console.output import make_console

    cli.quieten()

    class Lines(io.TextIOBase):
        text = ""

        def write(self, text: str) -> int:
            *lines, self.text = (self.text + text).split("\n")
            for line in lines:
                if line.strip():
                    say(line.rstrip())
            return len(text)

    yield make_console(file=Lines())
