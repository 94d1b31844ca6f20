"""What the site needs beside docs/: pages of files at the top and of the notebook, and links out of docs/ made names."""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}  # at the top: here
NOTEBOOK = "docs/notebooks/federation.ipynb"
PLACES = PAGES | {NOTEBOOK: "notebook.md"}  # of what is no page in docs/
LINK = re.compile(r"(!?)\[((?:[^\]\[]|\[[^\]]*\])*)\]\((?!https?:|#)([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages made of files at the top and of the notebook, and the notebook itself."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=linked((ROOT / source).read_text(), ".")))
    notebook = (ROOT / NOTEBOOK).read_text()
    files.append(File.generated(config, "notebook.md", content=page_of(notebook)))
    files.append(File.generated(config, posixpath.basename(NOTEBOOK), content=notebook))
    return files


def page_of(notebook: str) -> str:
    """Returns a notebook's cells as Markdown, with a link to the notebook under its title."""
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(notebook)["cells"]]
    (_, first), *rest = cells
    title, _, about = first.partition("\n")
    pages = [title, f"[The notebook]({posixpath.basename(NOTEBOOK)}), to run.", about]
    return "\n\n".join(pages + [text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in rest])


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Mends the links of the pages in docs/."""
    return markdown if page.file.src_uri in PAGES.values() else linked(markdown, "docs")


def linked(text: str, place: str) -> str:
    """Returns a page of `place`, a directory of the checkout, with links that hold on the site.

    A link to a page leads to it; a link to any other file of the checkout leaves the text, which names the file.
    """

    def mend(found: re.Match[str]) -> str:
        image, words, target, anchor = found[1], found[2], found[3], found[4] or ""
        path = posixpath.normpath(posixpath.join(place, target))
        if path in PLACES:
            return f"{image}[{words}]({PLACES[path]}{anchor})"
        if path.startswith("docs/"):
            return f"{image}[{words}]({path.removeprefix('docs/')}{anchor})"
        return words

    return LINK.sub(mend, text)
