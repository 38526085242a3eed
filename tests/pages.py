"""What tests read on generated pages: rows of tables, and pictures that show something."""

from __future__ import annotations

from pathlib import Path


def rows_of(page: str) -> list[list[str]]:
    """The cells of every row of every table, headings included, in the page's order."""
    rows = (line.strip() for line in page.splitlines())
    return [[cell.strip() for cell in row[1:-1].split("|")] for row in rows if row.startswith("|")]


def assert_drawn(picture: Path) -> None:
    """It can be read, and has points of more than one colour inside its frame."""
    from matplotlib.image import imread

    pixels = imread(picture)
    height, width = pixels.shape[:2]
    middle = pixels[height // 4 : -height // 4, width // 4 : -width // 4, :3]
    assert middle.size and middle.max() - middle.min() > 0.1, f"{picture} shows nothing"
