"""What a party says of itself, by which a federation's parties tell whether they fit."""

from __future__ import annotations

from types import SimpleNamespace

from tiny import tiny_config

import fedbert_jax
from fedbert_jax.runtime.agreement import hello_of


def test_a_party_says_which_messages_it_knows():
    """So that one of earlier code, whose messages have other names, is refused when it joins and not in its first round."""
    tokenizer = SimpleNamespace(backend_tokenizer=SimpleNamespace(to_str=lambda: "{}"))
    assert hello_of(tiny_config(), tokenizer, None).version == f"{fedbert_jax.__version__} (messages 2)"
