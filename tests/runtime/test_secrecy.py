"""What crosses between a client and the server holds no token id, no label and no text; and nothing is unpickled."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from federation import NAMES, Federation, Local
from leaks import runs_in, text_in, windows
from tiny import tiny_config

import fedbert_jax
from fedbert_jax.federated.wire import MESSAGES
from fedbert_jax.runtime.frames import decode, encode

RUN = 8  # consecutive ids: that such a run lies in numbers by chance is out of the question


class Recording(Local):
    """A transport that keeps every frame, either way."""

    frames: list[bytes]

    def call(self, method: str, data: bytes, timeout: float) -> bytes:
        answer = super().call(method, data, timeout)
        self.frames += [data, answer]
        return answer


def recorded(wire: dict[str, Any], **federated: Any) -> tuple[Federation, list[bytes]]:
    """A federation of the real model, evaluated too, with all the frames of its training."""
    config = tiny_config(federated=dict(rounds=2) | federated, wire=wire)
    federation, frames = Federation(config, evaluates=True), list[bytes]()

    def transport(name: str) -> Recording:
        made = Recording(federation.service, name)
        made.frames = frames
        return made

    federation.run(transport=transport)
    return federation, frames


def secrets(federation: Federation) -> tuple[np.ndarray, np.ndarray]:
    """What the clients trained on: all runs of token ids, as they are and as they are masked, and all rows of labels."""
    ids, labels, f = list[np.ndarray](), list[np.ndarray](), federation.config.federated
    for name in NAMES:
        member = federation.participant(name).member
        for round in range(f.rounds):
            rows = member.rows(round)
            ids.append(np.asarray(rows, np.int64))
            for k in range(f.local_steps):
                step = jax.tree.map(lambda x: x[k], rows)  # noqa: B023
                batch = member.programs.draw(step, np.int32(round), np.int32(k)).batch
                ids.append(np.asarray(batch.tokens, np.int64)[None])
                labels.append(np.asarray(batch.labels, np.int64))
    runs = np.concatenate([windows(x, RUN) for x in ids])
    return runs, np.concatenate(labels)


@pytest.mark.parametrize(
    ("federated", "wire"),
    [
        (dict(), dict()),
        (dict(average="gradients"), dict(codec="int8", gradient_codec="int8")),
        (dict(strategy="sequential"), dict(downlink="all")),
        (dict(body="merged"), dict()),
    ],
    ids=str,
)
def test_no_token_id_and_no_label_is_in_any_frame(federated, wire):
    federation, frames = recorded(wire, **federated)
    runs, labels = secrets(federation)
    phases = {barrier.phase for barrier in federation.engine.script(NAMES, 0, True)}
    assert len(frames) > 2 * len(NAMES) * federation.config.federated.rounds * len(phases)
    assert sum(map(len, frames)) > 100_000 and len(runs) > 100 and labels.shape[-1] == 3
    assert runs_in(frames, runs) == []
    for way, sent in (("up", frames[::2]), ("down", frames[1::2])):  # and all that crosses is in the table of messages
        names = {name.partition("/")[0] for frame in sent for name in decode(frame, 1 << 24)[1]}
        assert names and {MESSAGES.get(name) for name in names} == {way}, names
    # Three small numbers as single bytes do lie in floats by chance; as wider ones they don't.
    assert [found for found in runs_in(frames, np.unique(labels, axis=0)) if not found.startswith("uint8")] == []
    for dtype in ("<u2", "<i4"):  # what is looked for is found where it is: in a frame with one row of a batch in it
        array = np.asarray(runs[0]).astype(dtype)
        leak = encode({"id": [1, 0, 0]}, {"h": np.zeros(100, np.float32), "x": array})
        assert f"{array.dtype.name}: {array.tobytes().hex()}" in runs_in([*frames, leak], runs)
        label = np.asarray(labels[0]).astype(dtype)
        assert f"{label.dtype.name}: {label.tobytes().hex()}" in runs_in([encode({}, {"x": label})], labels)


def test_text_is_found_where_it_is():
    text = "The quick brown fox jumps over the lazy dog."
    assert text_in([encode({"text": text})], [text]) and text_in([text.upper().encode("utf-16-le")], [text])
    assert text_in([encode({"text": text[::-1]})], [text]) == []


def test_nothing_in_the_package_unpickles_or_evaluates_what_it_is_sent():
    """Whatever comes over a network is JSON and raw numbers: no module knows another way."""
    banned = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
    seen = 0
    for path in sorted((Path(fedbert_jax.__file__).parent / "runtime").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & banned, (path, node.lineno)
            if isinstance(node, ast.Call):
                seen += 1
                called = node.func.id if isinstance(node.func, ast.Name) else ""
                assert called not in ("eval", "exec", "compile", "__import__"), (path, node.lineno)
                assert not any(k.arg == "allow_pickle" for k in node.keywords), (path, node.lineno)
    assert seen > 1000


def test_what_an_evaluation_asks_is_clipped_and_noised():
    """Held-out text crosses as training text does: with noise that is new for every batch, client and round."""
    still = dict(
        client_optimizer=dict(learning_rate=0.0), server_optimizer=dict(learning_rate=0.0)
    )  # so rounds ask the same
    config = tiny_config(federated=dict(rounds=2, local_steps=1), wire=dict(clip=3.0, noise=0.5), **still)
    federation, asked = Federation(config, evaluates=True), []
    transform = federation.engine.transform

    def noted(tensors: Any) -> Any:
        asked.append(np.asarray(tensors["activations"]))
        return transform(tensors)

    federation.engine.transform = noted
    clients = federation.run()
    drawn = []
    for name in NAMES:
        held = clients[name].held
        assert held is not None
        for questions, _ in federation.shard(name).exam.questions():
            exact = np.asarray(federation.setting.segments.embed(held.segment, questions), np.float64)
            norms = np.linalg.norm(exact, axis=-1, keepdims=True)
            assert norms.min() > 3.5
            apart = [h - exact * (3.0 / norms) for h in asked]
            drawn += [x for x in apart if x.std() < 0.6]  # this batch, in each of the rounds
    assert len(drawn) == len(asked) > len(NAMES)
    assert all(0.45 < x.std() < 0.55 and abs(x.mean()) < 0.02 for x in drawn)
    alike = np.corrcoef([x.ravel() for x in drawn]) - np.eye(len(drawn))
    assert np.abs(alike).max() < 0.1
