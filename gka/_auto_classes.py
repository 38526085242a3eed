"""Make the models known to transformers' Auto classes, without importing transformers in `import gka`.

Loading a model from a folder or a name starts with `AutoConfig.from_pretrained`. Its first call imports `gka.hf`,
which registers the models.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

from ._when_imported import when_imported

_MODULE = "transformers.models.auto.configuration_auto"


def register_when_used() -> None:
    """Import `gka.hf` at the first use of AutoConfig, whether transformers is imported before or after gka."""
    when_imported(_MODULE, _import_ours_at_first_use)


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
