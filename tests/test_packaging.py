"""What goes with the package: the marker of its annotations, its citation, and the checks before a commit."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import yaml
from readme_renderer.markdown import render

import fedbert_jax

ROOT = Path(__file__).parents[1]


def test_the_citation_is_of_this_version():
    cited, project = (
        yaml.safe_load((ROOT / "CITATION.cff").read_text()),
        tomllib.loads((ROOT / "pyproject.toml").read_text()),
    )
    assert (cited["title"], cited["version"]) == (project["project"]["name"], fedbert_jax.__version__)
    assert cited["license"] == project["project"]["license"] and cited["keywords"] == project["project"]["keywords"]
    assert cited["preferred-citation"]["doi"] == "10.1145/3510033" and len(cited["preferred-citation"]["authors"]) == 6


def test_a_wheel_says_that_the_package_is_typed():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["fedbert_jax"] and (ROOT / "fedbert_jax/py.typed").is_file()


def test_an_index_shows_the_readme_without_links_into_the_checkout(tmp_path):
    """Neither pictures nor pages of the checkout are there; each stands by its name, and the source distribution has it."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
        folder = archive.name.removesuffix(".tar.gz")
        about = file.extractfile(f"{folder}/PKG-INFO").read().decode()
    head, _, description = about.partition("\n\n")
    assert "Description-Content-Type: text/markdown" in head
    page = render(description)
    assert page is not None and "<img" not in page and "](" not in page
    targets = set(re.findall(r'(?:href|src)="([^"]*)"', page))
    assert targets and all(target.startswith(("https://", "#")) for target in targets)
    linked = set(re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "README.md").read_text()))
    assert len(linked) > 10 and linked <= names
    assert all(f"<code>{path}</code>" in page for path in linked)


def test_what_is_checked_before_a_commit_is_what_make_checks():
    """Each hook is a command of `make lint types`; ruff's mend what make only finds."""
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local" and all(hook["language"] == "system" for hook in repository["hooks"])
    made = subprocess.run(["make", "-n", "lint", "types"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    checks = [
        line.removesuffix(" .").removesuffix(" --check") for line in made.splitlines() if line.startswith(".venv/bin/")
    ]
    assert [hook["entry"] for hook in repository["hooks"]] == checks[-4:]
