"""The command that compares runs side by side.

    python -m fedbert_jax.compare DIR DIR ... [--out DIR] [--json FILE] [--markdown]

Runs that differ only in their seed share a row, as mean ± standard deviation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedbert_jax import cli
from fedbert_jax.console.output import make_console, print_table, shown
from fedbert_jax.errors import UserError
from fedbert_jax.report import audits, compare_plot, comparison
from fedbert_jax.workdir.log import to_json

PRICED = (
    "Audited: by kind of knowledge, what the strongest attack recovers (python -m fedbert_jax.audit); of words, the AUC. "
    "Bytes and time are those of training."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    Raises:
      UserError: for a directory that is not a run, or a file that can't be written.
    """
    parser = cli.Parser(prog=cli.program("compare"), description="Compares runs.")
    parser.add_argument("workdirs", nargs="+", metavar="DIR", help="the workdir of a run")
    parser.add_argument("--out", metavar="DIR", help="write compare.png and compare.json there")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there, as JSON")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    flags = parser.parse_args(arguments)
    groups = comparison.load_groups(flags.workdirs)
    try:
        if flags.out:
            compare_plot.write(groups, flags.out)
        if flags.json:
            numbers = comparison.to_dict(groups) | audits.to_dict(groups)
            Path(flags.json).write_text(to_json(numbers, indent=1) + "\n", encoding="utf-8")
    except OSError as e:
        raise UserError(f"{e.filename or flags.out} can't be written ({e.strerror}).") from e
    warnings = comparison.warn(groups)
    if flags.markdown:
        scope = [said] if (said := comparison.scope(groups)) else []
        warned = [f"> Warning: {shown(sentence)}" for sentence in warnings]
        priced = [f"{table}\n\n{PRICED}"] if (table := audits.to_markdown(groups)) else []
        print("\n\n".join([comparison.to_markdown(groups), *scope, *priced, *warned]))
        return 0
    console = make_console()
    console.width = max(console.width, 112)  # a narrower terminal folds whole lines; rich would drop columns
    print_table(console, comparison.to_table(groups))
    if said := comparison.scope(groups):
        console.print(said, style="dim")
    if (prices := audits.to_table(groups)) is not None:
        console.print()
        print_table(console, prices)
        console.print(PRICED, style="dim")
    for sentence in warnings:
        console.print(f"Warning: {shown(sentence)}", style="yellow")
    return 0


if __name__ == "__main__":
    cli.run(main)
