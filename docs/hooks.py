"""Hooks of MkDocs: pages may link to any file of the repository, as they do where the repository is browsed.

A file outside `docs/` that a page links to, and every one that such a file links to in turn, is part of the site
as `repository/<its path>`; links are turned to it. A link to a file that is not there stays as it is, and MkDocs
warns.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

OUTSIDE = "repository/"
ALWAYS = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/RESULTS.md")
_FENCED = re.compile(r"^ *```.*?^ *```", re.M | re.S)
_LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")


def _root(config: Any) -> Path:
    return Path(config.config_file_path).parent


def _in_repository(src_uri: str) -> str:
    """The path in the repository of a file of the site."""
    return src_uri.removeprefix(OUTSIDE) if src_uri.startswith(OUTSIDE) else f"docs/{src_uri}"


def _on_site(path: str) -> str:
    """The inverse of `_in_repository`."""
    return path.removeprefix("docs/") if path.startswith("docs/") else OUTSIDE + path


def _each_link(markdown: str, path: str, root: Path, replace: Callable[[str], str]) -> str:
    """The text with every link to a file of the repository, but for those in fenced code, replaced.

    Args:
        markdown: of the file at `path` in the repository.
        replace: from the path of the file that is linked to, to the new link.
    """

    def new(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link[2]))
        inside = not target.startswith("..") and (root / target).is_file()
        return link[1] + replace(target) + link[3] if inside else link[0]

    pieces, end = [], 0
    for code in _FENCED.finditer(markdown):
        pieces += [_LINK.sub(new, markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*pieces, _LINK.sub(new, markdown[end:])])


def on_files(files: Files, config: Any) -> Files:
    """Add what pages link to outside `docs/`."""
    root = _root(config)
    new, seen = list(ALWAYS), set[str]()
    for page in files.documentation_pages():
        _each_link(
            page.content_string, _in_repository(page.src_uri), root, lambda target: new.append(target) or ""
        )
    while new:
        path = new.pop()
        if path in seen or path.startswith("docs/"):
            continue
        seen.add(path)
        file = File.generated(config, _on_site(path), abs_src_path=str(root / path))
        files.append(file)
        if path.endswith(".md"):
            _each_link(file.content_string, path, root, lambda target: new.append(target) or "")
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links between the repository's files to the site's."""
    uri = page.file.src_uri
    folder = posixpath.dirname(uri) or "."
    return _each_link(
        markdown, _in_repository(uri), _root(config), lambda target: posixpath.relpath(_on_site(target), folder)
    )
