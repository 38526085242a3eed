"""The variants of the experiment `parts`: the default layer, the layer without the solve, changes of the default.

All but four change one thing. BASE changes nothing. NO_SOLVE has no alpha connection either. Two are for
orientation: PAPER is the layer of the paper's figure 3a (arXiv 2511.21016), which has no gates and no alpha
connection, LINEAR the same without the solve. "float32" changes the dtype of the training and not the layer; with
it the default solver steps are (31,), and (16, 16) in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .starts import Start

BASE, NO_SOLVE, PAPER, LINEAR = "default", "no solve (GLA)", "figure 3a", "figure 3a, no solve"


@dataclass(frozen=True)
class Part:
    """One change: the mixer, fields of GKAConfig, initial values, or the dtype of the training."""

    mixer: str = "gka"
    fields: dict[str, Any] = field(default_factory=dict)
    start: Start = Start()  # noqa: RUF009  (frozen)
    dtype: str = "bfloat16"


_NO_GATES = {"use_forget_gate": False, "use_beta_gate": False}
VARIANTS = {
    BASE: Part(),
    NO_SOLVE: Part(mixer="gla"),
    "no forget gate": Part(fields={"use_forget_gate": False}),
    "no beta gate": Part(fields={"use_beta_gate": False}),
    "no alpha connection": Part(fields={"use_alpha_connection": False}),
    "alpha starts at 0.88": Part(start=Start(alpha_bias=2.0)),
    "alpha starts at 0.12": Part(start=Start(alpha_bias=-2.0)),
    "A starts 10 times smaller": Part(start=Start(rate=0.1)),
    "dt starts 10 times smaller": Part(start=Start(step=0.1)),
    PAPER: Part(fields={**_NO_GATES, "use_alpha_connection": False}),
    LINEAR: Part("gla", _NO_GATES),
    "a = 0.01": Part(fields={"ridge_ratio": 0.01}),
    "a = 0.05": Part(fields={"ridge_ratio": 0.05}),
    "a = 0.1": Part(fields={"ridge_ratio": 0.1}),
    "steps (31,)": Part(fields={"solver_steps": [31]}),
    "conjugate gradient": Part(fields={"solver": "cg"}),
    "first weights 1 / sqrt(dim)": Part(fields={"initializer_range": None}),
    "float32": Part(dtype="float32"),
}
SINGLE = tuple(name for name in VARIANTS if name not in (BASE, NO_SOLVE, PAPER, LINEAR))
