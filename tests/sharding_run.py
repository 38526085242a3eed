"""Models that four CPU processes share, compared with the same models in one process.

ranks.run(4, call, FUNCTION, *arguments)    for tests/distributed/test_sharding.py
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import relative_error
from model_helpers import FULL, GKA, random_inputs, random_tokens, tiny_config, tiny_layer, tiny_model
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

from gka import GKAForCausalLM
from gka.distributed import parallelize, shard_model, tensor_parallel
from gka.nn.head_parallel import HeadParallel
from gka.nn.local_parts import LocalParts

Dims = dict[str, int]
ONE: dict[str, Any] = dict(layer_types=[GKA])
SHORT: dict[str, Any] = dict(layer_types=[GKA, FULL])
# kind of model, changes of its configuration, dims of the mesh
CASES: dict[str, tuple[str, dict[str, Any], Dims]] = {
    "FSDP 4": ("gka", {}, {"dp_shard": 4}),
    "FSDP 2, twice": ("gla", ONE, {"dp_replicate": 2, "dp_shard": 2}),
    "TP 2": ("gka", {}, {"tp": 2}),
    "TP 2, hybrid": ("hybrid, all three", dict(mlp_bias=True), {"tp": 2}),
    "TP 4": ("gka without groups", {}, {"tp": 4}),
    "FSDP 2 x TP 2": ("gka without v convolution", ONE, {"dp_shard": 2, "tp": 2}),
    "FSDP 2 x TP 2, hybrid": ("hybrid", dict(tie_word_embeddings=True, **SHORT), {"dp_shard": 2, "tp": 2}),
    "FSDP 2 x CP 2": ("gka", {}, {"dp_shard": 2, "cp": 2}),
    "FSDP 2 x CP 2, hybrid": ("hybrid", SHORT, {"dp_shard": 2, "cp": 2}),
    "CP 2 x TP 2": ("gla", ONE, {"dp_shard": 1, "cp": 2, "tp": 2}),
    "CP 2 x TP 2, hybrid": ("hybrid, all three", SHORT, {"dp_shard": 1, "cp": 2, "tp": 2}),
}
SAVED: Dims = {"dp_shard": 2, "tp": 2}
HALVES = (("TP 2", "compiled"), ("TP 2, hybrid", "layer", "without the sum"))
NARROW: dict[str, Dims] = {"FSDP": {"dp_shard": 4}, "both": SAVED}
LOADED: dict[str, Dims] = {"FSDP 4": {"dp_shard": 4}, "TP 2": {"tp": 2}, "one process": {}}


def make_mesh(dims: Dims) -> DeviceMesh:
    """A mesh of all processes, or of each half of them; all make it together, once."""
    return _mesh(tuple(dims), tuple(dims.values()))


@functools.cache
def _mesh(names: tuple[str, ...], sizes: tuple[int, ...]) -> DeviceMesh:
    others = dist.get_world_size() // math.prod(sizes)
    return init_device_mesh("cpu", (others, *sizes), mesh_dim_names=("others", *names))[names]


def sharded(model: Any, dims: Dims) -> tuple[Any, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The model on a mesh of these dims; the rows that a process takes, and the mean over processes."""
    if not dims:
        return model, lambda rows: rows, lambda x: x
    mesh, data = make_mesh(dims), tuple(name for name in dims if name != "tp")
    if "cp" in dims:
        parallelize(model, mesh)
        model.set_loss_chunk(5)  # a loss in float64
        data = data[:1]
    if not data:
        return tensor_parallel(model, mesh), lambda rows: rows, lambda x: x
    group = mesh[data]._flatten() if len(data) > 1 else mesh[data]

    def mean(x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group.get_group())
        return total / group.size()

    return shard_model(model, mesh), lambda rows: rows.chunk(group.size())[group.get_local_rank()], mean


def whole(x: Tensor) -> Tensor:
    """All of a tensor."""
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach()


def sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-2)


def adam(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)  # no gradient is far below eps


def train_step(model: Any, optimizer: torch.optim.Optimizer, rows: Tensor) -> dict[str, Tensor]:
    """The loss in float64, all gradients, and the weights after one step."""
    optimizer.zero_grad()
    if model.shared_tokens is not None:
        loss = model(rows, labels=rows).loss
    else:
        loss = cross_entropy(model(rows).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    loss.backward()
    gradients = {f"gradient of {name}": whole(x.grad) for name, x in model.named_parameters()}
    optimizer.step()
    return {"loss": loss.detach(), **gradients, **{name: whole(x) for name, x in model.named_parameters()}}


def errors(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """The error of each tensor, by name."""
    assert mine.keys() == theirs.keys()
    return {name: relative_error(mine[name], theirs[name]) for name in theirs}


def like_one_process(name: str) -> dict[str, float]:
    """A training step with checkpointed blocks, compared with that of the whole model."""
    kind, changes, dims = CASES[name]
    rows, model = random_tokens(4, 9), tiny_model(kind, **changes).train()
    expected = train_step(model, sgd(model), rows)
    again = tiny_model(kind, **changes).train()
    again.gradient_checkpointing_enable()
    model, mine, mean = sharded(again, dims)
    found = train_step(model, sgd(model), mine(rows))
    return errors({**found, "loss": mean(found["loss"])}, expected)


def without_the_sum() -> dict[str, float]:
    """The same for a plan that does not sum the gradient of the norm of the output."""
    rows, model = random_tokens(4, 9), tiny_model().train()
    expected = train_step(model, sgd(model), rows)
    model = tensor_parallel(tiny_model().train(), make_mesh({"tp": 2}))
    for block in model.model.layers:
        del LocalParts.of(block.gka).summed["o_norm.weight"]
    return errors(train_step(model, sgd(model), rows), expected)


def compiled() -> dict[str, float]:
    """The gradients of a model of which a layer, and the norm that reads the embedding, are compiled to graphs."""
    rows, alone = random_tokens(4, 9), tiny_model("gka without groups")
    split: Any = tensor_parallel(tiny_model("gka without groups"), make_mesh({"tp": 2}))
    block = split.model.layers[0]
    block.input_layernorm.compile(
        fullgraph=True, backend="aot_eager"
    )  # gradients of inputs that wait are lost here
    block.gka.compile(fullgraph=True, backend="eager")
    return errors(*(train_step(model, sgd(model), rows) for model in (split, alone)))


def refused() -> dict[str, str]:
    """The errors of what cannot be shared so, and the warning of what is not."""
    adapted, meshes = tiny_model(), {n: make_mesh({"tp": n}) for n in (2, 4)}
    adapted.model.layers[1].gka.q_proj.register_parameter("extra", torch.nn.Parameter(torch.zeros(2)))
    twice = tensor_parallel(tiny_model(), meshes[2])
    both = make_mesh(SAVED)
    calls: dict[str, Callable[[], Any]] = {
        "heads": lambda: tensor_parallel(
            tiny_model("gka", num_attention_heads=6, num_key_value_heads=3), meshes[4]
        ),
        "key/value heads": lambda: tensor_parallel(tiny_layer(), meshes[4]),
        "softmax heads": lambda: tensor_parallel(tiny_model("hybrid", layer_types=[FULL]), meshes[4]),
        "feed-forward": lambda: tensor_parallel(tiny_model(intermediate_size=43), meshes[2]),
        "expanded heads": lambda: tensor_parallel(tiny_model("gka, heads expanded"), meshes[2]),
        "adapter": lambda: tensor_parallel(adapted, meshes[2]),
        "twice": lambda: tensor_parallel(twice, meshes[2]),
        "two dims": lambda: tensor_parallel(tiny_model(), both),
        "other layer": lambda: HeadParallel()._apply(torch.nn.Linear(2, 2), meshes[2]),
        "no dim of data": lambda: shard_model(tiny_model(), meshes[2]),
        "rows that are not shared": lambda: shard_model(tiny_model(), make_mesh({"dp_shard": 2, "cp": 2})),
        "sharded twice": lambda: shard_model(shard_model(tiny_model(), both["dp_shard"]), both["dp_shard"]),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
        except (TypeError, ValueError) as error:
            found[name] = str(error)
    llama = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=44, num_hidden_layers=1, num_attention_heads=2
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        tensor_parallel(tiny_layer(), meshes[2])
        tensor_parallel(LlamaForCausalLM(llama), meshes[2])
    found["attention of another model"] = str([str(x.message) for x in told if "linear maps" in str(x.message)])
    return found


def layer_states() -> dict[str, float]:
    """A layer by heads: its state, and the gradients of a loss through the state alone; packed and padded rows."""
    mesh, found = make_mesh({"tp": 2}), {}
    alone, split = tiny_layer(), tensor_parallel(tiny_layer(), mesh)
    x, cotangent = random_inputs(2, 7, 36), random_inputs(2, 4, 10, 10, seed=1)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    heads = slice(2 * mesh.get_local_rank(), 2 * mesh.get_local_rank() + 2)
    _, state = split(hidden_states=ours, return_state=True)
    _, expected = alone(theirs, return_state=True)
    found["S_kv"] = relative_error(state.state.S_kv, expected.state.S_kv[:, heads])
    (state.state.S_kv * cotangent[:, heads]).sum().backward()
    (expected.state.S_kv * cotangent).sum().backward()
    found["dx"] = relative_error(ours.grad, theirs.grad)
    for name in ("k_proj.weight", "v_conv1d.weight", "A_log", "b_proj.bias"):
        found[name] = relative_error(whole(split.get_parameter(name).grad), alone.get_parameter(name).grad)
    with torch.no_grad():
        after, _ = split(x[:, :1], state=state, return_state=True)
        found["step"] = relative_error(after, alone(x[:, :1], state=expected, return_state=True)[0])
    packed, mask = torch.tensor([0, 3, 3, 7]), torch.ones(2, 7)
    mask[0, :3] = 0
    found["packed"] = relative_error(split(x[:1], cu_seqlens=packed), alone(x[:1], cu_seqlens=packed))
    found["padded"] = relative_error(split(x, mask), alone(x, mask))
    try:
        split(x[0])
    except ValueError:
        found["after an error"] = float(not all(isinstance(p, DTensor) for p in split.parameters()))
    return found


def in_bfloat16(dims: Dims) -> dict[str, Any]:
    """float32 weights that are gathered in bfloat16: errors beside those of one process with bfloat16 weights."""
    rows, name = random_tokens(4, 9), "model.layers.0.gka.A_log"
    models = {
        "one": tiny_model("hybrid", torch.float32, **SHORT),
        "narrow": tiny_model("hybrid", torch.bfloat16, **SHORT),
        "shared": tiny_model("hybrid", torch.float32, **SHORT),
    }
    shard_model(models["shared"], make_mesh(dims), param_dtype=torch.bfloat16)
    logits, gradients = {}, {}
    for which, model in models.items():
        logits[which] = model(rows).logits
        logits[which].backward(random_inputs(*logits[which].shape).to(logits[which].dtype))
        gradients[which] = whole(model.get_parameter(name).grad)
    model = models["shared"]
    found: dict[str, Any] = {"dtypes": sorted({str(x.dtype) for p in model.parameters() for x in (p, p.grad)})}
    for which in ("narrow", "shared"):
        found[f"logits, {which}"] = relative_error(logits[which], logits["one"])
        found[f"A_log, {which}"] = relative_error(gradients[which], gradients["one"])
    found["from narrow"] = relative_error(logits["shared"], logits["narrow"])
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # the norm of all gradients together
    torch.optim.SGD(model.parameters(), foreach=True).step()  # of all parameters together
    return found


def checkpoints(folder: Path) -> dict[str, dict[str, float]]:
    """A checkpoint of one mesh, loaded on others into empty models: the training step that follows."""
    rows = random_tokens(4, 9)
    model, mine, mean = sharded(tiny_model("gka", **ONE).train(), SAVED)
    optimizer = adam(model)
    train_step(model, optimizer, mine(rows))
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / "checkpoint")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "exported", state_dict=full)
    before = {name: whole(x) for name, x in model.named_parameters()}
    after = train_step(model, optimizer, mine(rows))
    after["loss"] = mean(after["loss"])
    found = {}
    for name, dims in LOADED.items():
        with torch.device("meta"):
            empty = GKAForCausalLM(tiny_config("gka", **ONE)).double()
        model, mine, mean = sharded(empty, dims)
        model.to_empty(device="cpu")
        model.init_weights()
        fresh = whole(model.model.layers[0].gka.A_log)
        optimizer = adam(model)
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments}
        dcp.load(state, checkpoint_id=folder / "checkpoint")
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        step = train_step(model, optimizer, mine(rows))
        found[name] = errors({**step, "loss": mean(step["loss"])}, after)
        found[name]["fresh A_log"] = float(not ((fresh >= math.log(0.01)) & (fresh <= math.log(16))).all())
    dist.barrier()
    exported = GKAForCausalLM.from_pretrained(folder / "exported", dtype=torch.float64)
    found["exported"] = errors(dict(exported.named_parameters()), before)
    return found


def by_transformers(folder: Path) -> dict[str, Any]:
    """Loaded by transformers' own plan, a part on each process; gradients, generation and the way back."""
    changes: dict[str, Any] = dict(num_key_value_heads=4, vocab_size=64, **SHORT)
    if dist.get_rank() == 0:
        tiny_model("hybrid", **changes).save_pretrained(folder / "float64")
        tiny_model("hybrid", torch.float32, **changes).save_pretrained(folder / "float32")
    dist.barrier()
    rows, place = random_tokens(2, 9), DistributedConfig(tp_size=4)
    alone = GKAForCausalLM.from_pretrained(folder / "float64", dtype=torch.float64)
    split = GKAForCausalLM.from_pretrained(folder / "float64", dtype=torch.float64, distributed_config=place)
    results = []
    for model in (alone, split):
        model(rows, labels=rows).loss.backward()
        results.append({name: whole(x.grad) for name, x in model.named_parameters()})
    asked: dict[str, Any] = dict(max_new_tokens=4, do_sample=False)
    found: dict[str, Any] = {"gradients": errors(results[1], results[0])}
    found["tokens"] = torch.equal(split.generate(rows, **asked), alone.generate(rows, **asked))
    found["local heads"] = split.model.layers[0].gka.A_log.to_local().numel()
    narrow = GKAForCausalLM.from_pretrained(folder / "float32", dtype=torch.bfloat16, distributed_config=place)
    layer = narrow.model.layers[0].gka
    found["local decay"] = layer.A_log.dtype == torch.bfloat16 and layer.A_log_rest.shape == (4,)
    narrow.save_pretrained(folder / "again")
    dist.barrier()
    first, again = (
        GKAForCausalLM.from_pretrained(folder / name, dtype=torch.bfloat16) for name in ("float32", "again")
    )
    found["lost"] = [n for n, x in first.state_dict().items() if not torch.equal(x, again.state_dict()[n])]
    return found


ALONE = {"compiled": compiled, "layer": layer_states, "without the sum": without_the_sum}


def of_halves() -> dict[str, dict[str, float]]:
    """What needs two processes: each half of the four does its share."""
    make_mesh({"tp": 2})
    return {
        name: ALONE[name]() if name in ALONE else like_one_process(name) for name in HALVES[dist.get_rank() // 2]
    }


def call(group: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """The function, in each process of a pool."""
    return function(*arguments)
