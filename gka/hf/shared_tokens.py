"""Models whose processes share the tokens of every batch: whole batches in, this process's part to the model.

`gka.distributed.parallelize` sets what a model calls. `forward` does it, not a hook: adapters (PEFT) call the
`forward` of the model, and hooks do not see that.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Protocol


class SharedTokens(Protocol):
    """What a model asks of context parallelism."""

    def cut(self, config: Any, call: dict[str, Any]) -> dict[str, Any]:
        """This process's arguments of `forward`, by name, from those of the whole batch."""
        ...

    def whole(self, call: dict[str, Any], output: Any) -> Any:
        """The output of a call with these arguments, with the loss of the whole batch."""
        ...


def shares_tokens(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` of a model, which has the attribute `shared_tokens`: a SharedTokens, or None."""
    names = [*inspect.signature(forward).parameters][1:]

    @functools.wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        shared: SharedTokens | None = self.shared_tokens
        if shared is None:
            return forward(self, *args, **kwargs)
        part = shared.cut(self.config, {**dict(zip(names, args, strict=False)), **kwargs})
        return shared.whole(part, forward(self, **part))

    return call
