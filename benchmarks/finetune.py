"""`python -m benchmarks.finetune`: fine-tuning on SST-2 for an epoch, against a torch loop over the same batches."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks import machine, tables
from benchmarks.pairs import Row, Side, compare

STEPS, BATCH, DROPOUT, RATE, CLIP = 8, 32, 0.1, 3e-4, 1.0  # STEPS of BATCH sequences make a round
ROWS = (Row("fine-tuning/torch loop", "jax", "torch", 1.0),)
WORDS = "a an the this that film movie story plot cast is was seems good bad dull funny warm cold very not never too".split()


def synthetic_task(root: Path, examples: int, longest: int = 40) -> Path:
    """Writes an SST-2 of random phrases of two to `longest` words, mostly short; returns its folder's parent."""
    rng, folder = np.random.default_rng(0), root / "SST-2"
    folder.mkdir(parents=True)
    for name, count in (("train", examples), ("dev", 64)):
        lengths = np.clip(rng.lognormal(1.9, 0.8, count).astype(int), 2, longest)
        phrases = [rng.choice(WORDS, n) for n in lengths]
        rows = [f"{' '.join(p)}\t{int('good' in p or 'warm' in p or 'funny' in p)}" for p in phrases]
        (folder / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    return root


def synthetic_model(root: Path, hidden: int = 128) -> Path:
    """Writes a BERT-tiny with random weights and BERT's vocabulary size; returns its folder."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    folder = root / "model"
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=30522,
            hidden_size=hidden,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=4 * hidden,
        )
    ).save_pretrained(folder)
    BertTokenizerFast(vocab={w: n for n, w in enumerate(words)}).save_pretrained(folder)
    return folder


def make_sides(model: Path, glue: Path, rounds: int, root: Path) -> dict[str, Side]:
    """Builds both sides from the same weights; each call of a side trains on the next `rounds` rounds of the same stream."""
    import jax

    from fedbert_jax import config as config_lib
    from fedbert_jax.data.tokenizer import load_tokenizer
    from fedbert_jax.glue import finetune as ft
    from fedbert_jax.glue.examples import read_task
    from fedbert_jax.glue.simulation import Finetuning

    adamw = dict(name="adamw", learning_rate=RATE, weight_decay=0.01, eps=1e-8, clip_norm=CLIP, schedule="constant")
    config = config_lib.from_dict(
        dict(
            task="finetune",
            data=dict(source=f"glue:SST-2@{glue}", tokenizer="", seq_len=128),
            model=dict(init_from=str(model), hidden_dropout=DROPOUT, attention_dropout=DROPOUT),
            federated=dict(strategy="centralized", batch_size=BATCH, local_steps=STEPS),
            client_optimizer=adamw,
            server_optimizer=adamw,
            finetune=dict(epochs=20.0, warmup=0.0),
        )
    )
    tokenizer = load_tokenizer(str(model))
    config, start = ft.resolve(config, tokenizer)
    tuning = Finetuning(config, read_task(config, tokenizer), start, (0,))
    state, _ = tuning.init_state()
    ft.export(tuning, state, tokenizer, root / "start")
    lengths = {}  # a round of each padded length, for compiling and warming up
    for n in range(tuning.rounds // 10):  # two epochs
        lengths.setdefault(tuning.batches(n).tokens.shape[-1], n)
    for n in lengths.values():
        state, metrics = tuning.step(state, n)
        jax.block_until_ready((state, metrics))
    state, metrics = tuning.step(tuning.init_state()[0], 0)
    initial, position = float(metrics.loss[0]), 0  # the mean of the first eight steps
    state, _ = tuning.init_state()

    def run() -> float:
        nonlocal state, position
        losses = []
        for n in range(position, position + rounds):
            state, metrics = tuning.step(state, n)
            losses.append(metrics.loss)
            if len(losses) > 1:
                jax.block_until_ready(losses[-2])  # as the loop of `finetune` does
        jax.block_until_ready((state, losses))
        position += rounds
        return float(np.mean(losses))

    train, torch_initial = torch_loop(root / "start", tuning, lengths)
    torch_position = 0

    def torch_run() -> float:
        nonlocal torch_position
        batches = [tuning.batches(n) for n in range(torch_position, torch_position + rounds)]
        torch_position += rounds
        return train(batches)

    sequences, guess = rounds * STEPS * BATCH, float(np.log(2))
    return {
        "jax": Side("fedbert_jax, centralized", sequences, run, guess, initial),
        "torch": Side("torch loop", sequences, torch_run, guess, torch_initial),
    }


def torch_loop(start: Path, tuning: Any, lengths: dict[int, int]) -> tuple[Callable[[list[Any]], float], float]:
    """Returns a plain loop over `BertForSequenceClassification`, (batches of rounds -> mean loss), and its first loss.

    It is the loop that people write, with the best settings: SDPA attention, fused AdamW, foreach clipping (of each
    segment, like ours), gradients set to None.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        start, attn_implementation="sdpa", hidden_dropout_prob=DROPOUT, attention_probs_dropout_prob=DROPOUT
    ).train()
    plain = [p for p in model.parameters() if p.ndim < 2]
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    groups: list[dict[str, Any]] = [dict(params=decayed), dict(params=plain, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=RATE, weight_decay=0.01, fused=True)
    body = list(model.bert.encoder.parameters())
    client = [p for p in model.parameters() if all(p is not q for q in body)]

    def loss_of(tokens: np.ndarray, types: np.ndarray, sizes: np.ndarray, labels: np.ndarray) -> Any:
        mask = torch.arange(tokens.shape[1])[None] < torch.from_numpy(sizes)[:, None]
        return model(
            torch.from_numpy(tokens),
            attention_mask=mask.long(),
            token_type_ids=torch.from_numpy(types),
            labels=torch.from_numpy(labels).long(),
        ).loss

    def train(batches: list[Any]) -> float:
        losses = []
        for b in batches:
            for k in range(STEPS):
                loss = loss_of(b.tokens[0, k, 0], b.token_types[0, k, 0], b.lengths[0, k, 0], b.labels[0, k, 0, :, 0])
                loss.backward()
                for part in (client, body):
                    torch.nn.utils.clip_grad_norm_(part, CLIP, foreach=True)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                losses.append(loss.detach())
        return float(torch.stack(losses).mean())

    first = tuning.batches(0)
    with torch.no_grad():
        initial = loss_of(
            first.tokens[0, 0, 0], first.token_types[0, 0, 0], first.lengths[0, 0, 0], first.labels[0, 0, 0, :, 0]
        ).item()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    train([tuning.batches(n) for n in lengths.values()])
    model.load_state_dict(weights)
    optimizer.state.clear()
    return train, initial


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetune", description=__doc__)
    parser.add_argument("--model", type=Path, help="a Hugging Face BERT directory (default: a random BERT-tiny)")
    parser.add_argument("--glue", type=Path, help="a folder with GLUE's SST-2 (default: random phrases)")
    parser.add_argument("--samples", type=int, default=7, help="pairs (default: 7)")
    parser.add_argument("--rounds", type=int, default=38, help="rounds of 8 x 32 in a sample (default: 38)")
    parser.add_argument("--threads", type=int, help="cores to use, by JAX and torch alike (default: all)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there, too")
    args = parser.parse_args()
    machine.keep_freed_memory()
    cores = machine.limit_cores(args.threads)
    facts = machine.facts(cores)
    import jax
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    jax.config.update("jax_platforms", "cpu")
    torch.set_num_threads(cores)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = args.model or synthetic_model(root)
        glue = args.glue or synthetic_task(root / "glue", (args.samples + 1) * args.rounds * STEPS * BATCH)
        sides = make_sides(model, glue, args.rounds, root)
        results = [compare(row, sides[row.a], sides[row.b], BATCH, args.samples) for row in ROWS]
    result = {"benchmark": "finetune", "machine": facts, "rows": results}
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    console = Console(width=200)
    console.print(tables.rows_table(ROWS, results), markup=False, highlight=False, soft_wrap=True)
    text, name = "SST-2" if args.glue else "random phrases", args.model.name if args.model else "random BERT-tiny"
    console.print(
        f"ms: for a step of {BATCH} sequences, padded to the batch's length. {args.samples} pairs of "
        f"{args.rounds * STEPS} steps; {text}, {name}, dropout {DROPOUT}, AdamW, clipping of each segment.",
        highlight=False,
    )
    console.print(machine.describe(facts), highlight=False)


if __name__ == "__main__":
    main()
