"""The models are known to transformers' Auto classes wherever gka is imported, and `import gka` costs nothing.

The way from a folder or a name to a model of transformers begins with `AutoConfig.from_pretrained`. Its first
call imports `gka.hf`, which registers the models; transformers is not imported for it.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

from ._when_imported import when_imported

_MODULE = "transformers.models.auto.configuration_auto"


def register_when_used() -> None:
    """Have `gka.hf` imported at the first use of AutoConfig, whether transformers is imported before or after."""
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
