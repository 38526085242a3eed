"""The site of the guides builds without a warning, and its links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def build(folder: Path, config: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "--config-file",
            str(config),
            "--site-dir",
            str(folder),
        ],
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(folder, ROOT / "mkdocs.yml")
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def test_every_link_and_picture_is_there(site: Path) -> None:
    checked = 0
    for page in site.rglob("*.html"):
        if page.name in ("404.html", "search.html"):  # of the theme, with links from the server's root
            continue
        for link in re.findall(r'(?:href|src)="([^"#?]+)', page.read_text(encoding="utf-8")):
            if ":" in link or link.startswith("//"):
                continue
            assert (page.parent / link).exists(), f"{page.relative_to(site)}: {link}"
            checked += 1
    assert checked > 100


def test_markdown_is_understood(site: Path) -> None:
    """Fences in lists and tables without a blank line above are no errors to MkDocs, but are shown as they are."""
    for page in site.rglob("*.html"):
        text = re.sub(r"<code[^>]*>.*?</code>", "", page.read_text(encoding="utf-8"), flags=re.S)
        assert "```" not in text and "|---" not in text, page.relative_to(site)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A site of one page, with our hook and a page of results outside the guides."""
    for name, text in {
        "docs/hooks.py": (ROOT / "docs/hooks.py").read_text(encoding="utf-8"),
        "docs/index.md": "# A\n\n[there](../CHANGELOG.md)\n",
        "CHANGELOG.md": "# A page\n",
        "CONTRIBUTING.md": "# A page\n",
        "benchmarks/RESULTS.md": "# Results\n\n[raw](results/a.json), [how](../docs/index.md)\n",
        "benchmarks/results/a.json": "{}",
        "mkdocs.yml": "site_name: a\nuse_directory_urls: false\nexclude_docs: hooks.py\nhooks: [docs/hooks.py]\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_files_outside_the_guides_are_part_of_the_site(small: Path) -> None:
    done = build(small / "site", small / "mkdocs.yml")
    assert done.returncode == 0, done.stderr
    assert (small / "site/repository/CHANGELOG.html").exists()
    results = (small / "site/repository/benchmarks/RESULTS.html").read_text(encoding="utf-8")
    assert 'href="results/a.json"' in results and 'href="../../index.html"' in results
    assert (small / "site/repository/benchmarks/results/a.json").read_text() == "{}"


def test_a_link_that_leads_nowhere_fails_the_build(small: Path) -> None:
    (small / "docs/index.md").write_text("# A\n\n[gone](../GONE.md)\n", encoding="utf-8")
    done = build(small / "site", small / "mkdocs.yml")
    assert done.returncode != 0 and "../GONE.md" in done.stderr
