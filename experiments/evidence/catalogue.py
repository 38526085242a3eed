"""The experiments: module by name, in the order of the page."""

from __future__ import annotations

EXPERIMENTS = {
    name: f"experiments.evidence.{name}"
    for name in (
        "numerics", "mqar", "parts", "recall", "lm", "seeds", "long", "ablations", "large", "spectra", "cost",
    )
}  # fmt: skip
