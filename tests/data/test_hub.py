"""Datasets of the datasets library: saved, in a folder, by file; and what is said when they cannot be had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sources import read, refused, write

from fedbert_jax.data.hub import split_dataset_name


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = [("= One", "a"), ("first", "a"), ("second", "a"), ("= Two", "a"), ("third", "b")]
    lines = [json.dumps({"content": t, "site": s}) for t, s in rows]
    write(tmp_path / "set" / "train.jsonl", "\n".join(lines))
    return tmp_path / "set"


def test_a_dataset_on_disk(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(table.parent / "home"))
    found = read(f"hf:{table}", text_field="content", client_field="site", document_start="= ")
    assert found == [("= One\n\nfirst\n\nsecond", "a"), ("= Two", "a"), ("third", "b")]
    assert len(read(f"hf:{table}", text_field="content")) == 5
    message = refused(f"hf:{table}")
    assert "data.text_field='text'" in message and "content, site" in message
    assert "data.client_field='who'" in refused(f"hf:{table}", text_field="content", client_field="who")
    assert "data.split='dev'" in refused(f"hf:{table}", text_field="content", split="dev")
    assert "no such file or directory" in refused("hf:/no/such/place")


def test_name_and_config_of_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert split_dataset_name("Salesforce/wikitext/wikitext-103-raw-v1") == (
        "Salesforce/wikitext",
        "wikitext-103-raw-v1",
    )
    assert split_dataset_name("owner/name") == ("owner/name", None)
    assert split_dataset_name("name") == ("name", None)
    assert split_dataset_name("mine/deep") == ("mine/deep", None)
    assert split_dataset_name("mine/other") == ("mine", "other")
    assert split_dataset_name(f"{tmp_path}/mine/other") == (f"{tmp_path}/mine", "other")


