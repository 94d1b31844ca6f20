"""The model card: a README.md for the hub, which says what a model is, how it was trained, and how well it did at what.

Names of clients and labels are data, so they are escaped. Paths on the run's machine are left out.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fedbert_jax import __version__
from fedbert_jax.config import Arrangement, Config, ModelConfig, listed

PAPER = "[FedBERT](https://doi.org/10.1145/3510033) (Tian et al., ACM TIST 2022)"
CUT = (
    "A cut (strategies `parallel` and `sequential`) keeps raw text and labels at the clients during training. It does not "
    "by itself stop a server from inverting activations, whoever also holds the client segment can read tokens and labels "
    "off what crosses, and the model may repeat what it was trained on."
)
# The two means of a run's evaluation: the suffixes of their fields, and what they are.
MEANS = {"_by_text": "mean weighted by the clients' training text", "_over_clients": "mean over clients, all weighted alike"}


def _how(how: Arrangement) -> str:
    if how.cut or how.averages:
        return "by federated split learning" if how.cut else "by federated learning"
    return "on the text of all clients together" if how.pools_text else "by one client alone"


def _tags(how: Arrangement) -> list[str]:
    return ["federated-learning"] * (how.cut or how.averages) + ["split-learning"] * how.cut


def model_card(config: Config, facts: Mapping[str, Any]) -> str:
    """Returns the README.md of a pre-trained model.

    Args:
      config: the run's config, resolved.
      facts: what is known of the run, any of: `round`, `tokens`, `num_clients`, `clients_per_round`, `dp` (what its
        differential privacy amounts to), `client` (the client whose model it is, if each has its own), `client_scores` (its
        loss and accuracy), `eval_round`, `eval_clients_scored`, and `eval_loss`, `eval_accuracy`, `unigram_loss`,
        `commonest_accuracy`, each also with the suffixes of `MEANS`.
    """
    f, d, m = config.federated, config.data, config.model
    scores = _scores(config, facts)
    step = f"{f.batch_size} sequences of {d.seq_len} tokens"
    rows = {
        "strategy": f.title,
        "clients": _clients(facts),
        "whose model": f"the client {_plain(facts['client'])}'s own" if facts.get("client") else None,
        "rounds": f"{facts['round']:,}, each of {f.local_steps} steps of {step} a client" if "round" in facts else None,
        "training tokens": f"{facts['tokens']:,}, all clients' together" if "tokens" in facts else None,
        "started from": origin(config),
        "text": _text(config),
        "tokenizer": f"WordPiece, trained on that text, up to {int(d.tokenizer[6:]):,} tokens"
        if d.tokenizer.startswith("train:")
        else None,
        "held-out text": f"{d.eval_fraction:.1%} of each client's words or more, as whole documents, never its only one; "
        "then without what is repeated elsewhere",
        # The noise on what was averaged follows from it, and whoever gets this card could subtract it.
        "seed": config.seed if config.privacy.dp == "none" else None,
        "differential privacy": facts.get("dp"),
    }
    further = "further " if m.init_from else ""
    head = metadata(config, "fill-mask", f"bert-{m.num_layers}x{m.hidden_size}", scores.results)
    return (
        "\n\n".join(
            [
                head,
                f"# A BERT pre-trained {further}{_how(f.arrangement)}",
                f"{layers(m)}, {m.num_heads} heads, a vocabulary of {m.vocab_size:,}, "
                f"{m.max_position_embeddings} positions. "
                f"Trained by fedbert_jax {__version__}, which implements {PAPER}.",
                "## How to use it",
                snippet(
                    'fill = pipeline("fill-mask", model=name)',
                    'print(fill(f"This is a {fill.tokenizer.mask_token} sentence."))',
                ),
                "## How it was trained",
                table(rows.items()),
                "## How well it does",
                scores.text,
                "## Before you use it",
                CUT,
            ]
        )
        + "\n"
    )


class _Scores(NamedTuple):
    """The evaluation of a pre-training run, as text and as the hub's metadata."""

    text: str
    results: list[Any]  # `EvalResult`s


def _scores(config: Config, facts: Mapping[str, Any]) -> _Scores:
    own, scored, of = facts.get("client"), facts.get("eval_clients_scored"), facts.get("num_clients")
    figures: list[tuple[str, Any, Any]] = []  # what was scored, loss, accuracy
    guesses: list[tuple[str, Any, Any]] = []
    if own:
        mine = facts.get("client_scores") or {}
        figures = [("this client's own held-out text", mine.get("loss"), mine.get("accuracy"))]
    else:
        ends = list(MEANS) if config.federated.weighting == "examples" else list(MEANS)[::-1]  # the headline first
        clients = f", {scored:,} of {of:,} clients" if scored is not None and of is not None else ""
        for end in [end for end in ends if facts.get(f"eval_loss{end}") is not None] or [""]:
            mean = MEANS.get(end, "held-out text")
            figures.append((mean + clients, facts.get(f"eval_loss{end}"), facts.get(f"eval_accuracy{end}")))
            by_chance = facts.get(f"unigram_loss{end}"), facts.get(f"commonest_accuracy{end}")
            guesses.append((f"guessing by frequency, {mean}", *by_chance))
    figures, guesses = ([row for row in rows if None not in row] for rows in (figures, guesses))
    if not figures:
        whose = "This client's held-out text was not scored" if own else "No held-out text was scored"
        return _Scores(f"{whose}: how well the model predicts text that it has not seen is not known.", [])
    rows = [(of_what, f"{loss:.3f}", f"{accuracy:.1%}") for of_what, loss, accuracy in figures + guesses]
    when = f" The figures are of round {facts['eval_round']:,}." if facts.get("eval_round") is not None else ""
    source = [*listed(config.export.datasets), "held-out-text"][0]
    results = [
        result(
            "fill-mask",
            source,
            f"{_text(config, plain=True)}, held out",
            metric,
            rounded(value),
            f"{name} at masked held-out positions, {of_what}",
            task="Masked language modelling",
        )
        for of_what, loss, accuracy in figures
        for metric, value, name in (("accuracy", accuracy, "accuracy"), ("loss", loss, "cross-entropy in nats"))
    ]
    text = _definition(config, bool(own), bool(guesses)) + when
    return _Scores(f"{text}\n\n{table(rows, ('', 'loss (nats)', 'accuracy'))}", results)


def _definition(config: Config, own: bool, guesses: bool) -> str:
    """Returns a full definition of the figures."""
    e, words = config.eval, "whole words" if config.mlm.whole_word else "tokens"
    who = "" if own else f" of at most {e.max_clients:,} clients"
    return (
        f"Scored on held-out text, at most {e.max_blocks:,} blocks of {config.data.seq_len} tokens a client{who}, drawn by "
        f"seed. In each, {config.mlm.mask_prob:.0%} of the positions are chosen ({words}), and every one of them becomes "
        "`[MASK]`: what is scored is prediction from context alone. Loss is the mean cross-entropy there, in nats; accuracy "
        "is how often the most probable token is the right one."
        + (
            " Guessing by frequency, at the same positions, knows how often each token is in the training text and nothing "
            "else: its accuracy is that of always saying the commonest token."
            if guesses
            else ""
        )
    )


def metadata(config: Config, pipeline: str, name: str, results: Sequence[Any]) -> str:
    """Returns the YAML block that the hub reads, without the fields that are not known."""
    from huggingface_hub import ModelCardData

    export = config.export
    data = ModelCardData(
        language=listed(export.language) or None,
        license=export.license or None,
        library_name="transformers",
        pipeline_tag=pipeline,
        tags=["bert", *_tags(config.federated.arrangement)],
        base_model=export.base_model or None,
        datasets=listed(export.datasets) or None,
        metrics=list(dict.fromkeys(r.metric_type for r in results if r.metric_type != "loss")) or None,
        model_name=name,
        eval_results=list(results) or None,
    )
    if not results:
        data.pop("model_name")  # it is of use only with results
    return f"---\n{data.to_yaml()}\n---"


def result(
    kind: str,
    dataset: str,
    called: str,
    metric: str,
    value: float,
    what: str,
    *,
    task: str = "Text classification",
    config: str | None = None,
    split: str | None = None,
) -> Any:
    """Returns one figure in the form of the hub's metadata, an `EvalResult`."""
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type=kind,
        task_name=task,
        dataset_type=dataset,
        dataset_name=called,
        dataset_config=config,
        dataset_split=split,
        metric_type=metric,
        metric_value=value,
        metric_name=what,
    )


def _clients(facts: Mapping[str, Any]) -> str | None:
    of, cohort = facts.get("num_clients"), facts.get("clients_per_round")
    return None if of is None else f"{of:,}" + (f", {cohort:,} of them a round" if cohort is not None else "")


def layers(model: ModelConfig) -> str:
    """Returns a model's size in words: "2 layers of 128"."""
    return f"{model.num_layers} layer{'s' * (model.num_layers != 1)} of {model.hidden_size}"


def origin(config: Config) -> str | None:
    """Returns what a run started from, in words; None for random weights."""
    if config.export.base_model:
        return f"[{config.export.base_model}](https://huggingface.co/{config.export.base_model})"
    return "another checkpoint" if config.model.init_from else None


def _text(config: Config, plain: bool = False) -> str:
    """Returns what the text is, in words, without the paths where it was."""
    kind, _, rest = config.data.source.partition(":")
    names = listed(config.export.datasets)
    if names:
        return ", ".join(names if plain else [f"[{name}](https://huggingface.co/datasets/{name})" for name in names])
    if kind == "docs":
        packages = listed(rest)
        return "docstrings of Python packages" + (f" ({', '.join(map(_plain, packages))})" if packages and not plain else "")
    return "own dataset" if kind == "hf" else "own text"


def snippet(*lines: str) -> str:
    """Returns the example of how to use a model, ending in these lines."""
    name = 'name = "OWNER/NAME"  # this model\'s on the hub, or the directory that it is in'
    return "\n".join(["```python", "from transformers import pipeline", "", name, *lines, "```"])


def table(rows: Any, header: Sequence[str] = ("", "")) -> str:
    """Returns a Markdown table; rows whose value is None are left out."""
    found = [row for row in rows if row[-1] is not None]
    rule = ["---"] + ["---:" if len(header) > 2 else "---"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [header, rule, *found])


def rounded(value: float) -> float:
    """Returns a figure rounded to the digits that a card has."""
    return round(float(value), 4)


def _plain(text: str) -> str:
    """Returns text for a cell of a Markdown table that shows it literally: on one line, with all markup escaped."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return re.sub(r"([\\`*_\[\]|~#$!])", r"\\\1", html.escape(text, quote=False))
