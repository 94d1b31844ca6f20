"""The report says what the run did, for any run: short, torn, silent, huge, hostile."""

from __future__ import annotations

import base64
import html
import html.parser
import json
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedbert_jax.config import from_dict, to_dict
from fedbert_jax.errors import UserError
from fedbert_jax.report import page as report
from fedbert_jax.report import plots
from fedbert_jax.workdir.log import MetricsLog, to_json

PNGS = ("loss", "accuracy", "clients", "partition", "bytes")
SENT = {"up": {"activations": 3000}, "down": {"hidden_states": 2000}}
HOSTILE = ["numpy", "<script>alert('x')</script>", "_under$\\frac{$", "日本 & co", "a\nb"]


def make_workdir(
    path: Path,
    names: list[str],
    rounds: int = 20,
    every: int = 5,
    sends: bool = True,
    facts: dict[str, Any] | None = None,
    **federated: Any,
) -> Path:
    """Writes the workdir of a run of `rounds` rounds; with `every=0`, the run never evaluates."""
    path.mkdir(parents=True, exist_ok=True)
    config = {"federated": {"num_clients": len(names), "rounds": max(rounds, 1), **federated}}
    (path / "config.json").write_text(to_json(to_dict(from_dict(config))))

    def evaluation(n: int) -> dict[str, Any]:
        loss = 5 + 3.3 * 0.9**n
        clients = {name: {"loss": loss + 0.1 * i, "accuracy": 0.1} for i, name in enumerate(names[:64])}
        scores = {"eval_loss": loss, "eval_accuracy": 0.1, "eval_clients": clients, "eval_clients_scored": len(clients)}
        scores |= {"eval_loss_by_text": loss, "eval_loss_over_clients": loss + 0.125}
        return scores | {"eval_accuracy_by_text": 0.1, "eval_accuracy_over_clients": 0.2}

    with MetricsLog(path / "metrics.jsonl") as log:
        if every:
            log.append({"round": 0, "step": 0, "tokens": 0} | evaluation(0))
        for n in range(1, rounds + 1):
            sent = {"uplink_bytes": 3000 * n * sends, "downlink_bytes": 2000 * n * sends}
            record = {"round": n, "step": 4 * n, "tokens": 4096 * n, "train_loss": 8 - 0.1 * n, "seconds": 0.5} | sent
            log.append(record | (evaluation(n) if every and n % every == 0 else {}))
    clients = [
        {"name": name, "documents": 9 + i, "tokens": 1000 * (i + 1), "share": 0.1, "js_divergence": 0.2}
        for i, name in enumerate(names)
    ]
    known = {
        "clients": clients,
        "baselines": {"commonest_accuracy": 0.062, "unigram_loss": 5.89},
        "parameters": {"client": 554_000, "server": 396_544},
        "bytes_per_round": SENT if sends else {"up": {}, "down": {}},
        "num_clients": len(names),
        "fill_mask": [{"text": "the [MASK] <b>", "predictions": [["sum", 0.31]]}],
    }
    (path / "run.json").write_text(to_json(known if facts is None else facts))
    return path


def png_size(data: bytes) -> tuple[int, int]:
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


class Elements(html.parser.HTMLParser):
    """Collects the tags of a page, and the places it would load from."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]


def check(page: Path) -> str:
    """Asserts what holds for every report, and returns its HTML."""
    text = page.read_text(encoding="utf-8")
    assert page.name == "index.html" and report.THREAT_MODEL in text
    embedded = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', text)]
    assert embedded == [(page.parent / f"{name}.png").read_bytes() for name in PNGS]
    for data in embedded:
        width, height = png_size(data)
        assert width >= 1000 and height >= 150
    elements = Elements()
    elements.feed(text)
    assert elements.seen.isdisjoint({"script", "link", "iframe", "object", "a"}) and "img" in elements.seen
    assert len(elements.sources) == len(PNGS) and all(source.startswith("data:") for source in elements.sources)
    assert not re.search(r"https?:|url\(|@import", text)
    return text


def test_a_report_holds_every_client_escaped_and_nothing_from_outside(tmp_path: Path) -> None:
    text = check(report.write_report(make_workdir(tmp_path / "a <run>", HOSTILE)))
    for name in HOSTILE:
        shown = name.replace("\n", "\\n")
        assert f'<th scope="row">{html.escape(shown)}</th>' in text
    assert "<title>a &lt;run&gt;</title>" in text and "[MASK] &lt;b&gt;" in text
    assert "guessing by frequency at the same places (5.890)" in text
    assert "20 of 20" in text and "81.9 k" in text and "1.22 B" in text  # rounds, tokens, bytes per token


def test_plots_follow_the_numbers(tmp_path: Path) -> None:
    run = report.load_run(make_workdir(tmp_path, ["a", "b", "c"]))
    (axes,) = plots.loss_figure(run).axes
    training, held_out, baseline = axes.get_lines()
    assert held_out.get_xdata()[-1] == pytest.approx(81.92) and "thousands" in axes.get_xlabel()
    assert held_out.get_ydata()[0] == pytest.approx(8.3) and training.get_ydata()[-1] == pytest.approx(6.0)
    assert set(baseline.get_ydata()) == {5.89}
    assert plots.accuracy_figure(run).axes[0].get_lines()[1].get_ydata()[0] == pytest.approx(6.2)
    names = [line.get_label() for line in plots.clients_figure(run).axes[0].get_lines()]
    assert names == ["c", "b", "a"]  # by the lines' ends, the highest first
    up, down = plots.bytes_figure(run).axes[0].get_lines()
    assert (up.get_ydata()[-1], down.get_ydata()[-1]) == (60.0, 40.0)


@pytest.mark.parametrize("count", [12, 13])
def test_many_clients_become_a_band(tmp_path: Path, count: int) -> None:
    run = report.load_run(make_workdir(tmp_path, [f"c{i}" for i in range(count)]))
    (axes,) = plots.clients_figure(run).axes
    lines, bands = len(axes.get_lines()), len(axes.collections)
    assert (lines, bands) == ((12, 0) if count == 12 else (3, 2))
    assert any("c12" in str(line.get_label()) for line in axes.get_lines()) == (count == 13)


def test_thousands_of_clients_are_histograms_and_a_table_of_bounded_length(tmp_path: Path) -> None:
    names = [f"site_{i:04d}" for i in range(3000)]
    text = check(report.write_report(make_workdir(tmp_path, names)))
    assert text.count('<th scope="row">site_') == report.MAX_ROWS and '<th scope="row">site_2999</th>' in text
    assert len(text) < 2_000_000


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"every": 0}, "Nothing has been evaluated yet."),
        ({"rounds": 1, "every": 1}, "not yet better than guessing by frequency"),
        ({"rounds": 0}, "not yet better than guessing by frequency"),
        ({"facts": {}}, "Held-out loss"),
        ({"facts": {"finished": False}}, "Not finished: 20 of 20 rounds."),
        ({"sends": False, "strategy": "centralized"}, "centralized."),
        ({"sends": False, "strategy": "local"}, "local."),
    ],
)
def test_a_run_with_little_to_tell_has_a_report(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    text = check(report.write_report(make_workdir(tmp_path, ["a", "b"], **options)))
    assert sentence in text


def test_without_run_json_and_with_a_torn_line(tmp_path: Path) -> None:
    make_workdir(tmp_path, ["a", "b"])
    (tmp_path / "run.json").unlink()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 21, "tok')
    assert "20 of 20" in check(report.write_report(tmp_path))


def test_held_out_numbers_say_which_mean_they_are_and_of_how_many_clients(tmp_path: Path) -> None:
    many = [f"client {n}" for n in range(70)]
    text = check(report.write_report(make_workdir(tmp_path, many)))
    assert "5.401 by training text, 5.526 over clients; 64 of 70 clients, at the end" in text
    assert "10.0 % by training text, 20.0 % over clients; 64 of 70 clients, at the end" in text
    assert "held-out loss (mean by text, 64 of 70 clients)" in text
    config = json.loads((tmp_path / "config.json").read_text())
    config["federated"]["weighting"] = "uniform"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "held-out loss (mean over 64 of 70 clients)" in check(report.write_report(tmp_path))


def test_a_run_that_diverged_says_so(tmp_path: Path) -> None:
    make_workdir(tmp_path, ["a", "b"])
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        nan = float("nan")
        bad = dict.fromkeys(("eval_loss", "eval_loss_by_text", "eval_loss_over_clients", "eval_accuracy"), nan)
        bad |= {"eval_clients": {"a": {"loss": nan}}, "train_loss": nan}
        log.append({"round": 21, "tokens": 99_999} | bad)
    text = check(report.write_report(tmp_path))
    assert "not finite: training diverged" in text
    assert "not finite by training text, not finite over clients; 2 of 2 clients, at the end" in text


def test_the_command_prints_where_the_report_is_and_refuses_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_workdir(tmp_path / "run", ["a"])
    assert report.main(["--workdir", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "report" / "index.html")
    with pytest.raises(UserError, match=r"config\.json"):
        report.main(["--workdir", str(tmp_path)])
    (tmp_path / "run" / "report" / "index.html").unlink()
    (tmp_path / "run" / "report" / "index.html").mkdir()
    with pytest.raises(UserError, match=r"index\.html can't be written"):
        report.main(["--workdir", str(tmp_path / "run")])
    with pytest.raises(UserError):
        report.write_report(tmp_path / "nowhere")


def test_importing_the_report_imports_neither_matplotlib_nor_jax() -> None:
    code = "import sys, fedbert_jax.report.page; print(sorted({'matplotlib', 'jax'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_configuration_is_on_the_page(tmp_path: Path) -> None:
    text = check(report.write_report(make_workdir(tmp_path, ["a"], local_steps=17)))
    assert f'<tr><th scope="row">federated.local_steps</th><td>{json.dumps(17)}</td></tr>' in text


def test_epsilon_is_on_the_page_where_there_is_one(tmp_path: Path) -> None:
    path = make_workdir(tmp_path / "run", ["a"])
    assert "epsilon" not in check(report.write_report(path)).partition("Configuration")[0]
    with MetricsLog(path / "metrics.jsonl") as log:
        log.append({"round": 21, "tokens": 1, "dp_epsilon": 3.25})
    assert "epsilon 3.250 at delta 1e-05, one client replaced, of what is averaged and of nothing else" in check(
        report.write_report(path)
    )


def test_the_page_says_in_words_what_its_plots_show(tmp_path: Path) -> None:
    text = check(report.write_report(make_workdir(tmp_path, ["north", "south"])))
    loss, accuracy, clients, partition, traffic = re.findall(r'<img alt="([^"]+)"', text)
    assert loss.startswith("Training loss from 7.900 at 4.1 k tokens to 6.000 at 81.9 k; ")
    assert "held-out loss (mean by text, 2 of 2 clients)" in loss
    assert "from 8.300 at 0 tokens to 5.401 at 81.9 k" in loss
    assert "guessing by frequency has 5.890" in loss and "commonest token has 6.2 %" in accuracy
    assert "south 5.501, north 5.401" in clients  # 5 + 3.3 * 0.9 ** 20, and 0.1 more
    assert "south 2 k" in partition and "north 1 k" in partition
    assert traffic.startswith("Sent to the server 60 kB, to the clients 40 kB; in one round activations up 3 kB")
    assert traffic.endswith(", hidden states down 2 kB.")


EMPTY = {"up": SENT["up"] | {"lengths": 0}, "down": SENT["down"]}
OLDER = {"activations_up": 3000, "hidden_states_down": 2000, "lengths_up": 0}


@pytest.mark.parametrize("known", [SENT, EMPTY, OLDER])
def test_messages_are_told_as_older_runs_wrote_them_too(tmp_path: Path, known: dict[str, Any]) -> None:
    run = report.load_run(make_workdir(tmp_path, ["a"], facts={"bytes_per_round": known}))
    assert run.messages == SENT
    names = [label.get_text() for label in plots.bytes_figure(run).axes[1].get_yticklabels()]
    assert names == ["activations up", "hidden states down"]


def test_the_page_is_built_for_those_who_hear_it(tmp_path: Path) -> None:
    text = check(report.write_report(make_workdir(tmp_path, ["a"])))
    assert text.count("<main>") == text.count("</main>") == 1
    places = [text.index(tag) for tag in ("</header>", "<main>", "<h2>", "</main>", "</body>")]
    assert places == sorted(places)
    heads = re.findall(r"<th\b([^>]*)>", text)
    assert set(heads) == {' scope="row"', ' scope="col"'}


def test_the_model_is_described_by_its_own_size(tmp_path: Path) -> None:
    make_workdir(tmp_path, ["a"])
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"] |= {"preset": "base", "num_layers": 3, "hidden_size": 96, "num_heads": 6, "vocab_size": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert '<th scope="row">model</th><td>3 x 96, 6 heads, 4,096 tokens</td>' in check(report.write_report(tmp_path))


def test_a_name_of_any_kind_is_on_the_page(tmp_path: Path) -> None:
    names = ["x" * 10_000, "\x1b[31m", "שלום", "[/i]tiny", "$_{x}$", "😀"]
    text = check(report.write_report(make_workdir(tmp_path / "caf\udce9 [b]", names)))
    assert "<title>caf\\xe9 [b]</title>" in text and "\\x1b[31m</th>" in text and "x" * 10_000 in text
