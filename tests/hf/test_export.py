"""torch.export: one program for every batch size and length, saved and loaded, gives the model's logits."""

from __future__ import annotations

import io

import pytest
import torch
from model_helpers import assert_near, random_tokens, tiny_model
from torch import Tensor, nn
from torch.export import Dim, export, load, save

BOUND = 1e-6  # RMSNorm, softmax and rotary embedding are in float32; small projections are one product or three


class Prefill(nn.Module):
    """Logits of a prompt: exported programs take and return tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.model(input_ids, attention_mask=attention_mask, use_cache=False).logits


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gka", "hybrid, sliding"])
def test_any_batch_and_length(kind: str) -> None:
    model, sizes = tiny_model(kind), {0: Dim("batch"), 1: Dim("length")}
    program = export(Prefill(model), (random_tokens(2, 19),), dynamic_shapes=(sizes,))
    buffer = io.BytesIO()
    save(program, buffer)
    buffer.seek(0)
    loaded = load(buffer).module()
    for B, T in ((1, 2), (3, 64), (2, 131)):
        tokens = random_tokens(B, T)
        assert_near(loaded(tokens), model(tokens, use_cache=False).logits, BOUND, f"{B} x {T}")


@torch.no_grad()
def test_padded_batches() -> None:
    model, sizes = tiny_model("hybrid"), {0: Dim("batch"), 1: Dim("length")}
    example = (random_tokens(2, 19), torch.ones(2, 19, dtype=torch.long))
    program = export(Prefill(model), example, dynamic_shapes=(sizes, sizes)).module()
    tokens, mask = random_tokens(3, 12), torch.ones(3, 12, dtype=torch.long)
    mask[0, :5] = mask[2, :1] = 0
    real = mask == 1
    expected = model(tokens, attention_mask=mask, use_cache=False).logits
    assert_near(program(tokens, mask)[real], expected[real], BOUND)


def test_the_solve_is_an_operator_of_gka() -> None:
    """That is why a program needs `import gka` where it is loaded, and why no other runtime runs it."""
    program = export(Prefill(tiny_model("gka")), (random_tokens(2, 9),))
    graphs = [part.graph for part in program.graph_module.modules() if hasattr(part, "graph")]
    names = [str(node.target) for graph in graphs for node in graph.nodes]
    assert [name for name in names if name.startswith("gka.")] == ["gka.forward.default"] * 2
