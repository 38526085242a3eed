"""What happens inside a training: gradient norms of the parts of every block, and held-out loss at some steps.

Both are added to the log of the Trainer, so they are in its checkpoints. The norms are computed on the device and
read when the Trainer reads its loss.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

NORMS, HELD_OUT = "group norms", "held-out loss"  # names in the log
REST, OUTSIDE = "rest", "outside"
# The last part of a module's or parameter's name, and its group. Gated DeltaNet has one map for two gates.
_GROUPS = {
    "A_log": "A_log", "dt_bias": "dt_bias", "a_proj": "decay", "b_proj": "beta", "alpha_proj": "alpha",
    "in_proj_ba": "beta and decay",
}  # fmt: skip


def groups_of(model: nn.Module) -> dict[tuple[str, str], list[nn.Parameter]]:
    """The parameters by block and group: ("3", "A_log"), ("3", "rest"), ("outside", "rest")."""
    groups: dict[tuple[str, str], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        block = re.search(r"\blayers\.(\d+)\.", name)
        kind = next((group for part, group in _GROUPS.items() if part in name.split(".")), REST)
        groups[block[1] if block else OUTSIDE, kind].append(parameter)
    return dict(groups)


class Watch(TrainerCallback):
    """Adds gradient norms and held-out losses to the log of the Trainer.

    Args:
        model: the model of the training.
        evaluate: function that gives the held-out loss of the model; it may set eval mode.
        at: steps after which it is called.
    """

    def __init__(self, model: nn.Module, evaluate: Callable[[], float], at: Sequence[int]) -> None:
        self.groups, self.evaluate, self.at = groups_of(model), evaluate, set(at)
        self._norms: Tensor | None = None  # of this step, after clipping

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step = state.global_step + 1
        if step in (1, state.max_steps) or step % state.logging_steps == 0:
            gradients = [[p.grad for p in group if p.grad is not None] for group in self.groups.values()]
            self._norms = torch.stack([torch.nn.utils.get_total_norm(parts) for parts in gradients])

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self._norms is not None and "grad_norm" in (logs or {}):
            before_clipping = max(1.0, logs["grad_norm"] / args.max_grad_norm)
            state.log_history[-1][NORMS] = [before_clipping * norm for norm in self._norms.tolist()]
            self._norms = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self.at:
            state.log_history.append({"step": state.global_step, HELD_OUT: self.evaluate()})
