"""Measures a suite's rows: builds sides when a row first needs them, frees them after the last row, keeps the record."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, worker
from benchmarks.pairs import Row, Side, compare, summary
from benchmarks.sides import make_side, missing
from benchmarks.sizes import Size

COMPILATIONS = 3  # for a row that times them, each in a process of its own

Record = dict[str, Any]  # `new_record` says what it holds


class Bench:
    """The sides that are alive, and how they are run.

    Args:
      sizes: by name.
      samples: pairs per row.
      processes: `one`: both sides of a pair live in this process. `two`: each side has a process of its own. `turns`: that
        process ends while the other side runs, for when the device's memory doesn't hold both.
      ceiling: FLOP/s of the device's matmuls.
      memory: with `one`, start each side once more, in a process of its own, for its peak memory (the others know it).
      note: called with what is under way.
    """

    def __init__(
        self,
        sizes: Mapping[str, Size],
        samples: int,
        processes: str = "one",
        ceiling: float | None = None,
        memory: bool = False,
        note: Callable[[str], None] = lambda _: None,
    ):
        self.sizes, self.samples, self.processes, self.ceiling = sizes, samples, processes, ceiling
        self.memory, self.note = memory, note
        self.sides: dict[tuple[str, str], Side] = {}  # by size and name

    def measure(self, row: Row, later: Sequence[Row] = ()) -> dict[str, Any]:
        """Measures a row, then frees its sides that no `later` row needs. A failure is returned, not raised."""
        self.note(f"{row.size}: {row.name} ...")
        size = self.sizes[row.size]
        needed = {(row.size, name) for name in (row.a, row.b) if name}
        lacks = next((reason for _, name in sorted(needed) if (reason := missing(name, size))), "")
        broken: set[tuple[str, str]] = set()
        try:
            if lacks:
                raise RuntimeError(lacks)
            result = self._compile(row, size) if row.kind == "seconds" else self._run(row, size)
        except Exception as e:  # the other rows' numbers are worth having: the command says at the end what failed
            self.note(f"{row.size}: {row.name}: {type(e).__name__}: {e}")
            result = {"size": row.size, "name": row.name, "kind": row.kind, "target": row.target, "failed": str(e)}
            broken = set() if lacks else needed
        kept = {(r.size, name) for r in later if r.kind != "seconds" for name in (r.a, r.b)}
        for key in needed & self.sides.keys():
            if key in broken or key not in kept:
                self.sides[key].free()
        for key in broken & self.sides.keys():  # a later row builds it again
            del self.sides[key]
        return result

    def _side(self, name: str, size_name: str) -> Side:
        key, size = (size_name, name), self.sizes[size_name]
        if key not in self.sides:
            self.note(f"{size_name}: building {name}")
            if self.processes == "one":
                peak = worker.peak_of(name, size) if self.memory else None
                self.sides[key] = make_side(name, size)
                self.sides[key].peak_bytes = peak
            else:
                if self.processes == "turns":
                    self._rest()
                self.sides[key] = worker.remote_side(name, size)
        return self.sides[key]

    def _run(self, row: Row, size: Size) -> dict[str, Any]:
        self._rest(row)
        a = self._side(row.a, row.size)
        if row.kind == "ratio":
            b = self._side(row.b, row.size)
            return compare(row, a, b, size.tokens, self.samples, turns=self.processes == "turns")
        a.ready()
        while len(a.losses) < 2:
            a.timed()
        seconds = [a.timed() for _ in range(self.samples)]
        a.check()
        a.seconds.extend(seconds)
        if self.ceiling is None or a.flops is None:
            raise RuntimeError("the device's matmul ceiling was not measured")
        return summary(row, [a.flops.executed / s / self.ceiling for s in seconds]) | {"a": a.name}

    def _rest(self, row: Row | None = None) -> None:
        """Ends the processes of sides that `row` doesn't need, so that its pair has the device's memory."""
        for (size_name, name), side in self.sides.items():
            if row is None or size_name != row.size or name not in (row.a, row.b):
                side.rest()

    def _compile(self, row: Row, size: Size) -> dict[str, Any]:
        seconds = []
        for _ in range(min(COMPILATIONS, self.samples)):
            side = worker.remote_side(row.a, size)
            side.close()
            seconds.append(side.compile_seconds)
        return summary(row, seconds) | {"a": side.name}

    def facts(self) -> list[dict[str, Any]]:
        """Returns what was measured of each side that has samples; JSON can hold it."""
        found = []
        for (size_name, key), side in self.sides.items():
            if not side.seconds or side.flops is None:
                continue
            seconds = statistics.median(side.seconds)
            achieved = [count / seconds for count in side.flops]
            found.append(
                {
                    "size": size_name,
                    "key": key,
                    "name": side.name,
                    "ms": 1e3 * seconds * self.sizes[size_name].tokens,
                    "tokens_per_second": 1 / seconds,
                    "flops_needed": achieved[0],
                    "flops_executed": achieved[1],
                    "share": achieved[1] / self.ceiling if self.ceiling else None,
                    "peak_bytes": side.peak_bytes,
                    "compile_seconds": side.compile_seconds,
                    "losses": [side.initial_loss, side.losses[-1]],
                }
            )
        return found

    def close(self) -> None:
        """Frees all sides."""
        for side in self.sides.values():
            side.free()


def run(bench: Bench, record: Record, rows: Sequence[Row], save: Callable[[Record], None] = lambda _: None) -> Record:
    """Measures rows into a record, saves it after each row, and returns it. The last of its machines is this one."""
    date = list(record["machines"])[-1]
    try:
        for n, row in enumerate(rows):
            result = bench.measure(row, rows[n + 1 :]) | {"date": date}
            _replace(record["rows"], result, "name")
            for side in bench.facts():
                _replace(record["sides"], side | {"date": date}, "key")
            save(record)
    finally:
        bench.close()
    return record


def add_memory(
    record: Record,
    sizes: Mapping[str, Size],
    rows: Sequence[Row],
    save: Callable[[Record], None] = lambda _: None,
    note: Callable[[str], None] = lambda _: None,
) -> Record:
    """Starts once each side of a record's `rows` whose peak memory is missing, adds it, and returns the record."""
    asked = {(row.size, name) for row in rows for name in (row.a, row.b)}
    for side in record["sides"]:
        if side["peak_bytes"] is None and (side["size"], side["key"]) in asked:
            note(f"{side['size']}: memory of {side['name']}")
            side["peak_bytes"] = worker.peak_of(side["key"], sizes[side["size"]])
            save(record)
    return record


def new_record(suite: str) -> Record:
    """Returns an empty record: the machines by date, the sizes, and what was measured of rows and sides."""
    return {"benchmark": "suite", "suite": suite, "machines": {}, "sizes": {}, "rows": [], "sides": []}


def open_record(path: Path | None, suite: str, sizes: Mapping[str, Size], facts: dict[str, Any]) -> Record:
    """Reads a record to go on with, or makes one, and adds this machine.

    Rows that this run doesn't measure again stay, except those of a size that has changed.
    """
    record = json.loads(path.read_text()) if path is not None and path.exists() else new_record(suite)
    if record.get("benchmark") != "suite" or record["suite"] != suite:
        raise SystemExit(f"--json {path}: accepted: a file that is not there, or one that --suite {suite} wrote.")
    for name, size in sizes.items():
        if record["sizes"].get(name, vars(size)) != vars(size):
            for part in ("rows", "sides"):
                record[part] = [x for x in record[part] if x["size"] != name]
        record["sizes"][name] = dict(vars(size))
    used = {x["date"] for part in ("rows", "sides") for x in record[part]}
    record["machines"] = {date: m for date, m in record["machines"].items() if date in used and date != facts["date"]}
    record["machines"][facts["date"]] = facts
    return record


def suite_facts(cores: int, processes: str, samples: int, ceiling: dict[str, Any]) -> dict[str, Any]:
    """Returns the machine's facts with the device, its matmul ceiling and how rows are measured."""
    return machine.facts(cores) | {
        "device": ceiling["device"],
        "ceiling": ceiling,
        "processes": processes,
        "samples": samples,
    }


def _replace(entries: list[dict[str, Any]], new: dict[str, Any], key: str) -> None:
    for n, old in enumerate(entries):
        if (old["size"], old[key]) == (new["size"], new[key]):
            entries[n] = new
            return
    entries.append(new)
