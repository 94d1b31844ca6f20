"""GLUE's official files are read as they are, or refused with the line to mend; submissions have the site's format."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest

from fedbert_jax.errors import UserError
from fedbert_jax.glue import files, submissions, tasks
from fedbert_jax.glue.files import find_tasks, load, read_tsv
from fedbert_jax.glue.submissions import submission_name, write_submission
from fedbert_jax.glue.tasks import TASKS, find_task

PARSES = ["promptID", "pairID", "genre"] + [f"sentence{i}_{kind}" for kind in ("binary_parse", "parse") for i in (1, 2)]
STS = ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2"]

# Task: header of train and dev, header of test. The columns of the text, the label and the index are filled in below.
LAYOUTS = {
    "CoLA": (None, ["index", "sentence"]),
    "SST-2": (["sentence", "label"], ["index", "sentence"]),
    "MRPC": (["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"], ["index", "#1 ID", "#2 ID", "#1 String", "#2 String"]),
    "STS-B": ([*STS, "score"], STS),
    "QQP": (["id", "qid1", "qid2", "question1", "question2", "is_duplicate"], ["id", "question1", "question2"]),
    "MNLI": (
        ["index", *PARSES, "sentence1", "sentence2", "label1", "gold_label"],
        ["index", *PARSES, "sentence1", "sentence2"],
    ),
    "QNLI": (["index", "question", "sentence", "label"], ["index", "question", "sentence"]),
    "RTE": (["index", "sentence1", "sentence2", "label"], ["index", "sentence1", "sentence2"]),
    "WNLI": (["index", "sentence1", "sentence2", "label"], ["index", "sentence1", "sentence2"]),
}
# Task: its text columns, its label column, and labels as files write them, with the values they are read as.
CONTENT: dict[str, tuple[list[str], str, list[tuple[str, float]]]] = {
    "CoLA": (["sentence"], "label", [("1", 1), ("0", 0)]),
    "SST-2": (["sentence"], "label", [("0", 0), ("1", 1)]),
    "MRPC": (["#1 String", "#2 String"], "Quality", [("1", 1), ("0", 0)]),
    "STS-B": (["sentence1", "sentence2"], "score", [("5.000", 5.0), ("0.6", 0.6)]),
    "QQP": (["question1", "question2"], "is_duplicate", [("0", 0), ("1", 1)]),
    "MNLI": (["sentence1", "sentence2"], "gold_label", [("neutral", 1), ("contradiction", 2), ("entailment", 0)]),
    "QNLI": (["question", "sentence"], "label", [("not_entailment", 1), ("entailment", 0)]),
    "RTE": (["sentence1", "sentence2"], "label", [("not_entailment", 1), ("entailment", 0)]),
    "WNLI": (["sentence1", "sentence2"], "label", [("1", 1), ("0", 0)]),
}
FIRST = ['"Where, he asked, is the harbour?', "A line\u2028separator and a next\x85line are no ends.", "Ducks swim."]
SECOND = ["It's at the river's mouth.", 'Nor is a lone " quote.', ""]


def table(path: Path, header: list[str] | None, rows: list[list[str]], bom: str = "", end: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ([header] if header else []) + rows
    path.write_bytes((bom + "".join("\t".join(line) + end for line in lines)).encode())
    return path


def official(name: str, path: Path, test: bool = False, **kind: str) -> Path:
    """Writes the task's rows in GLUE's layout, with filler in the other columns."""
    texts, label, labels = CONTENT[name]
    if name == "CoLA" and not test:
        return table(path, None, [["bk7", text, "", FIRST[i]] for i, (text, _) in enumerate(labels)], **kind)
    header = LAYOUTS[name][test]
    rows = []
    for i, (text, _) in enumerate(labels):
        cells = dict.fromkeys(header, "filler") | {"index": str(i + 7), "id": str(i + 7), label: text}
        cells |= dict(zip(texts, (FIRST[i], SECOND[i]), strict=False))
        rows.append([cells[column] for column in header])
    return table(path, header, rows, **kind)


def refused(path: Path, task: str = "SST-2", labelled: bool = True) -> str:
    with pytest.raises(UserError) as caught:
        read_tsv(TASKS[task], path, labelled)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value).replace(str(path), "FILE")


# --- tasks ---


def test_there_are_the_nine_tasks_with_their_labels_in_the_hub_s_order() -> None:
    assert {name: task.labels for name, task in TASKS.items()} == {
        "CoLA": ("unacceptable", "acceptable"),
        "SST-2": ("negative", "positive"),
        "MRPC": ("not_equivalent", "equivalent"),
        "STS-B": (),
        "QQP": ("not_duplicate", "duplicate"),
        "MNLI": ("entailment", "neutral", "contradiction"),
        "QNLI": ("entailment", "not_entailment"),
        "RTE": ("entailment", "not_entailment"),
        "WNLI": ("not_entailment", "entailment"),
    }
    assert {name for name, task in TASKS.items() if not task.pair} == {"CoLA", "SST-2"}
    assert [name for name, task in TASKS.items() if task.regression] == ["STS-B"]
    assert {name: task.num_outputs for name, task in TASKS.items() if task.num_outputs != 2} == {"STS-B": 1, "MNLI": 3}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_found_however_its_name_is_written(name: str) -> None:
    for written in (name, name.lower(), name.upper(), name.replace("-", ""), name.lower().replace("-", "_")):
        assert find_task(written).name == name


@pytest.mark.parametrize(("written", "nearest"), [("sst", "SST-2"), ("MNLI-m", "MNLI"), ("stsc", "STS-B"), ("qnl", "QNLI")])
def test_another_name_is_refused_with_the_nearest(written: str, nearest: str) -> None:
    with pytest.raises(UserError) as caught:
        find_task(written)
    assert f"nearest is {nearest})" in str(caught.value) and ", ".join(TASKS) in str(caught.value)
    with pytest.raises(UserError):
        find_task("")


# --- files ---


@pytest.mark.parametrize(("bom", "end"), [("", "\n"), ("\ufeff", "\r\n")])
@pytest.mark.parametrize("name", TASKS)
def test_every_layout_is_read(name: str, bom: str, end: str, tmp_path: Path) -> None:
    task, (_, _, labels) = TASKS[name], CONTENT[name]
    n = len(labels)
    official(name, tmp_path / "train.tsv", bom=bom, end=end)
    official(name, tmp_path / "test.tsv", test=True, bom=bom, end=end)
    train, test = read_tsv(task, tmp_path / "train.tsv", True), read_tsv(task, tmp_path / "test.tsv", False)
    for examples in (train, test):
        assert examples.first == FIRST[:n]
        assert examples.second == (SECOND[:n] if task.pair else None)
    assert train.labels is not None and train.labels.dtype == (np.float32 if task.regression else np.int32)
    np.testing.assert_array_equal(train.labels, np.array([value for _, value in labels], train.labels.dtype))
    assert test.labels is None
    numbered = [str(i + 7) for i in range(n)]
    assert test.ids == numbered
    assert train.ids == (["0", "1"] if name in ("CoLA", "SST-2", "MRPC") else numbered)  # their train has no index


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if not task.regression])
def test_label_ids_mean_what_the_labels_say(name: str, tmp_path: Path) -> None:
    """A 1 of the 0/1 files is the label of id 1, and a spelled label is the label of that name."""
    labels = read_tsv(TASKS[name], official(name, tmp_path / "dev.tsv"), True).labels
    assert labels is not None
    meanings = {"0": TASKS[name].labels[0], "1": TASKS[name].labels[1]}
    assert [TASKS[name].labels[i] for i in labels] == [meanings.get(text, text) for text, _ in CONTENT[name][2]]


def test_columns_go_by_their_header_not_their_place(tmp_path: Path) -> None:
    path = table(tmp_path / "x.tsv", ["label", "extra", "sentence"], [["1", "?", "A wide plain."]])
    assert read_tsv(TASKS["SST-2"], path, True).first == ["A wide plain."]
    mnli = ["sentence2", "label1", "label2", "gold_label", "sentence1"]  # dev's annotators must not be taken for gold
    path = table(tmp_path / "y.tsv", mnli, [["b", "neutral", "neutral", "entailment", "a"]])
    found = read_tsv(TASKS["MNLI"], path, True)
    assert (found.first, found.second, found.labels.tolist()) == (["a"], ["b"], [0])


def test_blank_lines_at_the_end_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_bytes(b"sentence\tlabel\r\nSnow fell.\t1\r\n\r\n\n")
    assert read_tsv(TASKS["SST-2"], path, True).first == ["Snow fell."]
    path.write_bytes(b"sentence\tlabel\nSnow fell.\t1")  # nor is a line end at the end needed
    assert read_tsv(TASKS["SST-2"], path, True).first == ["Snow fell."]


@pytest.mark.parametrize(
    ("task", "text", "said"),
    [
        ("SST-2", "sentence\tlabel\nfine\t1\nno label\n", "FILE line 3 has 1 columns, not 2: sentence, label."),
        ("SST-2", "sentence\tlabel\n\nfine\t1\n", "FILE line 2 has 1 columns, not 2"),
        ("SST-2", "sentence\tlabel\nso\tso\t1\n", "FILE line 2 has 3 columns, not 2"),
        ("CoLA", "bk7\t1\t\tBirds fly.\nbk7\t1\tBirds fly.\n", "FILE line 2 has 3 columns, not 4"),
        ("SST-2", "sentence\tlabel\nfine\t1\nfine\t2\n", "FILE line 3: '2' is no label of SST-2; accepted: 0, 1."),
        ("CoLA", "bk7\tyes\t\tBirds fly.\n", "FILE line 1: 'yes' is no label of CoLA; accepted: 0, 1."),
        ("RTE", "sentence1\tsentence2\tlabel\na\tb\t1\n", "'1' is no label of RTE; accepted: entailment, not_entailment."),
        ("SST-2", "sentence\tlabels\nfine\t1\n", "names no column 'label', which SST-2 needs; there are: sentence, labels."),
        ("RTE", "index\tsentence1\tlabel\n0\ta\t1\n", "FILE line 1 names no column 'sentence2'"),
        ("STS-B", "sentence1\tsentence2\tscore\na\tb\t5.1\n", "'5.1' is no score of STS-B; accepted: a number from 0 to 5."),
        ("STS-B", "sentence1\tsentence2\tscore\na\tb\t-0.1\n", "FILE line 2: '-0.1' is no score"),
        ("STS-B", "sentence1\tsentence2\tscore\na\tb\tnan\n", "FILE line 2: 'nan' is no score"),
        ("STS-B", "sentence1\tsentence2\tscore\na\tb\thigh\n", "FILE line 2: 'high' is no score"),
        ("SST-2", "", "FILE has no examples"),
        ("SST-2", "sentence\tlabel\n\n", "FILE has no examples"),
        ("SST-2", "a fine film\t1\n", "FILE line 1 names no column 'sentence'"),
        ("CoLA", "\n", "FILE has no examples"),
    ],
)
def test_what_is_not_as_official_is_refused_with_its_line(task: str, text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    path.write_text(text)
    assert said in refused(path, task)


def test_bytes_that_are_no_text_are_refused_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    path.write_bytes("sentence\tlabel\ncafé\t1\n".encode("latin-1"))
    assert "FILE line 2 is not UTF-8 text: byte 18 of" in refused(path)
    path.unlink()
    assert "FILE does not exist" in refused(path)
    path.mkdir()
    assert "FILE cannot be read" in refused(path)


def test_only_qqp_s_labelled_files_may_have_a_few_broken_rows(tmp_path: Path) -> None:
    """A question with a line break inside, as in the official train.tsv, makes two lines that are no rows."""
    header = LAYOUTS["QQP"][0]
    whole = ["4", "5", "6", "Is it late?", "Is it dark?", "0"]
    broken = [["1", "2", "3", "Is this"], ["one?", "Or two?", "1"]]
    found = read_tsv(TASKS["QQP"], table(tmp_path / "train.tsv", header, [*broken, whole]), True)
    assert (found.first, found.ids) == (["Is it late?"], ["4"])
    path = table(tmp_path / "many.tsv", header, [*broken * 50, whole, *broken])
    assert "FILE line 103 has 4 columns, not 6" in refused(path, "QQP")
    assert "FILE has no examples: none of its lines has 6" in refused(table(tmp_path / "none.tsv", header, broken), "QQP")
    path = table(tmp_path / "test.tsv", LAYOUTS["QQP"][1], [["0", "Why?"], ["1", "Why?", "When?"]])
    assert "FILE line 2 has 2 columns, not 3" in refused(path, "QQP", labelled=False)


# --- folders ---


@pytest.mark.parametrize("folder", ["STS-B", "sts-b", "STSB", "sts_b"])
def test_a_task_s_folder_is_found_or_is_the_directory_itself(folder: str, tmp_path: Path) -> None:
    official("STS-B", tmp_path / folder / "train.tsv")
    for directory in (tmp_path, tmp_path / folder):
        found = load(TASKS["STS-B"], directory, ["train"])
        assert list(found) == ["train"] and found["train"].first == FIRST[:2]


def test_the_official_folder_name_comes_first(tmp_path: Path) -> None:
    table(tmp_path / "SST-2" / "train.tsv", ["sentence", "label"], [["official", "1"]])
    for other in ("SST--2", "SST2"):  # one sorts before it
        table(tmp_path / other / "train.tsv", ["sentence", "label"], [["other", "1"]])
    assert load(TASKS["SST-2"], tmp_path, ["train"])["train"].first == ["official"]


def test_mnli_has_two_dev_and_two_test_sets(tmp_path: Path) -> None:
    task = TASKS["MNLI"]
    dev, test = files.dev_splits(task), tasks.test_splits(task)
    assert dev == ("dev_matched", "dev_mismatched") and test == ("test_matched", "test_mismatched")
    assert (files.dev_splits(TASKS["RTE"]), tasks.test_splits(TASKS["RTE"])) == (("dev",), ("test",))
    for split in ("train", *dev, *test):
        official("MNLI", tmp_path / "MNLI" / f"{split}.tsv", test=split in test)
    annotators = [f"label{i}" for i in range(1, 6)]  # five in dev, where train has one
    header = ["index", *PARSES, "sentence1", "sentence2", *annotators, "gold_label"]
    row = dict.fromkeys(header, "x") | {"sentence1": "mismatched", "gold_label": "neutral"}
    table(tmp_path / "MNLI" / "dev_mismatched.tsv", header, [[row[column] for column in header]])
    found = load(task, tmp_path, ["train", *dev, *test])
    assert [len(e.first) for e in found.values()] == [3, 3, 1, 3, 3]
    assert found["dev_mismatched"].first == ["mismatched"]
    np.testing.assert_array_equal(found["dev_mismatched"].labels, [1])
    assert [split for split, e in found.items() if e.labels is None] == list(test)


@pytest.mark.parametrize("folder", ["MRPC", "mrpc", "MSRParaphraseCorpus"])
def test_mrpc_is_read_as_microsoft_publishes_it(folder: str, tmp_path: Path) -> None:
    """A byte order mark, Windows' line ends, quotes that don't pair up; the test file has labels and serves to evaluate."""
    task, header = TASKS["MRPC"], LAYOUTS["MRPC"][0]
    rows = {
        "train": [["1", "70", "71", 'Amrozi accused "him', 'Referring to him as only " the'], ["0", "1", "2", "x", "y"]],
        "test": [["0", "1089874", "1089925", "PCCW 's chief", '"']],
    }
    for name, lines in rows.items():
        table(tmp_path / folder / f"msr_paraphrase_{name}.txt", header, lines, bom="\ufeff", end="\r\n")
    for directory in (tmp_path, tmp_path / folder):
        assert find_tasks(directory) == [task]
        assert files.dev_splits(task, directory) == ("msr_paraphrase_test",)
        found = load(task, directory, ["train", "msr_paraphrase_test", "test"])
        train, judge, test = found.values()
        assert train.first == ['Amrozi accused "him', "x"] and train.second == ['Referring to him as only " the', "y"]
        assert train.labels is not None and judge.labels is not None and test.labels is None
        assert (train.labels.tolist(), judge.labels.tolist()) == ([1, 0], [0])
        assert judge.first == test.first == ["PCCW 's chief"] and judge.second == ['"'] and test.ids == ["0"]
        files.check(task, directory, tests=True)
    # GLUE's own files, made from these, come first.
    for name in ("train", "dev"):
        table(tmp_path / folder / f"{name}.tsv", header, [["1", "1", "2", "glue", "files"]])
    assert files.dev_splits(task, tmp_path) == ("dev",) and load(task, tmp_path, ["train"])["train"].first == ["glue"]
    (tmp_path / folder / "train.tsv").unlink()
    (tmp_path / folder / "msr_paraphrase_train.txt").unlink()
    with pytest.raises(UserError, match=r"^MRPC: .* holds msr_paraphrase_test\.txt, but no msr_paraphrase_train\.txt, so"):
        files.check(task, tmp_path)


@pytest.mark.parametrize(
    ("name", "present", "said"),
    [
        ("QQP", ["dev"], "QQP: FOLDER holds dev.tsv, but no train.tsv, so there is nothing to train on."),
        (
            "RTE",
            ["dev", "test"],
            "RTE: FOLDER holds dev.tsv and test.tsv, but no train.tsv, so there is nothing to train on.",
        ),
        (
            "MNLI",
            ["train", "dev_matched"],
            "MNLI: FOLDER holds train.tsv and dev_matched.tsv, but no dev_mismatched.tsv, so there is nothing to judge by "
            "(finetune.holdout=0.1 keeps back a part of the training examples).",
        ),
        ("WNLI", [], "WNLI: FOLDER holds no train.tsv and no dev.tsv, so there is nothing to train on."),
        ("CoLA", ["train", "dev"], ""),
    ],
)
def test_which_files_a_task_lacks(name: str, present: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    for file in present:
        (tmp_path / name / f"{file}.tsv").write_text("x")
    for directory in [tmp_path] + [tmp_path / name] * bool(present):
        wanted = ("train", *files.dev_splits(TASKS[name], directory))
        assert files.lacking(TASKS[name], directory, wanted) == said.replace("FOLDER", str(tmp_path / name))
        assert find_tasks(directory) == [TASKS[name]]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    official("RTE", tmp_path / "RTE" / "train.tsv")
    with pytest.raises(UserError, match=r"^RTE: .*/RTE holds train\.tsv, but no dev\.tsv, so there is nothing to judge by"):
        load(TASKS["RTE"], tmp_path, ["train", "dev"])
    with pytest.raises(UserError, match=r"has neither a folder WNLI nor a train\.tsv"):
        load(TASKS["WNLI"], tmp_path, ["train"])
    with pytest.raises(UserError, match="absent is no directory"):
        load(TASKS["WNLI"], tmp_path / "absent", ["train"])


def test_tasks_are_found_in_glue_s_order(tmp_path: Path) -> None:
    for name in ("wnli", "mnli", "CoLA", "sst2", "diagnostic"):
        (tmp_path / name).mkdir()
    (tmp_path / "RTE").touch()  # a file is no folder
    assert [task.name for task in find_tasks(tmp_path)] == ["CoLA", "SST-2", "MNLI", "WNLI"]
    for name in ("sst2", "diagnostic"):
        (tmp_path / name / "train.tsv").touch()
    assert [task.name for task in find_tasks(tmp_path / "sst2")] == ["SST-2"]
    with pytest.raises(UserError, match="it is one task's folder; say which, with --tasks"):
        find_tasks(tmp_path / "diagnostic")


# --- hub ---

HUB_COLUMNS = {
    "QQP": ("question1", "question2"),
    "MNLI": ("premise", "hypothesis"),
    "QNLI": ("question", "sentence"),
    "CoLA": ("sentence",),
    "SST-2": ("sentence",),
}


@pytest.mark.parametrize("name", TASKS)
def test_the_hub_s_tables_are_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task, asked = TASKS[name], []

    def load_dataset(path: str, subset: str, split: str) -> datasets.Dataset:
        asked.append((path, subset, split))
        labels: list[Any] = [-1, -1] if "test" in split else [1, 0]
        columns = HUB_COLUMNS.get(name, ("sentence1", "sentence2"))
        texts = dict(zip(columns, (FIRST[:2], SECOND[:2]), strict=False))
        kind = datasets.Value("float32") if task.regression else datasets.ClassLabel(names=list(task.labels))
        features = {column: datasets.Value("string") for column in columns} | {"label": kind, "idx": datasets.Value("int32")}
        return datasets.Dataset.from_dict(texts | {"label": labels, "idx": [7, 8]}, features=datasets.Features(features))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    dev, test = files.dev_splits(task)[-1], tasks.test_splits(task)[-1]
    found = load(task, None, ["train", dev, test])
    subset, part = name.lower().replace("-", ""), "_mismatched" if name == "MNLI" else ""
    assert asked == [("nyu-mll/glue", subset, s) for s in ("train", f"validation{part}", f"test{part}")]
    for examples in found.values():
        assert examples.first == FIRST[:2] and examples.second == (SECOND[:2] if task.pair else None)
        assert examples.ids == ["7", "8"]
    labels = found[dev].labels
    assert labels is not None and labels.dtype == (np.float32 if task.regression else np.int32) and labels.tolist() == [1, 0]
    assert found[test].labels is None


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: object, **keys: object) -> None:
        raise ConnectionError("no route\nto the hub.")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError) as caught:
        load(TASKS["SST-2"], None, ["dev"])
    assert str(caught.value) == "nyu-mll/glue (sst2, dev) cannot be loaded from the hub: no route to the hub."


# --- submissions ---


def test_submission_names() -> None:
    single = {name: submission_name(task, "test") for name, task in TASKS.items() if name != "MNLI"}
    assert single == {name: f"{name}.tsv" for name in single}
    names = [submission_name(TASKS["MNLI"], split) for split in tasks.test_splits(TASKS["MNLI"])]
    assert names == ["MNLI-m.tsv", "MNLI-mm.tsv"]


@pytest.mark.parametrize(
    ("name", "predictions", "answers"),
    [
        *[(name, [1, 0], ["1", "0"]) for name in ("CoLA", "SST-2", "MRPC", "QQP", "WNLI")],
        *[(name, [1, 0], ["not_entailment", "entailment"]) for name in ("QNLI", "RTE")],
        ("MNLI", [2, 0, 1], ["contradiction", "entailment", "neutral"]),
        ("STS-B", [-0.3, 5.2, 3.14159, 2], ["0.000", "5.000", "3.142", "2.000"]),
    ],
)
def test_submissions_are_as_the_site_wants_them(
    name: str, predictions: list[float], answers: list[str], tmp_path: Path
) -> None:
    ids = [str(i + 3) for i in range(len(predictions))]
    split = tasks.test_splits(TASKS[name])[-1]
    write_submission(tmp_path / "out.tsv", TASKS[name], split, ids, np.array(predictions))
    expected = ["index\tprediction", *(f"{i}\t{answer}" for i, answer in zip(ids, answers, strict=True)), ""]
    assert (tmp_path / "out.tsv").read_bytes().decode().split("\n") == expected
    write_submission(tmp_path, TASKS[name], split, ids, np.array(predictions))  # in a folder: under the official name
    assert (tmp_path / submission_name(TASKS[name], split)).read_bytes() == (tmp_path / "out.tsv").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_what_a_submission_says_is_what_the_files_say(tmp_path: Path) -> None:
    """The values a submission writes for the true labels are those of the label column."""
    for name, (_, _, labels) in CONTENT.items():
        examples = read_tsv(TASKS[name], official(name, tmp_path / f"{name}-train.tsv"), True)
        assert examples.labels is not None
        write_submission(tmp_path / "out.tsv", TASKS[name], "test", examples.ids, examples.labels)
        answers = [line.split("\t")[1] for line in (tmp_path / "out.tsv").read_text().splitlines()[1:]]
        same = [float(text) for text, _ in labels] == [float(a) for a in answers] if name == "STS-B" else None
        assert same or answers == [text for text, _ in labels]


def test_a_submission_is_whole_or_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, path = TASKS["SST-2"], tmp_path / "SST-2.tsv"
    write_submission(path, task, "test", ["0"], np.array([1]))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="zip"):  # an answer missing
        write_submission(path, task, "test", ["0", "1"], np.array([0]))
    failing = SimpleNamespace(**vars(submissions.os) | {"fsync": lambda number: (_ for _ in ()).throw(OSError("disk full"))})
    monkeypatch.setattr(submissions, "os", failing)
    with pytest.raises(OSError, match="disk full"):
        write_submission(path, task, "test", ["0"], np.array([0]))
    assert path.read_bytes() == before
