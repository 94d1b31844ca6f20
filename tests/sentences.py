"""A tiny GLUE of made-up sentences, a tokenizer of its words, and the config of a run on it, for tests of fine-tuning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from transformers import BertTokenizerFast

from fedbert_jax import config as config_lib

WORDS = "the a film play song was is good bad dull bright long short very not never always".split()


def write_tokenizer(root: Path) -> BertTokenizerFast:
    """A tokenizer of whole words, in a directory of its own (`name_or_path`)."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (root / "vocab.txt").write_text("\n".join(words) + "\n")
    made = BertTokenizerFast(vocab={w: n for n, w in enumerate(words)}, do_lower_case=True)
    made.save_pretrained(root)
    made.name_or_path = str(root)
    return made


def write_glue(root: Path) -> Path:
    """SST-2 and STS-B in GLUE's layout: sentences with "good" are positive; a pair's score counts its common words."""
    rng = np.random.default_rng(0)
    sentences = [" ".join(rng.choice(WORDS, rng.integers(3, 12))) for _ in range(96)]
    (root / "SST-2").mkdir()
    (root / "STS-B").mkdir()
    for name, part in (("train", sentences[:72]), ("dev", sentences[72:])):
        rows = [f"{s}\t{int('good' in s)}" for s in part]
        (root / "SST-2" / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
        header = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
        pairs = zip(part, part[1:] + part[:1], strict=True)
        common = ((a, b, min(len({*a.split()} & {*b.split()}), 5)) for a, b in pairs)
        rows = [f"{n}\tg\tf\ty\t0\tn\tn\t{a}\t{b}\t{score}" for n, (a, b, score) in enumerate(common)]
        (root / "STS-B" / f"{name}.tsv").write_text("\n".join([header, *rows]) + "\n")
    (root / "SST-2" / "test.tsv").write_text("index\tsentence\n0\ta good film\n1\ta bad film\n")
    return root


def make_config(tokenizer: BertTokenizerFast, glue: Path, task: str = "SST-2", **sections: dict) -> config_lib.Config:
    adamw = dict(name="adamw", learning_rate=1e-3, weight_decay=0.01, eps=1e-3, clip_norm=None, schedule="constant")
    values: dict = dict(
        task="finetune",
        data=dict(source=f"glue:{task}@{glue}", tokenizer=tokenizer.name_or_path, seq_len=32),
        model=dict(hidden_size=16, num_layers=1, num_heads=2, max_position_embeddings=32),
        federated=dict(strategy="centralized", batch_size=8, local_steps=2),
        client_optimizer=adamw,
        server_optimizer=adamw,
        finetune=dict(epochs=2.0, warmup=0.0),
    )
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return config_lib.from_dict(values)
