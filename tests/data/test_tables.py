"""Tables of every format give the same rows, as their files have them, or an error that names file and line."""

from __future__ import annotations

import datetime
import gzip
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
from sources import read, refused, write

ROWS = [("first, with a comma", "north"), ('second "quoted"\nover two lines', "south"), ("NA", "null"), ("nan", "007")]
FORMATS = ["jsonl", "ndjson", "json", "array.json", "csv", "tsv", "parquet", "arrow", "feather.arrow"]


def save(folder: Path, format: str, rows: list[dict[str, Any]]) -> Path:
    """Writes rows as common libraries do."""
    path = folder / f"table.{format}"
    folder.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame(rows, dtype=object)
    if format == "array.json":
        path.write_text(json.dumps(rows, indent=2))
    elif format.endswith(("json", "jsonl", "ndjson")):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif format == "csv":
        frame.to_csv(path)  # with pandas' column of numbers
    elif format == "tsv":
        frame.to_csv(path, sep="\t", index=False)
    elif format == "parquet":
        frame.to_parquet(path)
    elif format == "arrow":
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write(table)
    else:
        pa.feather.write_feather(pa.Table.from_pylist(rows), str(path))
    return path


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["text", "hf"])
def test_every_format_holds_the_same_rows(tmp_path: Path, format: str, kind: str) -> None:
    path = save(tmp_path / "set", format, [{"note": note, "site": site} for note, site in ROWS])
    keys = dict(text_field="note", client_field="site", deduplicate=False)
    assert read(f"{kind}:{path}", **keys) == ROWS
    del keys["client_field"]
    name = "set" if kind == "text" else path.name
    assert read(f"{kind}:{path}", **keys) == [(note, name) for note, _ in ROWS]


@pytest.mark.parametrize("format", ["jsonl", "array.json", "parquet", "arrow"])
@pytest.mark.parametrize(
    "value, name",
    [
        (7, "7"),
        (-1.5, "-1.5"),
        (0, "0"),
        (True, "true"),
        (False, "false"),
        ("007", "007"),
    ],
)
def test_numbers_true_and_false_name_clients_as_they_are_written(tmp_path: Path, format: str, value: Any, name: str) -> None:
    path = save(tmp_path, format, [{"text": "a", "site": value}])
    assert read(f"text:{path}", client_field="site") == [("a", name)]


def test_numbers_that_a_machine_would_change_stay_as_written(tmp_path: Path) -> None:
    huge = "9" * 5000  # more digits than Python turns into an integer
    written = ["1.10", "1e3", "-0", huge, "0.1000000000000000055511151231257827"]
    path = write(tmp_path / "a.jsonl", "".join(f'{{"text": "t{i}", "n": {n}}}\n' for i, n in enumerate(written)))
    names = [client for _, client in read(f"text:{path}", client_field="n")]
    assert names[:3] + names[4:] == written[:3] + written[4:]
    assert names[3].startswith("999") and len(names[3]) == 255
    path = write(tmp_path / "b.csv", "text,n\n" + "".join(f"t{i},{n}\n" for i, n in enumerate(written[:3])))
    assert [client for _, client in read(f"text:{path}", client_field="n")] == written[:3]


def test_other_columns_may_hold_anything(tmp_path: Path) -> None:
    deep = {"text": "a", "site": "s", "meta": {"list": [1, {"x": None}], "big": 10**30, "nan": float("nan")}}
    path = write(tmp_path / "a.jsonl", json.dumps(deep) + '\n{"text": "b", "site": "s", "n": {"k": 1, "k": 2}}\n')
    assert read(f"text:{path}", client_field="site") == [("a", "s"), ("b", "s")]


def test_dates_name_clients(tmp_path: Path) -> None:
    path = save(tmp_path, "parquet", [{"text": "a", "day": datetime.date(2024, 1, 31)}])
    assert read(f"text:{path}", client_field="day") == [("a", "2024-01-31")]


def test_names_have_no_space_around_them(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text, site\na, north\nb,north \nc,north\n")
    assert {client for _, client in read(f"text:{path}", client_field="site")} == {"north"}


# --- what is not there ---

MISSING = [None, "", "  \t", float("nan")]


@pytest.mark.parametrize("format", ["jsonl", "array.json", "csv", "tsv", "parquet", "arrow"])
@pytest.mark.parametrize("kind", ["text", "hf"])
@pytest.mark.parametrize("value", MISSING)
def test_a_row_without_a_client_is_refused_or_dropped_and_counted(
    tmp_path: Path, format: str, kind: str, value: Any
) -> None:
    if isinstance(value, float) and format in ("parquet", "arrow"):
        rows = [{"text": "a", "site": 1.5}, {"text": "b", "site": value}, {"text": "c", "site": value}]
    else:
        rows = [{"text": "a", "site": "n"}, {"text": "b", "site": value}, {"text": "c", "site": value}]
    path = save(tmp_path, format, rows)
    source = f"{kind}:{path}"
    place = {"jsonl": "line 2", "array.json": "item 2", "csv": "line 3", "tsv": "line 3"}.get(format, "row 2")
    message = refused(source, client_field="site")
    assert f"{path} {place} " in message and "data.client_field='site'" in message
    assert "data.missing_client='drop'" in message
    told: list[str] = []
    assert [text for text, _ in read(source, told, client_field="site", missing_client="drop")] == ["a"]
    (sentence,) = told
    assert sentence.startswith("left out 2 rows ") and f"the first is {path} {place}." in sentence


def test_a_field_that_a_row_lacks_is_no_client(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a", "site": "n"}\n\n{"text": "b", "sit": "n"}\n')
    message = refused(f"text:{path}", client_field="site")
    assert f"{path} line 3 has no field data.client_field='site' (there are: text, sit)" in message
    told: list[str] = []
    assert read(f"text:{path}", told, client_field="site", missing_client="drop") == [("a", "n")]
    assert "left out 1 row" in told[0]
    path = write(tmp_path / "b.csv", "text,site\na,n\nb\n")
    assert "line 3 has null" in refused(f"text:{path}", client_field="site")


def test_if_no_row_has_a_client_the_error_says_why(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": "b"}\n')
    message = refused(f"text:{path}", client_field="site", missing_client="drop")
    assert "has no text" in message and "left out 2 rows" in message and "data.client_field='site'" in message


@pytest.mark.parametrize("value", [["n"], {"a": 1}, []])
@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_a_client_that_is_no_name_is_refused_even_where_missing_ones_are_dropped(
    tmp_path: Path, value: Any, format: str
) -> None:
    path = save(tmp_path, format, [{"text": "a", "site": value}])
    message = refused(f"text:{path}", client_field="site", missing_client="drop")
    assert " 1: data.client_field='site' is " in message and "not a name" in message


@pytest.mark.parametrize("format", ["jsonl", "array.json", "parquet", "arrow"])
@pytest.mark.parametrize("kind", ["text", "hf"])
def test_null_text_is_left_out_and_counted_wherever_it_is(tmp_path: Path, format: str, kind: str) -> None:
    path = save(tmp_path, format, [{"text": "a", "s": "x"}, {"text": None, "s": None}, {"text": "b", "s": "x"}])
    told: list[str] = []
    assert [t for t, _ in read(f"{kind}:{path}", told, client_field="s")] == ["a", "b"]
    place = {"jsonl": "line 2", "array.json": "item 2"}.get(format, "row 2")
    assert told == [f"left out 1 row whose data.text_field='text' is null; the first is {path} {place}."]


def test_nan_in_json_is_null(tmp_path: Path) -> None:  # as json.dumps writes pandas' missing values
    path = write(tmp_path / "a.jsonl", '{"text": NaN, "s": "n"}\n{"text": "a", "s": "n"}\n{"text": "b", "s": NaN}\n')
    told: list[str] = []
    assert read(f"text:{path}", told, client_field="s", missing_client="drop") == [("a", "n")]
    assert [sentence.rpartition(";")[2] for sentence in told] == [f" the first is {path} line {n}." for n in (1, 3)]
    path = write(tmp_path / "b.jsonl", '{"text": "a", "s": Infinity}\n{"text": "b", "s": -Infinity}')
    assert [client for _, client in read(f"text:{path}", client_field="s")] == ["Infinity", "-Infinity"]


def test_a_row_without_words_needs_no_client(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,site\na,n\n,\n  ,\n\n")
    assert read(f"text:{path}", client_field="site") == [("a", "n")]


@pytest.mark.parametrize(
    "value, kind",
    [
        (3, "a number"),
        (True, "true or false"),
        (["a"], "a list"),
        ({"a": 1}, "an object"),
    ],
)
@pytest.mark.parametrize("format", ["jsonl", "array.json", "parquet"])
def test_text_that_is_none_is_refused(tmp_path: Path, value: Any, kind: str, format: str) -> None:
    path = save(tmp_path, format, [{"text": value, "site": "n"}])
    assert f" 1: data.text_field='text' is {kind}, not text." in refused(f"text:{path}")


# --- JSON ---


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json.gz"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    rows = [{"body": "one\n\ntwo", "who": 7}, {"body": "three", "who": "x"}]
    path = write(tmp_path / "d" / name, "\n".join(map(json.dumps, rows)) + "\n\n")
    found = read(f"text:{tmp_path}", text_field="body", client_field="who")
    assert found == [("one\n\ntwo", "7"), ("three", "x")]
    assert [g for _, g in read(f"text:{path}", text_field="body")] == ["d", "d"]


def test_json_lines_that_lack_something_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "one", "who": 1}\n{"txt": "two", "who": 1}\n')
    message = refused(f"text:{path}")
    assert f"{path} line 2" in message and "data.text_field='text'" in message and "txt, who" in message
    assert "line 1 has no field data.client_field='site'" in refused(f"text:{path}", client_field="site")
    assert "line 1 is not a JSON object" in refused(f"text:{write(path, '[1]')}")
    write(path, '{"text": ""}\n{')
    assert "line 2 is not a JSON object" in refused(f"text:{path}")
    assert "is a number, not text" in refused(f"text:{write(path, json.dumps(dict(text=3)))}")


def test_lone_surrogates_do_not_reach_the_tokenizer(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a \\ud800 b"}')
    assert read(f"text:{path}")[0][0].encode() == b"a ? b"


def test_an_array_is_read_from_json_only_and_its_errors_say_where(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '\n [{"text": "a"},\n\n {"text": "b"}]\n')
    assert [t for t, _ in read(f"text:{path}")] == ["a", "b"]
    for content, message in (
        ("[1,2\n\n\n!]", "line 4 is not JSON"),
        ('[{"text": "a"}, 1]', "item 2 is not a JSON object; accepted:"),
        ('{\n"text": "a"\n}', "line 1 is not a JSON object; accepted: one object on each line, or an array of objects."),
        ("", "has no text"),
        ("[]", "has no text"),
    ):
        assert message in refused(f"text:{write(path, content)}")
    path = write(tmp_path / "a.jsonl", "[1]")
    assert "line 1 is not a JSON object; accepted: one object on each line." in refused(f"text:{path}")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_that_nests_too_deep_is_refused_like_any_other(tmp_path: Path, name: str) -> None:
    message = refused(f"text:{write(tmp_path / name, '[' * 200_000)}")
    assert f"{name} line 1 is not " in message and "JSON" in message


def test_a_field_that_a_row_has_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": "b", "text": "c"}\n')
    assert f"{path} line 2 has a field twice; there are: text." in refused(f"text:{path}")


def test_lines_of_json_end_as_lines_do(tmp_path: Path) -> None:
    content = '\ufeff{"text": "a"}\r{"text": "b"}\r\n\r\n{"text": "c \x85 \u2028 d"}'
    path = write(tmp_path / "a.jsonl.gz", content)
    assert [t for t, _ in read(f"text:{path}")] == ["a", "b", "c \x85 \u2028 d"]


def test_a_row_of_many_long_fields_is_named_in_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({f"{'x' * 1000}{i}\n": 1 for i in range(500)}))
    assert len(refused(f"text:{path}")) < 2500 and "and 480 more" in refused(f"text:{path}")


# --- CSV ---


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("name", ["a.csv", "A.CSV.GZ"])
def test_csv_as_spreadsheets_write_it(tmp_path: Path, separator: str, name: str) -> None:
    lines = ['"id"', "text", "site"], ["1", '"a ""b""; c, d\te"', "007"], ["2", '"line 1\r\nline 2\rline 3\n"', "1"], []
    content = "\ufeff" + "\r\n".join(separator.join(cells) for cells in lines)
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.encode()) if name.endswith("GZ") else content.encode())
    assert read(f"text:{path}", client_field="site") == [('a "b"; c, d\te', "007"), ("line 1\nline 2\nline 3", "1")]


def test_csv_with_ends_of_old_macs(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text,site\ra,n\r"b\rc",s\r')
    assert read(f"text:{path}", client_field="site") == [("a", "n"), ("b\nc", "s")]


def test_csv_that_is_broken_is_refused_with_the_line_its_row_begins_in(tmp_path: Path) -> None:
    start = 'text,site\n"two\nlines",n\n'
    path = write(tmp_path / "a.csv", start + "a, b, c\n")
    assert f"{path} line 4 has 3 cells, but the header has 2" in refused(f"text:{path}")
    write(path, start + 'good,n\n"never closed,n\nmore,n\n')
    assert "line 5 begins a quoted cell that never ends" in refused(f"text:{path}")
    write(path, start + 'x,n\n"a "quoted" word",n\n')
    assert "the row of line 5 has a quotation mark where a quoted cell goes on" in refused(f"text:{path}")
    write(path, "text,text\na,b\n")
    assert f"{path} has more than one column data.text_field='text'; there are: text, text." in refused(f"text:{path}")
    write(path, "note;site\na;b\n")
    assert "has no column data.text_field='text'; there are: note;site." in refused(f"text:{path}")
    assert "no column data.client_field='who'" in refused(f"text:{write(path, start)}", client_field="who")


def test_csv_rows_may_end_in_empty_cells(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,site\na,n,,\n")
    assert read(f"text:{path}", client_field="site") == [("a", "n")]


def test_an_empty_table_has_no_rows(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "b.csv", "")
    write(tmp_path / "c.csv", "text,site\n")
    write(tmp_path / "d.jsonl", "\n\n")
    save(tmp_path, "parquet", [{"text": None}])
    assert read(f"text:{tmp_path}", []) == [("a", tmp_path.name)]


def test_a_long_cell_is_read_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text\n"' + "word " * 200_000 + '"\n')  # Python's csv stops at 131,072 unless told
    ((text, _),) = read(f"text:{path}")
    assert len(text) == 999_999


# --- parquet and Arrow ---


def test_a_damaged_table_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, "parquet", [{"text": "a " * 1000}])
    whole = path.read_bytes()
    for raw in (b"", b"no parquet", whole[:-20], whole[:100] + whole[200:]):
        path.write_bytes(raw)
        assert f"{path} cannot be read as parquet: it is damaged, or something else." == refused(f"text:{path}")
    path = save(tmp_path, "arrow", [{"text": "a " * 1000}])
    whole = path.read_bytes()
    for raw in (b"", b"no arrow at all", whole[: len(whole) // 2], b"ARROW1"):
        path.write_bytes(raw)
        assert f"{path} cannot be read as Arrow: it is damaged, or something else." == refused(f"text:{path}")


def test_damage_inside_an_arrow_file_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path, "arrow", [{"text": "a"}, {"text": "b" * 50}])
    raw = path.read_bytes()
    offsets = raw.index(b"\0\0\0\0\1\0\0\0\x33\0\0\0")  # 0, 1, 51
    path.write_bytes(raw[: offsets + 8] + b"\xff\xff\xff\x7f" + raw[offsets + 12 :])
    assert f"{path} is damaged or has text that is not UTF-8" in refused(f"text:{path}")


def test_parquet_of_other_writers(tmp_path: Path) -> None:
    texts = ["a", None, "b"]
    for kind in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        table = pa.table({"text": pa.array(texts, pa.string()).cast(kind), "n": pa.array([1, 2, 3], pa.int8())})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1)
        assert read(f"text:{tmp_path}/a.parquet", [], client_field="n") == [("a", "1"), ("b", "3")]
    bad = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xff\xfe"))
    pyarrow.parquet.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    assert "is damaged or has text that is not UTF-8, somewhere in its rows 1 to 2." in refused(f"text:{tmp_path}/a.parquet")


def test_class_labels_go_by_their_names(tmp_path: Path) -> None:
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["World", "Sports"]))
    table = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.data.table.schema) as stream:
        stream.write(table.data.table)
    told: list[str] = []
    found = read(f"text:{tmp_path}/a.arrow", told, client_field="label", missing_client="drop")
    assert found == [("a", "Sports"), ("b", "World")] and len(told) == 1


def test_a_table_in_a_file_whose_name_is_not_utf8(tmp_path: Path) -> None:
    raw = io.BytesIO()
    pyarrow.parquet.write_table(pa.table({"text": ["a"]}), raw)
    folder = Path(str(tmp_path) + "/caf\udce9")
    folder.mkdir()
    (folder / "b\udce9.parquet").write_bytes(raw.getvalue())
    (folder / "c\udce9.csv").write_text("text\nb\n")
    assert read(f"text:{tmp_path}") == [("a", r"caf\xe9"), ("b", r"caf\xe9")]
    (folder / "c\udce9.csv").write_text("note\nb\n")
    assert r"caf\xe9/c\xe9.csv has no column" in refused(f"text:{tmp_path}")


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_a_long_text_is_not_copied_again_and_again(tmp_path: Path, format: str) -> None:
    size = 5 << 20
    path = save(tmp_path, format, [{"text": "word " * (size // 5)}])
    read(f"text:{path}", deduplicate=False)  # so that imports on the way are not counted
    tracemalloc.start()
    try:
        read(f"text:{path}", deduplicate=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3.5 * size
