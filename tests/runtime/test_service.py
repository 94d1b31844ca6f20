"""The service tells nobody that training is over before what it has trained is safe."""

from __future__ import annotations

import threading

import pytest
import toy
from toy import NAMES

from fedbert_jax.runtime.calls import Abort
from fedbert_jax.runtime.frames import encode
from fedbert_jax.runtime.service import Service


def test_training_is_over_for_clients_once_the_last_round_is_saved():
    """A client that has its model doesn't come back: a server that dies before that save would wait for it in vain."""
    made, work = toy.make(rounds=1)
    saving, saved, told = threading.Event(), threading.Event(), list[bool]()

    def on_end() -> None:
        saving.set()
        assert saved.wait(20)

    service = Service(made.session, work, toy.HELLO._replace(secret=""), toy.X, on_end=on_end)

    class Transport:
        def __init__(self, name: str):
            self.name = name

        def call(self, method: str, data: bytes, timeout: float) -> bytes:
            answer = service.call(method, self.name, data)
            if method == "turn" and saving.is_set():
                told.append(b'"done"' in answer)
                saved.set()  # a client has asked in vain, or has been told too early
            return answer

    ends = toy.run(service, {name: Transport(name) for name in NAMES})
    assert ends == dict.fromkeys(NAMES) and told[0] is False and any(told)


WHOLE = toy.HELLO._asdict() | {"incarnation": "1", "blocks": 7}


@pytest.mark.parametrize("meta", [{}, WHOLE | {"config": 7}, WHOLE | {"config": None}])
def test_meta_data_of_another_shape_is_refused_and_no_failure_of_the_servers(meta):
    service, _ = toy.make()
    with pytest.raises(Abort) as refused:
        service.call("join", NAMES[0], encode(meta))
    assert refused.value.code == "INVALID_ARGUMENT" and "the meta data is not as expected" in refused.value.text
