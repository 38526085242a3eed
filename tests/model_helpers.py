"""Small models and inputs that the tests of the layer and of the models share."""

from __future__ import annotations

import copy
from typing import Any

import torch
from helpers import relative_error
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from gka import GatedKalmaNet, GKAConfig, GKAForCausalLM

GKA, FULL, SLIDING = "linear_attention", "full_attention", "sliding_attention"
PAD = 0

# Odd sizes, grouped heads, and weights far from zero, so that nothing that goes wrong drowns.
SIZES: dict[str, Any] = dict(
    vocab_size=61,
    hidden_size=36,
    intermediate_size=44,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=10,
    initializer_range=0.3,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=None,
)
KINDS: dict[str, dict[str, Any]] = {
    "gka": dict(layer_types=[GKA, GKA]),
    "gka without groups": dict(layer_types=[GKA], num_key_value_heads=4),
    "gka without v convolution": dict(layer_types=[GKA, GKA], use_v_conv=False),
    "gka, heads expanded": dict(layer_types=[GKA], kv_proj_rank=3, kv_learnable_residual=True),
    "gla": dict(layer_types=[GKA, GKA], mixer="gla"),
    "hybrid": dict(layer_types=[GKA, FULL, GKA]),
    "hybrid, attention first": dict(layer_types=[FULL, GKA], use_qk_norm=False),
    "hybrid, sliding": dict(layer_types=[GKA, SLIDING, GKA], sliding_window=4),
    "hybrid, all three": dict(layer_types=[SLIDING, GKA, FULL], sliding_window=3, attention_bias=True),
}


def tiny_config(kind: str = "gka", **changes: Any) -> GKAConfig:
    """A configuration of KINDS, with changes."""
    fields = {**SIZES, **KINDS[kind], **changes}
    return GKAConfig(**{"num_hidden_layers": len(fields["layer_types"]), **fields})


def tiny_model(
    kind: str = "gka", dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any
) -> GKAForCausalLM:
    """A model of KINDS with random weights, in eval mode; its rotary angles stay float32, as when loaded."""
    torch.manual_seed(seed)
    model = GKAForCausalLM(tiny_config(kind, **changes)).eval()
    rotary = copy.deepcopy(getattr(model.model, "rotary_emb", None))
    model.to(dtype)
    if rotary is not None:
        model.model.rotary_emb = rotary
    return model


def tiny_layer(dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> GatedKalmaNet:
    """A layer with random weights, as a model makes it."""
    return tiny_model("gka", dtype, seed, **changes).model.layers[0].gka


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    """Token ids that are no pads."""
    return torch.randint(1, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def random_inputs(*shape: int, seed: int = 0) -> Tensor:
    """Hidden states in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def new_cache(config: GKAConfig) -> DynamicCache:
    return DynamicCache(config=config)


def cache_tensors(cache: DynamicCache) -> dict[str, Tensor]:
    """Every tensor that a cache holds, by layer and kind."""
    found: dict[str, Tensor] = {}
    for index, layer in enumerate(cache.layers):
        for kind in ("conv_states", "recurrent_states"):
            for number, tensor in getattr(layer, kind, {}).items():
                found[f"{index} {kind} {number}"] = tensor
        for kind in ("keys", "values"):
            found[f"{index} {kind}"] = getattr(layer, kind, None)
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def assert_near(out: Tensor, ref: Tensor, bound: float, what: str = "") -> None:
    """||out - ref|| / ||ref|| is at most `bound`."""
    error = relative_error(out, ref)
    assert error <= bound, f"{what or 'relative error'}: {error:.3g} beyond {bound:g}"


def parameter_gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Gradients of all parameters, which must all be there."""
    missing = [name for name, value in model.named_parameters() if value.grad is None]
    assert not missing, f"no gradient: {missing}"
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


ROWS = ("plain", "packed", "masked", "in parts", "checkpointed", "autocast")


def layer_outcome(layer: torch.nn.Module, rows: str, T: int = 13) -> dict[str, Tensor]:
    """Outputs, states and gradients of a `tiny_layer`, wherever it lies, on T tokens in rows of one of ROWS."""
    device, dtype = layer.A_log.device, layer.A_log.dtype
    x = random_inputs(1 if rows == "packed" else 2, T, 36).to(device, dtype).requires_grad_()
    cache = new_cache(tiny_config())
    with torch.autocast(device.type, torch.bfloat16, enabled=rows == "autocast"):
        if rows == "packed":
            out = layer(x, cu_seqlens=torch.tensor([0, T // 3, T // 3, T // 3 + 1, T], device=device))
        elif rows == "masked":
            mask = torch.ones(2, T, device=device)
            mask[0, : T // 3] = mask[1, T // 2 :] = 0
            out = layer(x, mask, cache)
        elif rows == "in parts":
            parts = x.split([T // 2, 1, 2, T - T // 2 - 3], dim=1)
            out = torch.cat([layer(part, past_key_values=cache) for part in parts], dim=1)
        elif rows == "checkpointed":
            out = checkpoint(layer, x, use_reentrant=False)
        else:
            out = layer(x)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    cotangent = random_inputs(*out.shape, seed=3).to(device, out.dtype)
    grads = torch.autograd.grad(out, [x, *parameters], cotangent)
    return {"out": out, **cache_tensors(cache), **dict(zip(["dx", *names], grads, strict=True))}


def losses_of_training(
    model: torch.nn.Module, tokens: Tensor, optimizer: torch.optim.Optimizer, steps: int
) -> list[float]:
    """The loss of each step that trains the model on the same tokens."""
    losses = []
    for _ in range(steps):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
