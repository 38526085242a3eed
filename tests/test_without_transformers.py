"""`import gka`, the operation and the layer where transformers is missing; the Auto classes where it is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from model_helpers import tiny_model

_BLOCKED = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""
_WORKS = """
import torch
import gka, gka.ops, gka.nn

q, k, v = (torch.randn(1, 6, 2, 4, requires_grad=True) for _ in range(3))
o, state = gka.ops.gated_kalmanet(q, k, v, -torch.rand(1, 6, 2), output_final_state=True)
o.sum().backward()
assert q.grad.abs().sum() > 0
layer = gka.GatedKalmaNet(16, 2)
x = torch.randn(2, 6, 16, requires_grad=True)
out = layer(x)
out.square().sum().backward()
assert x.grad.abs().sum() > 0 and all(p.grad is not None for p in layer.parameters())
first, state = layer(x[:, :5], return_state=True)
last, state = layer(x[:, 5:], state=state, return_state=True)
assert torch.allclose(torch.cat([first, last], 1), out, atol=1e-5)
for ask in (lambda: gka.GKAConfig, lambda: __import__("gka.hf")):
    try:
        ask()
    except ModuleNotFoundError as error:
        assert "pip install 'gated-kalmanet[hf]'" in str(error), error
    else:
        raise AssertionError("transformers is missing")
try:
    layer(x, past_key_values=object())
except TypeError as error:
    assert "gated-kalmanet[hf]" in str(error), error
else:
    raise AssertionError("no cache")
assert "transformers" not in sys.modules
"""
_SECONDS = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
_LOADS = """
config, model = AutoConfig.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
assert type(config).__name__ == "GKAConfig" and type(model).__name__ == "GKAForCausalLM"
"""


def python(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_op_and_layer_work_without_transformers() -> None:
    python(_BLOCKED + _WORKS)


def test_the_import_costs_little_more_than_torch() -> None:
    seconds = {
        name: min(float(python(_BLOCKED + _SECONDS.format(name))) for _ in range(3)) for name in ("torch", "gka")
    }
    assert seconds["gka"] <= seconds["torch"] + 0.3, seconds


@pytest.mark.parametrize(
    "imports",
    [
        "import gka; from transformers import AutoConfig, AutoModelForCausalLM",
        "from transformers import AutoConfig, AutoModelForCausalLM; import gka",
        "import transformers; import gka; from transformers import AutoModelForCausalLM, AutoConfig",
    ],
    ids=["gka first", "Auto classes first", "transformers first"],
)
def test_the_auto_classes_know_the_models(imports: str, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    python(
        f"import sys; folder = sys.argv[1]; {imports}\nassert 'gka.hf' not in sys.modules{_LOADS}", str(tmp_path)
    )
