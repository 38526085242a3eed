"""Change a module of another package when it is imported, without importing it.

A finder in front of `sys.meta_path` waits for the module. It leaves the finding to the other finders.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def when_imported(name: str, change: Callable[[ModuleType], None]) -> None:
    """Call `change` with the module of that name: at once if it is imported, else right after its import."""
    module = sys.modules.get(name)
    if module is not None:
        change(module)
    elif not any(isinstance(f, _Finder) and (f.name, f.change) == (name, change) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder(name, change))


class _Finder(MetaPathFinder):
    def __init__(self, name: str, change: Callable[[ModuleType], None]) -> None:
        self.name, self.change = name, change

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)  # the others are to find it
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.change(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
