"""Make the models known to transformers' Auto classes, without importing transformers in `import gka`.

Loading a model from a folder or a name starts with `AutoConfig.from_pretrained`. Its first call imports `gka.hf`,
which registers the models. If the module of AutoConfig is not imported yet, a finder in front of `sys.meta_path`
waits for its import.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MODULE = "transformers.models.auto.configuration_auto"


def register_when_used() -> None:
    """Import `gka.hf` at the first use of AutoConfig, whether transformers is imported before or after gka."""
    module = sys.modules.get(_MODULE)
    if module is None:
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
    else:
        _import_ours_at_first_use(module)


class _Finder(MetaPathFinder):
    """Finds AutoConfig's module as the other finders do, and has `AutoConfig` prepared once it is executed."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _import_ours_at_first_use(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _import_ours_at_first_use(module: ModuleType) -> None:
    config = getattr(module, "AutoConfig", None)
    if (
        config is None
    ):  # it is being imported at this moment; whoever asks for ours will find `import gka.hf` enough
        return
    original = config.__dict__["from_pretrained"]

    @functools.wraps(original.__func__)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        config.from_pretrained = original
        importlib.import_module("gka.hf")
        return cls.from_pretrained(*args, **kwargs)

    config.from_pretrained = classmethod(from_pretrained)
