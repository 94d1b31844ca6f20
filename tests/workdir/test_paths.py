"""A workdir's files when they are missing or damaged."""

from __future__ import annotations

import pytest

from fedbert_jax.errors import UserError
from fedbert_jax.workdir.paths import Workdir


@pytest.mark.parametrize("text", ['{"clients": [{"na', "", "[1, 2]", '"x"'])
def test_a_cut_short_run_json_is_one_sentence(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"run\.json .*delete it, and it is written anew\.$"):
        Workdir(tmp_path).read_facts()


def test_a_workdir_without_run_json_has_no_facts(tmp_path):
    assert Workdir(tmp_path).read_facts() == {}
