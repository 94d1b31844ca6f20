"""The report of one run: plots, and a self-contained HTML page.

`python -m fedbert_jax.report --workdir DIR` writes it at any time, also for a run that has not finished.
"""

from __future__ import annotations

import base64
import html
import json
import math
import os
import string
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fedbert_jax import cli, disk
from fedbert_jax.config import strategy_title
from fedbert_jax.console.output import shown
from fedbert_jax.errors import UserError
from fedbert_jax.report import plots
from fedbert_jax.report.alt_texts import alt_texts
from fedbert_jax.report.audits import read_audit
from fedbert_jax.report.plots import accuracy_figure, bytes_figure, clients_figure, loss_figure, partition_figure, to_png
from fedbert_jax.report.runs import BYTE_UNITS, Run, duration, load_run, number, percent, quantity

THREAT_MODEL = (
    "The cut keeps raw text and labels at the client; it does not by itself stop a server from inverting activations."
)
MAX_ROWS = 2000  # clients in the table


# --- the page --------------------------------------------------------------------------------------------------------

PLOTS = {
    "loss": (
        loss_figure,
        "Loss",
        "Below the dashed line the model knows more than how often tokens occur. "
        "In training, 20% of the places asked about are not masked, and easier.",
    ),
    "accuracy": (
        accuracy_figure,
        "Accuracy",
        "Masked held-out tokens that the first guess gets right; the dashed line is the commonest token at the same places.",
    ),
    "clients": (clients_figure, "Clients", "Loss on each client's own held-out text, every chosen position masked."),
    "partition": (partition_figure, "Partition", "How much text each holds, and how unlike the whole its words are."),
    "bytes": (bytes_figure, "Traffic", "Bytes between all clients and the server."),
}
# In dark mode, plots are inverted with their hues turned back; the background is what invert(.9) makes of white.
PAGE = string.Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title><style>
:root { --ink: #222; --soft: #666; --line: #e2e2e2; --paper: #fff; color-scheme: light dark }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --soft: #9a9a9a; --line: #383838; --paper: #1a1a1a }
  img { filter: invert(.9) hue-rotate(180deg) } }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 66rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .5rem }
.soft, figcaption { color: var(--soft); font-size: .9rem } p { margin: .3rem 0; max-width: 46rem }
.key { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: 1rem; margin: 1.5rem 0 }
.key div { border-top: 2px solid var(--line); padding-top: .4rem }
.key b { display: block; color: var(--ink); font-size: 1.35rem }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 2rem 1.5rem }
figure { margin: 0 } .plots h2 { margin-top: 0 } img { width: 100%; height: auto }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; font-weight: normal; padding: .25rem 1.2rem .25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: break-word; unicode-bidi: isolate }
.facts th, thead th { color: var(--soft) } .facts td { overflow-wrap: anywhere }
.numbers td, .numbers th + th { text-align: right } .numbers td { white-space: nowrap }
.numbers tbody th { min-width: 6rem; max-width: 16rem; overflow-wrap: anywhere }
summary { cursor: pointer }
</style></head><body>
<header><h1>$title</h1><p class="soft">$subtitle</p></header>
<main>
<div class="key">$key</div>
<div class="plots">$plots</div>
$sections
<section><h2>What the cut protects</h2><p>$threat_model</p></section>
</main>
</body></html>
""")


def write_report(workdir: str | os.PathLike[str]) -> Path:
    """Writes `report/` into a workdir, over an earlier one: five PNGs and index.html, whose path it returns.

    The run may still be going on, and run.json may be missing.

    Raises:
      UserError: if `workdir` is no workdir, or holds no metrics yet.
    """
    run = load_run(workdir)
    directory = run.workdir / "report"
    images = {name: to_png(draw(run)) for name, (draw, _, _) in PLOTS.items()}
    page = directory / "index.html"
    with disk.writing(directory):
        directory.mkdir(exist_ok=True)
        for name, image in images.items():
            (directory / f"{name}.png").write_bytes(image)
        page.write_text(_page(run, images), encoding="utf-8")
    return page


def facts(run: Run) -> dict[str, str]:
    """Returns the facts that a reader first asks for about a run, in words."""
    c, f = run.config, run.facts
    clients = f.get("num_clients") or c["federated.num_clients"]
    cohort = f.get("clients_per_round") or c["federated.clients_per_round"] or clients
    parameters = f.get("parameters") or {}
    versions = [f"{name} {version}" for name, version in (f.get("versions") or {}).items()]
    sequences = f"{c['federated.batch_size']} sequences of {c['data.seq_len']} tokens"
    return {
        "strategy": strategy_title(*(c[f"federated.{key}"] for key in ("strategy", "body", "average"))),
        "clients": f"{_count(clients)}, of them {_count(cohort)} a round",
        "local steps": f"{c['federated.local_steps']} a round, each of {sequences} a client",
        "rounds": f"{run.rounds:,} of {c['federated.rounds']:,}",
        "held-out loss": _both(run, "eval_loss", number),
        "held-out accuracy": _both(run, "eval_accuracy", percent),
        "held-out text": f"every chosen position masked; of a client, {c['eval.max_blocks']:,} blocks at most",
        "tokens": quantity(run.tokens),
        "bytes a token": quantity(run.bytes / run.tokens if run.tokens else None, BYTE_UNITS),
        "time": duration(run.seconds),
        "tokens a second": quantity(run.tokens / run.seconds if run.seconds else None),
        "device": str(f.get("device") or "–"),
        "model": _model(c),
        "parameters": f"{quantity(parameters.get('client'))} at a client, "
        f"{quantity(parameters.get('server'))} at the server",
        "text": f"{c['data.source']}, partition {c['data.partition.kind']}",
        "tokenizer": c["data.tokenizer"],
        **({} if run.final("dp_epsilon") is None else {"differential privacy": _epsilon(run)}),
        "wire": f"{c['wire.codec']}, {c['wire.downlink']} hidden states down",
        "seed": str(c["seed"]),
        "versions": ", ".join(versions) or "–",
    }


def _model(c: dict[str, Any]) -> str:
    """Returns the model's own sizes, any of which may differ from the preset's."""
    sizes = [c[f"model.{name}"] for name in ("num_layers", "hidden_size", "vocab_size")]
    if None in sizes:  # the run never began
        return str(c["model.preset"])
    layers, width, words = sizes
    start = f", begun from {c['model.init_from']}" if c["model.init_from"] else ""
    return f"{layers} x {width}, {c['model.num_heads']} heads, {words:,} tokens{start}"


def _epsilon(run: Run) -> str:
    """Returns what the differential privacy of a run's averages amounts to."""
    epsilon, delta = run.final("dp_epsilon"), run.config["privacy.dp_delta"]
    return f"epsilon {number(epsilon)} at delta {delta:g}, one client replaced, of what is averaged and of nothing else"


def _both(run: Run, key: str, show: Callable[[float | None], str]) -> str:
    """Returns both means at the end, by name, or the headline alone if they are not known."""
    by_text, over_clients = run.final(f"{key}_by_text"), run.final(f"{key}_over_clients")
    if by_text is None or over_clients is None:
        return f"{show(run.final(key))} at the end"
    clients = run.scope.rpartition("mean over ")[2].rpartition("mean by text, ")[2]
    return f"{show(by_text)} by training text, {show(over_clients)} over clients; {clients}, at the end"


def _page(run: Run, images: dict[str, bytes]) -> str:
    words, scope = facts(run), f" ({run.scope})" if run.scope else ""
    finished = run.facts.get("finished", run.rounds >= run.config["federated.rounds"])
    unfinished = "" if finished else f" Not finished: {words['rounds']} rounds."
    key = {
        f"held-out loss{scope}": number(run.final("eval_loss")),
        f"held-out accuracy{scope}": percent(run.final("eval_accuracy")),
        "tokens": words["tokens"],
        "bytes sent": quantity(run.bytes, BYTE_UNITS),
        "training time": words["time"],
    }
    words_of = alt_texts(run)
    plots = [
        f'<figure><h2>{title}</h2><img alt="{_escape(words_of[name])}" src="data:image/png;base64,'
        f'{base64.b64encode(images[name]).decode()}"><figcaption>{caption}</figcaption></figure>'
        for name, (_, title, caption) in PLOTS.items()
    ]
    plots.append("<section><h2>The run</h2>" + _table(words.items()) + "</section>")
    return PAGE.substitute(
        title=_escape(run.workdir.resolve().name),
        subtitle=_escape(f"{words['strategy']}. {_verdict(run)}{unfinished}"),
        key="".join(f'<div class="soft">{name}<b>{_escape(value)}</b></div>' for name, value in key.items()),
        plots="".join(plots),
        sections=_audit(run) + _fill_mask(run) + _clients(run) + _config(run),
        threat_model=_escape(THREAT_MODEL),
    )


def _verdict(run: Run) -> str:
    loss, unigram = run.final("eval_loss"), (run.facts.get("baselines") or {}).get("unigram_loss")
    if loss is None:
        return "Nothing has been evaluated yet."
    if not math.isfinite(loss):
        return "The held-out loss is not finite: training diverged."
    said = f"Held-out loss {loss:.3f}" + (f" ({run.scope})" if run.scope else "")
    if unigram is None:
        return f"{said}."
    if loss >= unigram:
        return f"{said}: not yet better than guessing by frequency at the same places ({unigram:.3f})."
    return f"{said}, {unigram - loss:.3f} below guessing by frequency at the same places ({unigram:.3f})."


def _clients(run: Run) -> str:
    """Returns the table of clients, the largest first, with each one's last evaluation."""
    evaluated: dict[str, Any] = next((row["eval_clients"] for row in run.metrics[::-1] if row.get("eval_clients")), {})
    known = {str(client["name"]): client for client in run.facts.get("clients") or [] if "name" in client}
    names = sorted(dict.fromkeys([*known, *evaluated]), key=lambda name: -(known.get(name, {}).get("tokens") or 0))
    if not names:
        return ""
    rows = []
    for name in names[:MAX_ROWS]:
        client, scores = known.get(name, {}), evaluated.get(name) or {}
        counts = [_count(client.get(key)) for key in ("documents", "tokens", "train_blocks", "heldout_blocks")]
        share, divergence = percent(client.get("share")), number(client.get("js_divergence"))
        rows.append([name, *counts, share, divergence, number(scores.get("loss")), percent(scores.get("accuracy"))])
    header = ["client", "documents", "tokens", "training blocks", "held-out blocks"]
    header += ["share", "JS divergence", "loss", "accuracy"]
    left_out = f'<p class="soft">The largest {MAX_ROWS:,}; all are in run.json.</p>' if len(names) > MAX_ROWS else ""
    folded = "" if len(names) <= plots.MAX_BARS else "<details><summary>All in a table</summary>"
    end = "</details>" if folded else ""
    return f"<h2>{len(names):,} clients</h2>{folded}{_table(rows, header, 'numbers')}{left_out}{end}"


def _fill_mask(run: Run) -> str:
    rows = []
    for sentence in run.facts.get("fill_mask") or []:
        guesses = [f"{token} ({probability:.0%})" for token, probability in sentence.get("predictions") or []]
        rows.append((str(sentence.get("text", "")), ", ".join(guesses)))
    return "<h2>Filled in by the model</h2>" + _table(rows, ("sentence", "guesses"), "") if rows else ""


def _audit(run: Run) -> str:
    """Returns what an audit has read off the run's messages, if there was one."""
    rows = []
    for row in read_audit(run.workdir):
        found = f"AUC {number(row.get('auc'))}" if row.get("top1") is None else percent(row["top1"])
        floor = number(row.get("floor_unigram")) if row.get("top1") is None else percent(row.get("floor_unigram"))
        rows.append((str(row["knows"]).replace("_", " "), str(row["attack"]), str(row["of"]), found, floor))
    if not rows:
        return ""
    said = "The floor is what guessing gives: always the commonest word, or, of words, how frequent they are."
    table = _table(rows, ("who knows", "attack", "of", "recovered", "floor"), "numbers")
    return f'<h2>Read off what crossed</h2>{table}<p class="soft">{said}</p>'


def _config(run: Run) -> str:
    rows = [(key, json.dumps(value)) for key, value in sorted(run.config.items())]
    return f"<h2>Configuration</h2><details><summary>All {len(rows)} keys</summary>{_table(rows)}</details>"


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _escape(text: str) -> str:
    """Returns text for HTML, in which nothing is a tag and everything can be encoded."""
    return html.escape(shown(text))


def _table(rows: Iterable[Sequence[str]], header: Sequence[str] = (), style: str = "facts") -> str:
    head = "".join(f'<th scope="col">{_escape(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{_escape(first)}</th>' + "".join(f"<td>{_escape(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f'<div class="wide"><table class="{style}">{head}<tbody>{body}</tbody></table></div>'


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code.

    Raises:
      UserError: if there is no such run, or its report can't be written.
    """
    parser = cli.Parser(prog=cli.program("report"), description="Writes the report of a run.")
    parser.add_argument("--workdir", required=True, help="of a run that has finished, stopped or is still going on")
    flags = parser.parse_args(arguments)
    try:
        page = write_report(flags.workdir)
    except OSError as e:
        raise UserError(f"the report {e.filename or flags.workdir} can't be written ({e.strerror}).") from e
    print(shown(page))
    return 0
