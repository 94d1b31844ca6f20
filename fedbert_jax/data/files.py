"""Finds the files that a `text:` source means: a single file, a folder's files, or those that a pattern matches."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
import stat
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fedbert_jax.data.names import LONGEST, shortened
from fedbert_jax.errors import UserError

# The suffixes that a folder is searched for, in any case. Not .json, which is often metadata; .json.gz is not.
FOLDER_SUFFIXES = (
    ".txt",
    ".text",
    ".md",
    ".jsonl",
    ".ndjson",
    ".csv",
    ".tsv",
    ".txt.gz",
    ".text.gz",
    ".md.gz",
    ".jsonl.gz",
    ".ndjson.gz",
    ".csv.gz",
    ".tsv.gz",
    ".json.gz",
    ".parquet",
)
_SUFFIXES = ".txt, .text, .md, .jsonl, .ndjson, .csv, .tsv, each also with .gz, .json.gz and .parquet"
NAMED = 3  # how many of the things passed over for one reason a warning names

SUFFIX, HIDDEN, SPECIAL = "for the suffix", "hidden", "neither file nor folder"
DEAD, LOOP, AGAIN = "leading nowhere", "leading back to a folder around it", "already read under another name"
CLOSED = "that cannot be opened"

States = frozenset[int]  # see _Pattern


def find_files(what: str, warn: Callable[[str], None]) -> list[Path]:
    """Returns the files that a path or pattern means, sorted, and the folders of datasets that `save_to_disk` made.

    A folder means its files with `FOLDER_SUFFIXES`, however deep. In a pattern, `**` is any number of folders; the case
    of a suffix doesn't matter; a matched folder means its files, as above. Hidden files and folders are ignored unless the
    pattern spells out their dot. Symbolic links are followed, but what can be reached in two ways is found once, by the way
    without a link if there is one.

    Args:
      what: a path or pattern; `~` is the home directory.
      warn: called with one sentence that says how many things were passed over, for which reasons, and the first names.

    Raises:
      UserError: if there is no such file.
    """
    shown = f"data.source='text:{shortened(what, LONGEST)}'"
    if not what or "\0" in what:
        raise UserError(f"{shown} names no file; accepted: a file, a folder or a pattern.")
    path = os.path.expanduser(what)
    root, parts = path, []
    if glob.has_magic(path) and not os.path.lexists(path):  # otherwise the brackets belong to a name
        every = path.split("/")
        first = next(i for i, part in enumerate(every) if glob.has_magic(part))
        root, parts = "".join(part + "/" for part in every[:first]), [p for p in every[first:] if p not in ("", ".")]
    search = _Search(root, _Pattern(parts))
    search.run()
    passed_over = search.passed_over()
    if not search.files:
        why = f"; passed over: {passed_over}" if passed_over else ""
        raise UserError(f"{shown} matches no file (a folder is searched for {_SUFFIXES}){why}.")
    if passed_over:
        warn(f"{shown} passes over {search.count:,} files or folders: {passed_over}.")
    return sorted(map(Path, search.files.values()))


def is_saved_dataset(names: Iterable[str]) -> bool:
    """Tells from the names in a folder whether `save_to_disk` of the datasets library made it."""
    names = set(names)
    return "dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= names


class _Pattern:
    """The parts of a pattern as a small state machine: a path in state i has matched i of them.

    In the state `end` it has matched all, and is what the pattern means; in `inside` it lies in a folder that did. A search
    remembers the states in which it has visited a folder, so that it ends even if links form circles.
    """

    def __init__(self, parts: Sequence[str]) -> None:
        wanted = [*parts[:-1], *map(_any_case, parts[-1:])]
        self._parts = [None if part == "**" else re.compile(fnmatch.translate(part)) for part in wanted]
        self._dotted = [part.startswith(".") for part in parts]
        self.end, self.inside = len(parts), len(parts) + 1
        self.start = self._closed({0})

    def _closed(self, states: set[int]) -> States:
        for state, part in enumerate(self._parts):
            if state in states and part is None:
                states.add(state + 1)  # `**` may be no folder at all
        return frozenset(states)

    def after(self, states: States, name: str) -> States:
        """Returns the states of the entry `name` of a folder; none if neither it nor anything in it can match."""
        hidden = name.startswith(".")
        reached = set() if hidden else set(states & {self.inside})
        for state in states:
            if state >= self.end or self._dotted[state] != hidden:  # as in a shell, * doesn't match a leading dot
                continue
            part = self._parts[state]
            if part is None:
                reached.add(state)
            elif part.match(name):
                reached.add(state + 1)
        return self._closed(reached)


def _any_case(part: str) -> str:
    """Makes a pattern's suffix match in any case: `*.txt` becomes `*.[tT][xX][tT]`."""
    match = re.search(r"(\.[A-Za-z0-9]+)(\.[gG][zZ])?$", part)
    if not match:
        return part
    return part[: match.start()] + "".join(f"[{c.lower()}{c.upper()}]" if c.isalpha() else c for c in match[0])


class _Search:
    """Walks through folders, finds each file once, and counts what it passes over and why."""

    def __init__(self, root: str, pattern: _Pattern) -> None:
        self.files: dict[str, str] = {}  # by their real paths
        self._root = root
        self._pattern = pattern
        self._folders: deque[tuple[str, str, States]] = deque()  # still to be read: path, real path, states
        self._linked_folders: deque[tuple[str, str, States]] = deque()  # read after all others
        self._linked_files: list[str] = []
        self._seen: set[tuple[str, States]] = set()  # folders, by their real paths
        self._counts: Counter[str] = Counter()
        self._names: dict[str, list[str]] = {}

    def run(self) -> None:
        real = os.path.realpath(self._root or ".")
        self._meet(self._root, real, os.path.dirname(real), self._pattern.start, linked=False)
        while self._folders or self._linked_folders:
            self._read(*(self._folders or self._linked_folders).popleft())
        for path in sorted(self._linked_files):
            self._take(path, os.path.realpath(path))

    def _read(self, folder: str, real: str, states: States) -> None:
        pattern = self._pattern
        if pattern.end in states:
            states = states - {pattern.end} | {pattern.inside}
        if (real, states) in self._seen:
            return self._pass_over(folder, AGAIN)
        self._seen.add((real, states))
        try:
            with os.scandir(folder or ".") as entries:
                found = sorted((entry.name, entry.is_symlink()) for entry in entries)
        except OSError:
            return self._pass_over(folder, CLOSED)
        if pattern.inside in states and is_saved_dataset(name for name, _ in found):
            return self._take(folder, real)
        for name, linked in found:
            path = os.path.join(folder, name)
            reached = pattern.after(states, name)
            if reached:
                self._meet(path, os.path.realpath(path) if linked else os.path.join(real, name), real, reached, linked)
            elif pattern.inside in states:
                self._pass_over(path, HIDDEN)

    def _meet(self, path: str, real: str, holder: str, states: States, linked: bool) -> None:
        """Classifies one entry: `real` is its real path, `holder` that of the folder it was found in."""
        try:
            mode = os.stat(path or ".").st_mode
        except OSError as error:
            if os.path.lexists(path):
                self._pass_over(path, CLOSED if isinstance(error, PermissionError) else DEAD)
            return
        meant = states & {self._pattern.end, self._pattern.inside}
        if stat.S_ISDIR(mode):
            if linked and os.path.commonpath([holder, real]) == real:
                self._pass_over(path, LOOP)
            else:
                (self._linked_folders if linked else self._folders).append((path, real, states))
        elif not stat.S_ISREG(mode):
            if meant:
                self._pass_over(path, SPECIAL)
        elif meant and self._pattern.end not in states and not path.lower().endswith(FOLDER_SUFFIXES):
            self._pass_over(path, SUFFIX)
        elif meant and linked:
            self._linked_files.append(path)
        elif meant:
            self._take(path, real)

    def _take(self, path: str, real: str) -> None:
        if real in self.files:
            self._pass_over(path, AGAIN)
        else:
            self.files[real] = path

    def _pass_over(self, path: str, why: str) -> None:
        self._counts[why] += 1
        names = self._names.setdefault(why, [])
        if len(names) < NAMED:
            names.append(shortened(path.removeprefix(self._root).lstrip("/") or os.path.basename(path.rstrip("/")) or path))

    @property
    def count(self) -> int:
        """How many things were passed over."""
        return self._counts.total()

    def passed_over(self) -> str:
        """Says in words what was passed over: how many things for each reason, and the first ones' names."""
        parts = []
        for why, count in self._counts.items():
            more = f" and {count - NAMED:,} more" if count > NAMED else ""
            parts.append(f"{count:,} {why} ({', '.join(self._names[why])}{more})")
        return ", ".join(parts)
