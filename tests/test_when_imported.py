"""A module of another package is changed right after its import, once by each function."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from gka._when_imported import when_imported


@pytest.mark.parametrize("order", ["before", "looked for", "after"])
def test_changes_a_module_once(order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"a_module_imported_{order.replace(' ', '_')}"
    (tmp_path / f"{name}.py").write_text("table = {}")
    monkeypatch.syspath_prepend(str(tmp_path))
    finders, changes = list(sys.meta_path), []
    if order == "after":
        importlib.import_module(name)

    def change(module: ModuleType) -> None:
        changes.append(module.table)

    for _ in range(2):
        when_imported(name, change)
    others: list[ModuleType] = []
    when_imported(name, others.append)
    if order == "looked for":
        assert importlib.util.find_spec(name) is not None and not changes
    module = importlib.import_module(name)
    assert all(table is module.table for table in changes) and len(changes) == (2 if order == "after" else 1)
    assert others == [module]
    assert sys.meta_path == finders


def test_a_module_that_is_missing_stays_missing() -> None:
    when_imported("a_module_that_is_missing", lambda module: None)
    try:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("a_module_that_is_missing")
    finally:
        sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, "name", None) != "a_module_that_is_missing"]
