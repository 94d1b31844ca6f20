"""python -m benchmarks.preparing [--text SOURCE] [--tokenizer DIR] [--megabytes 100 1000] [--json FILE]

Times the preparation of text against the datasets library's `map` with the same fast tokenizer on the same cores, with the
peak memory of both. The text is repeated up to the size asked for, each time with a sixth of its words exchanged.

Ours is `python -m fedbert_jax.prepare`: reading, leaving out what came before, dealing to clients, encoding, packing. Theirs
is what `run_mlm.py` of the transformers library does: `load_dataset`, `map` that encodes, `map` that joins and cuts, each
with a process a core. Each runs in processes of its own, one after the other, with an empty cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import facts
from fedbert_jax.config import DataConfig
from fedbert_jax.data.corpus import read_documents
from fedbert_jax.data.tokenizer import load_tokenizer, save_tokenizer
from fedbert_jax.data.vocabulary import train_tokenizer

SEQ_LEN = 128
EXCHANGED = 1 / 6  # of the words of each repetition
CLIENTS = 100
SECONDS = 0.05  # between two looks at the memory


def write_text(documents: Sequence[str], megabytes: int, path: Path, seed: int = 0) -> int:
    """Writes JSON lines of `client` and `text` up to a size, and returns their number; no two repetitions are alike."""
    rng = np.random.default_rng(seed)
    split = [np.array(document.split(), object) for document in documents]
    words = np.concatenate(split)
    left, rows = megabytes * 1_000_000, 0
    with path.open("w", encoding="utf-8") as file:
        while left > 0:
            for document in split:
                changed = np.where(rng.random(len(document)) < EXCHANGED, rng.choice(words, len(document)), document)
                line = json.dumps({"client": f"client-{rows % CLIENTS:03d}", "text": " ".join(changed)}) + "\n"
                file.write(line)
                left, rows = left - len(line), rows + 1
                if left <= 0:
                    break
    return rows


def measured(command: Sequence[str], folder: Path) -> tuple[float, int, int]:
    """Runs a command; returns its seconds, the peak of its processes' own memory together, and of what it takes of the disk.

    Own memory is what no file holds (RssAnon of /proc/PID/status, summed over the command's process group).
    """
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    with (folder / "log").open("w") as log:
        start, peak = time.perf_counter(), 0
        free = least = shutil.disk_usage(folder).free
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=folder, env=env
        )
        while process.poll() is None:
            peak = max(peak, sum(_own(process.pid)))
            least = min(least, shutil.disk_usage(folder).free)
            time.sleep(SECONDS)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{(folder / 'log').read_text()[-2000:]}")
    return seconds, peak, free - least


def _own(group: int) -> Iterator[int]:
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                if os.getpgid(int(entry.name)) == group:
                    status = Path(entry.path, "status").read_text()
                    yield 1024 * int(status.partition("RssAnon:")[2].split()[0])
            except (OSError, IndexError, ValueError):  # it ended meanwhile
                continue


def theirs(text: Path, tokenizer_name: str, out: Path, processes: int) -> None:
    """The datasets library's way; saves nothing but its own cache."""
    import datasets

    tokenizer = load_tokenizer(tokenizer_name)
    rows = datasets.load_dataset("json", data_files=str(text), split="train", cache_dir=str(out))
    asked: dict[str, Any] = dict(
        add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    encoded = rows.map(
        lambda batch: tokenizer(batch["text"], **asked), batched=True, num_proc=processes, remove_columns=rows.column_names
    )

    def blocks(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        stream = [token for ids in batch["input_ids"] for token in (*ids, tokenizer.sep_token_id)]
        width = SEQ_LEN - 1
        return {
            "input_ids": [[tokenizer.cls_token_id, *stream[i : i + width]] for i in range(0, len(stream) - width + 1, width)]
        }

    packed = encoded.map(blocks, batched=True, num_proc=processes)
    (out / "tokens").write_text(str(len(packed) * SEQ_LEN))


def ours(text: Path, tokenizer: str, out: Path) -> list[str]:
    """Returns the command that prepares the text."""
    data = {"source": f"text:{text}", "client_field": "client", "tokenizer": tokenizer, "seq_len": SEQ_LEN}
    changes = [f"--config.data.{key}={value}" for key, value in data.items()]
    return [sys.executable, "-m", "fedbert_jax.prepare", "--config", "text", "--out", str(out), *changes]


def compare(text: Path, tokenizer: str, folder: Path, cores: int, pairs: int) -> dict[str, Any]:
    """Runs both sides in turn, and returns the medians."""
    sides: dict[str, list[tuple[float, int, int, int]]] = {"fedbert_jax": [], "datasets.map": []}
    for pair in range(pairs):
        for side in sorted(sides, reverse=bool(pair % 2)):
            place = folder / "side"
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            if side == "fedbert_jax":
                found = measured(ours(text, tokenizer, place / "out"), place)
                tokens = np.load(place / "out/train.npy", mmap_mode="r").size + np.load(place / "out/heldout.npy", "r").size
            else:
                here = [sys.executable, "-m", "benchmarks.preparing", "--theirs", str(text), "--tokenizer", tokenizer]
                found = measured([*here, "--processes", str(cores), "--out", str(place)], place)
                tokens = int((place / "tokens").read_text())
            sides[side].append((*found, tokens))
            print(f"  {side}: {found[0]:.1f} s, {tokens:,} tokens, {found[1] / 1e6:,.0f} MB of memory, "
                  f"{found[2] / 1e6:,.0f} MB on disk", flush=True)  # fmt: skip
    names = ("seconds", "memory_bytes", "disk_bytes", "tokens")
    return {
        side: dict(zip(names, map(statistics.median, zip(*runs, strict=True)), strict=True)) for side, runs in sides.items()
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="docs:", help="text to repeat, as in data.source (default: docstrings)")
    parser.add_argument("--tokenizer", default="", help="a directory (default: one is trained, of 8,192 tokens)")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where the record goes")
    parser.add_argument("--theirs", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.theirs:
        return theirs(args.theirs, args.tokenizer, args.out, args.processes)
    cores = len(os.sched_getaffinity(0))
    documents = [document.text for document in read_documents(DataConfig(source=args.text))]
    record: dict[str, Any] = {"machine": facts(cores), "sizes": {}}
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = os.path.abspath(args.tokenizer or f"{temporary}/tokenizer")
        if not args.tokenizer:
            save_tokenizer(train_tokenizer(documents, 8192, lowercase=True), Path(tokenizer))
        for megabytes in args.megabytes:
            text = Path(temporary, f"{megabytes}.jsonl")
            rows = write_text(documents, megabytes, text)
            print(f"{megabytes:,} MB, {rows:,} documents of {CLIENTS} clients, {cores} cores", flush=True)
            found = record["sizes"][str(megabytes)] = compare(text, tokenizer, Path(temporary), cores, args.pairs)
            rates = {side: values["tokens"] / values["seconds"] for side, values in found.items()}
            print(f"  tokens a second: {rates['fedbert_jax']:,.0f} against {rates['datasets.map']:,.0f}", flush=True)
            text.unlink()
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
