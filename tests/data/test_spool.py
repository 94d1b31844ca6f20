"""Documents come out of the spool as they went in, and nothing of them stays on the disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedbert_jax.data import spool as spool_lib
from fedbert_jax.data.spool import Spool

TEXTS = [("one", "a"), ("", "b"), ("zw\u00f6lf \U0001f600\n\nmore", "a"), ("x" * 1000, "c"), ("y\x00", "b")]


@pytest.mark.parametrize("frame", [1, 10, 1 << 20])
def test_documents_come_out_as_they_went_in(frame: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_lib, "_FRAME", frame)
    with Spool(tmp_path) as spool:
        for text, group in TEXTS:
            spool.add(text, group)
        texts = [text for text, _ in TEXTS]
        assert len(spool) == 5 and spool.names == ["a", "b", "c"]
        assert spool.groups.tolist() == [0, 1, 0, 2, 1]
        assert spool.sizes.tolist() == [len(text) for text in texts]
        for wanted in ([True] * 5, [False] * 5, [False, True, True, False, True]):
            for _ in range(2):
                assert list(spool.texts(np.array(wanted))) == [text for text, yes in zip(texts, wanted, strict=True) if yes]
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="closed"):
        list(spool.texts(np.ones(5, bool)))


def test_an_empty_spool(tmp_path: Path) -> None:
    with Spool(tmp_path) as spool:
        assert list(spool.texts(np.zeros(0, bool))) == [] and spool.sizes.shape == (0,)
