"""torch.compile of whole models: one graph for all lengths, packed or padded, and the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import assert_close
from model_helpers import assert_near, random_inputs, random_tokens, tiny_layer, tiny_model
from torch._dynamo.testing import CompileCounterWithBackend

KIND = "hybrid, attention first"


def graphs() -> Any:
    """A backend that runs graphs as they are and counts them."""
    torch._dynamo.reset()
    return CompileCounterWithBackend("aot_eager")


@torch.no_grad()
def test_one_graph_for_all_lengths() -> None:
    model, backend = tiny_model(KIND), graphs()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for B, T in ((2, 12), (3, 70), (5, 33)):
        tokens = random_tokens(B, T)
        assert_near(compiled(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits, 1e-12)
    assert sum(len(graph.graph.nodes) > 0 for graph in backend.graphs) == 1


@torch.no_grad()
def test_padded_and_packed_batches_are_one_graph() -> None:
    model, tokens = tiny_model(KIND), random_tokens(1, 12)
    mask = torch.tensor([[0, 0, 0, *[1] * 9]])
    edges, positions = torch.tensor([0, 3, 4, 12]), torch.tensor([[0, 1, 2, 0, *range(8)]])
    for told in ({"attention_mask": mask}, {"cu_seq_lens_q": edges, "position_ids": positions}):
        compiled = torch.compile(model, fullgraph=True, backend=graphs())
        out = compiled(tokens, use_cache=False, **told).logits
        assert_near(out, model(tokens, use_cache=False, **told).logits, 1e-12)


@torch.no_grad()
def test_positions_alone_break_the_graph() -> None:
    """Whether a 0 stands among them decides what is run: cu_seq_lens_q beside them leaves nothing to look at."""
    model, tokens, backend = tiny_model("gka without groups"), random_tokens(1, 12), graphs()
    told = torch.tensor([[0, 1, 2, 0, *range(8)]])
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Data-dependent"):
        torch.compile(model, fullgraph=True, backend=backend)(tokens, position_ids=told, use_cache=False)
    out = torch.compile(model, backend=backend)(tokens, position_ids=told, use_cache=False).logits
    assert_near(out, model(tokens, position_ids=told, use_cache=False).logits, 1e-12)


@torch.no_grad()
def test_generation() -> None:
    """Two graphs, one for the prompt and one for all tokens after it; a static cache gives shapes that stay."""
    model, tokens, backend = tiny_model(KIND, solver_steps=[2]), random_tokens(2, 7), graphs()  # quickly traced
    mask = torch.tensor([[0, 0, *[1] * 5], [1] * 7])
    options = dict(max_new_tokens=9, do_sample=False, attention_mask=mask)
    expected = model.generate(tokens, **options)
    model.forward = torch.compile(model.forward, fullgraph=True, backend=backend)
    assert torch.equal(model.generate(tokens, cache_implementation="static", **options), expected)
    assert sum(len(graph.graph.nodes) > 0 for graph in backend.graphs) <= 3


@pytest.mark.slow
def test_inductor() -> None:
    """The default backend: outputs and gradients of a layer, two lengths by one compilation."""
    torch._dynamo.reset()
    layer = tiny_layer(torch.float32, use_v_conv=False, use_output_gate=False, solver_steps=[3])  # less to compile
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for T in (12, 37):
        x, found = random_inputs(2, T, 36).float().requires_grad_(), []
        for function in (compiled, layer):
            out = function(x)
            names, parameters = zip(*layer.named_parameters(), strict=True)
            grads = torch.autograd.grad(out, [x, *parameters], random_inputs(*out.shape, seed=3).float())
            found.append({"out": out, **dict(zip(["dx", *names], grads, strict=True))})
        assert_close(found[0], found[1], 1e-4)
