"""Folders in the published format, written from its names and shapes alone, and its layer stated once more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, INNER, VOCAB = 24, 40, 53
H, HK, D, WIDTH, RANK = 4, 2, 8, 4, 3
GKA_CONFIG: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "head_dim": D,
    "num_q_heads": H,
    "num_k_heads": HK,
    "num_v_heads": HK,
    "use_alpha_connection": True,
    "use_v_conv": True,
    "use_forgetting_gate": True,
    "gla_rescale": True,
    "solver_type": "chebyshev",
    "bp_lambda": True,
    "num_iter": 30,
    "ridge_strength": 0.02,
    "use_gate": True,
    "conv_size": WIDTH,
    "norm_eps": 1e-6,
    "use_forgetting_gate_kk": True,
    "use_beta_gate": True,
    "chunk_size": 64,
    "kv_proj_rank": None,
    "kv_learnable_residual": False,
}


def published_config(pattern: str = "*-GKA", gka: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A config.json in the published format; `gka` changes its gka_config."""
    layers = pattern.split("-")
    config = {
        "architectures": ["HybridQwen3ForCausalLM"],
        "model_type": "hybrid_qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "gka_config": {**GKA_CONFIG, **(gka or {})},
        "head_dim": D,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "hybrid_override_pattern": pattern,
        "initializer_range": 0.02,
        "intermediate_size": INNER,
        "layer_types": layers,
        "max_position_embeddings": 4096,
        "max_window_layers": len(layers),
        "num_attention_heads": H,
        "num_hidden_layers": len(layers),
        "num_key_value_heads": HK,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCAB,
        **({"swa_config": {"window_size": 5}} if "SWA" in layers else {}),
    }
    return {**config, **changes}


def layer_shapes(gka: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a GKA layer, as the format's table lists them."""
    shapes: dict[str, tuple[int, ...]] = {
        "q_proj.weight": (H * D, HIDDEN),
        "k_proj.weight": (HK * D, HIDDEN),
        "v_proj.weight": (HK * D, HIDDEN),
        "g_proj.weight": (H * D, HIDDEN),
        "o_proj.weight": (HIDDEN, H * D),
        "a_proj.weight": (H, HIDDEN),
        "b_proj.weight": (H, HIDDEN),
        "b_proj.bias": (H,),
        "alpha_proj.weight": (H, HIDDEN),
        "alpha_proj.bias": (H,),
        "A_log": (H,),
        "dt_bias": (H,),
        "q_conv1d.weight": (H * D, 1, WIDTH),
        "k_conv1d.weight": (HK * D, 1, WIDTH),
        "v_conv1d.weight": (HK * D, 1, WIDTH),
        "o_norm.weight": (D,),
    }
    for name, switch in (("v_conv1d", "use_v_conv"), ("g_proj", "use_gate")):
        if not gka[switch]:
            del shapes[f"{name}.weight"]
    for name, switch in (("alpha_proj", "use_alpha_connection"), ("b_proj", "use_beta_gate")):
        if not gka[switch]:
            del shapes[f"{name}.weight"], shapes[f"{name}.bias"]
    if (rank := gka["kv_proj_rank"]) is not None:
        for kind in "kv":
            shapes[f"proj_{kind}.linearA.weight"] = (rank, HK * D)
            shapes[f"proj_{kind}.linearB.weight"] = (H * D, rank)
            if gka["kv_learnable_residual"]:
                shapes[f"{kind}_rep"] = (H, HK)
    return shapes


def published_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint: Qwen3's names, and those of GKA layers."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for number, symbol in enumerate(config["hybrid_override_pattern"].split("-")):
        at = f"model.layers.{number}."
        if symbol == "GKA":
            shapes |= {f"{at}gka.{name}": shape for name, shape in layer_shapes(config["gka_config"]).items()}
        else:
            shapes |= {
                f"{at}self_attn.q_proj.weight": (H * D, HIDDEN),
                f"{at}self_attn.k_proj.weight": (HK * D, HIDDEN),
                f"{at}self_attn.v_proj.weight": (HK * D, HIDDEN),
                f"{at}self_attn.o_proj.weight": (HIDDEN, H * D),
                f"{at}self_attn.q_norm.weight": (D,),
                f"{at}self_attn.k_norm.weight": (D,),
            }
        shapes |= {
            f"{at}mlp.gate_proj.weight": (INNER, HIDDEN),
            f"{at}mlp.up_proj.weight": (INNER, HIDDEN),
            f"{at}mlp.down_proj.weight": (HIDDEN, INNER),
            f"{at}input_layernorm.weight": (HIDDEN,),
            f"{at}post_attention_layernorm.weight": (HIDDEN,),
        }
    shapes["model.norm.weight"] = (HIDDEN,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    return shapes


def published_tensors(
    config: dict[str, Any], dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> dict[str, Tensor]:
    """Random weights, far enough from zero that nothing that goes wrong drowns."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in published_shapes(config).items():
        value = torch.randn(shape, generator=generator)
        if "norm" in name:
            value = 1 + 0.3 * value
        elif "conv1d" in name:
            value = 0.6 * value
        elif "embed" not in name and len(shape) == 2 and "_rep" not in name:
            value = 1.5 * value / shape[1] ** 0.5
        elif name.endswith("dt_bias"):
            value = value - 3
        tensors[name] = value.to(dtype)
    return tensors


def write_folder(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor] | None = None, shards: int = 3
) -> Path:
    """Write a checkpoint, in several files with their index; 1 shard is one file without."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = published_tensors(config) if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    places = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard::shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def restated_layer(x: Tensor, w: dict[str, Tensor], gka: dict[str, Any]) -> Tensor:
    """The published layer in float64, token by token, the solve exact.

    x: [T, hidden]; w: the layer's tensors by their short names -> [T, hidden].
    """
    x, w, T = x.double(), {name: value.double() for name, value in w.items()}, x.shape[0]

    def convolved(name: str) -> Tensor:
        y = x @ w[f"{name}_proj.weight"].T
        if f"{name}_conv1d.weight" not in w:
            return y
        kernel = w[f"{name}_conv1d.weight"][:, 0]
        before = torch.cat([y.new_zeros(WIDTH - 1, y.shape[1]), y])
        return F.silu(sum(kernel[:, j] * before[j : j + T] for j in range(WIDTH)))

    def expanded(name: str) -> Tensor:
        flat = convolved(name)
        heads = flat.view(T, HK, D)
        if f"{name}_rep" in w:
            all_heads = torch.stack(
                [sum(w[f"{name}_rep"][h, j] * heads[:, j] for j in range(HK)) for h in range(H)], dim=1
            )
        else:
            all_heads = torch.stack([heads[:, h // (H // HK)] for h in range(H)], dim=1)
        if gka["kv_proj_rank"] is None:
            return all_heads
        low = F.silu(flat @ w[f"proj_{name}.linearA.weight"].T) @ w[f"proj_{name}.linearB.weight"].T
        return all_heads + low.view(T, H, D)

    def gate(name: str) -> Tensor:
        return torch.sigmoid(x @ w[f"{name}_proj.weight"].T + w[f"{name}_proj.bias"])

    q, k, v = convolved("q").view(T, H, D), expanded("k"), expanded("v")
    q, k = (y / (y.norm(dim=-1, keepdim=True) + 1e-6) for y in (q, k))
    beta = gate("b") + 1e-6 if gka["use_beta_gate"] else x.new_ones(T, H)
    k, v = k * beta[..., None], v * beta[..., None]
    alpha = gate("alpha") if gka["use_alpha_connection"] else x.new_ones(T, H)
    g = -torch.exp(w["A_log"]) * F.softplus(x @ w["a_proj.weight"].T + w["dt_bias"])
    out = x.new_zeros(T, H, D)
    for h in range(H):
        S_kk, S_kv = x.new_zeros(D, D), x.new_zeros(D, D)
        for t in range(T):
            S_kk = S_kk * g[t, h].exp() + torch.outer(k[t, h], k[t, h])
            S_kv = S_kv * g[t, h].exp() + torch.outer(k[t, h], v[t, h])
            ridge = gka["ridge_strength"] * S_kk.norm() * torch.eye(D, dtype=x.dtype)
            solved = torch.linalg.solve(S_kk + ridge, q[t, h])
            out[t, h] = (q[t, h] + alpha[t, h] * (solved - q[t, h])) @ S_kv / D**0.5
    out = out / (out.pow(2).mean(-1, keepdim=True) + gka["norm_eps"]).sqrt() * w["o_norm.weight"]
    if gka["use_gate"]:
        out = out * F.silu(x @ w["g_proj.weight"].T).view(T, H, D)
    return out.flatten(1) @ w["o_proj.weight"].T
