"""Decoding on a GPU by a CUDA graph: the model's step of one token, recorded once and replayed for every token.

A step launches about a thousand small kernels, and the host needs longer for that than the GPU for the
arithmetic. A replay launches all of them at once. It runs the same kernels on the same addresses;
`gka.hf.fixed_cache` keeps the cache there. `generate` runs as ever, with a `Decoding` in place of the model: it
replays the steps of one token and hands every other call to the model.

transformers has another way, torch.compile with a static cache. It compiles before the first token, and again
for another length. It fuses operations, so 16-bit numbers differ and with them, at times, tokens.

The graph of the last call of `generate` is kept for the next, with its buffers, and used again if the call has
the same batch size and the model is as it was (`fingerprint`). `model.train()` and `model.to()` free it, and so
does a call that runs out of memory.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import DynamicCache
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .cache_name import CACHE, NEW, OLD, named
from .compiled_step import decode_compiled, is_asked_for
from .fixed_cache import FULL, FixedCache, layout, new_zeros
from .mixers import OURS
from .recording import recording

DEVICE = "cuda"
SMALLEST = 256  # slots of an attention layer
FEW = 8192  # so many cost little, also where fewer would do
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_ATTENTION = ("sdpa", "eager")  # take a mask of slots
_STEP_INPUTS = {
    *("input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep", "no_pads", "return_dict"),
    *(OLD, NEW),
}


def record(function: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], object], Tensor]:
    """A function that replays what `function` launches, and the tensor for its result; nothing runs yet."""
    graph = torch.cuda.CUDAGraph()
    with recording(graph, _stream(device)):
        result = function()
    return graph.replay, result


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all recordings: cuBLAS keeps memory for each stream that it has seen."""
    return torch.cuda.Stream(device)


def capacity_for(tokens: int) -> int:
    """Slots for that many tokens and some more, at most a quarter, so that growing is rare."""
    unit = max(SMALLEST, 1 << max(0, tokens.bit_length() - 3))
    return -(-tokens // unit) * unit


class CapturedStep:
    """One token of every row: the first call runs, the second is recorded, all from then on are replayed.

    Args:
        fits: what the graph was recorded for; it serves no other caches and models.
        batch: rows.
        capacity: slots of layers with full attention.
        device: the device of the model.
    """

    def __init__(self, fits: tuple[Any, ...], batch: int, capacity: int, device: torch.device) -> None:
        self.fits, self.capacity, self.device = fits, capacity, device
        self.fixed = FixedCache(capacity, device)
        self.in_use = threading.Lock()
        self.unable = ""
        self._ids = new_zeros((batch, 1), torch.long, device)
        self._positions = new_zeros((batch, 1), torch.long, device)
        self._replay: Callable[[], object] | None = None
        self._logits: Tensor | None = None

    def has_room(self, tokens: int) -> bool:
        """Whether one more than `tokens` tokens fit."""
        return FULL not in self.fixed.slots or tokens < self.capacity

    def is_small(self, tokens: int) -> bool:
        """Whether there are not many more slots than `tokens` tokens need; every step reads them all."""
        return FULL not in self.fixed.slots or self.capacity <= max(FEW, 4 * capacity_for(tokens + 1))

    def __call__(self, model: Any, cache: Cache, ids: Tensor, positions: Tensor | None, tokens: int) -> Tensor:
        """Logits [B, 1, vocabulary], valid until the next call; ids [B, 1], positions [B or 1, 1] int64.

        tokens: the number of tokens in the cache before this step.
        """
        self.fixed.settle()
        self._ids.copy_(ids)
        if positions is not None:
            self._positions.copy_(positions)
        if self._replay is None and self._logits is not None and not self.unable:
            self._record(model, cache)
        if self._replay is None:
            self._logits = self._run(model, cache)
        else:
            self._replay()
        self.fixed.count(cache, tokens + 1)
        assert self._logits is not None
        return self._logits

    def _record(self, model: Any, cache: Cache) -> None:
        try:
            self._replay, self._logits = record(lambda: self._run(model, cache), self.device)
        except RuntimeError as error:  # something in the model, an adapter or a hook, waits for the GPU
            self.unable = str(error).strip().splitlines()[0]
            warn_slow(f"the step cannot be recorded ({self.unable})")

    def _run(self, model: Any, cache: Cache) -> Tensor:
        self.fixed.step()
        masks: dict[str, Tensor | None] = dict.fromkeys(model.config.layer_types)
        for kind, slots in self.fixed.slots.items():
            mask = slots.real[:, None, None, :]
            if model.config._attn_implementation == "eager":  # adds its mask
                zero = torch.zeros((), dtype=model.dtype, device=mask.device)
                mask = torch.where(mask, zero, torch.finfo(model.dtype).min)
            masks[kind] = mask
        positions = {"position_ids": self._positions} if model.config.has_attention else {}
        out = model(
            input_ids=self._ids,
            attention_mask=masks,
            use_cache=True,
            logits_to_keep=1,
            **positions,
            **named(cache),
        )
        self.fixed.tokens.add_(1)
        logits: Tensor = out.logits
        return logits


_KEPT: WeakKeyDictionary[nn.Module, CapturedStep] = WeakKeyDictionary()


def forget(model: nn.Module) -> None:
    """Free the graph and the buffers that are kept for a model."""
    _KEPT.pop(model, None)


class Decoding:
    """The model for one call of `generate`, except that steps of one token are replayed."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._step: CapturedStep | None = None
        self._cache: Any = None
        self._tokens = 0
        self._eagerly = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **inputs: Any) -> Any:
        ids: Any = inputs.get("input_ids")
        cache: Any = inputs.get(CACHE, inputs.get(OLD))
        is_step = ids is not None and ids.shape[1] == 1 and inputs.get("no_pads", False)
        stays = is_step and cache is self._cache
        if self._step is not None and not (stays and self._step.has_room(self._tokens)):
            self.end(keeps_cache=True)
        if is_step and not self._eagerly and self._step is None:
            self._begin(cache, inputs)
        if self._step is None:
            return self._model(**inputs)
        logits = self._step(self._model, cache, ids, inputs.get("position_ids"), self._tokens)
        self._tokens += 1
        return CausalLMOutputWithPast(logits=logits, **named(cache))  # type: ignore[arg-type]

    def _begin(self, cache: Any, inputs: dict[str, Any]) -> None:
        held = layout(cache) if type(cache) is DynamicCache and not cache.offloading else None
        reason = "the cache is of another kind" if held is None else _why_not(self._model, inputs)
        step = _KEPT.get(self._model)
        if not reason and step is not None and not step.in_use.acquire(blocking=False):
            reason = "another call of generate() on this model runs at the same time"
        if reason:
            warn_slow(reason)
            self._eagerly = True
            return
        tokens = int(cache.get_seq_length())
        fits = (held, fingerprint(self._model))
        if step is None or step.fits != fits or not (step.has_room(tokens) and step.is_small(tokens)):
            _KEPT.pop(self._model, None)
            step = None  # its memory is free before the next takes some
            ids = inputs["input_ids"]
            step = CapturedStep(fits, ids.shape[0], capacity_for(tokens + 1), ids.device)
            step.in_use.acquire()
            _KEPT[self._model] = step
        self._step, self._cache, self._tokens = step, cache, tokens
        step.fixed.move_in(cache, inputs.get("attention_mask"))

    def end(self, *, keeps_cache: bool) -> None:
        """Let the next call have the graph. If the cache lives on, it gets tensors of its own again."""
        step, self._step = self._step, None
        if step is not None:
            if keeps_cache:
                step.fixed.move_out(self._cache)
            step.fixed.forget_cache()
            self._cache = None
            step.in_use.release()


def decode(method: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a loop of transformers' `generate`, on a GPU with steps that are replayed.

    On a CPU steps are compiled if `compile_config` is given. `disable_compile=True`, transformers' switch, leaves
    the steps to the model. So does another cache than the default on a GPU.

    Args:
        method: `GenerationMixin._sample` or `_beam_search`.
        model, args, kwargs: its arguments.
    """
    config, cache = kwargs.get("generation_config"), kwargs.get(CACHE)
    if is_asked_for(model, config, cache):
        return decode_compiled(method, model, *args, **kwargs)
    if config is None or config.disable_compile or type(cache) is not DynamicCache or model.device.type != DEVICE:
        return method(model, *args, **kwargs)
    if kwargs.get("synced_gpus"):
        warn_slow("synced_gpus is True")
        return method(model, *args, **kwargs)
    decoding = Decoding(model)
    try:
        return method(decoding, *args, **kwargs)
    except torch.OutOfMemoryError:
        forget(model)
        raise
    finally:
        given = getattr(cache, "_is_user_defined", False)
        decoding.end(keeps_cache=given or bool(config.return_dict_in_generate))


def fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """What a recording depends on besides its inputs: modules, their attributes, places of weights, settings.

    Weights that are written in place keep it, and a replay reads them. An adapter, other solver steps or a weight
    in another place change it.
    """
    attention = torch.backends.cuda
    found: list[Any] = [
        getattr(model.config, "_attn_implementation", None),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        attention.flash_sdp_enabled(),
        attention.mem_efficient_sdp_enabled(),
        attention.math_sdp_enabled(),
        attention.cudnn_sdp_enabled(),
    ]
    for module in model.modules():
        found.append(type(module))
        for name, value in vars(module).items():
            if value is not None and not (isinstance(value, dict) and not value):  # as most are
                found.append((name, _traits(value)))
    return tuple(found)


def _traits(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.data_ptr(), value.dtype, tuple(value.shape), value.stride()
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, nn.Module):  # walked by itself
        return type(value)
    if isinstance(value, dict):
        return tuple((key if isinstance(key, _PLAIN) else id(key), _traits(each)) for key, each in value.items())
    if isinstance(value, list | tuple):
        return tuple(_traits(each) for each in value)
    return id(value)


def _why_not(model: Any, inputs: dict[str, Any]) -> str:
    """The reason why a step cannot be recorded; empty if there is none."""
    config, device = model.config, model.device
    others = [name for name, x in inputs.items() if name not in _STEP_INPUTS and x is not None and x is not False]
    weights = [*model.parameters(), *model.buffers()]
    reasons = {
        "the model is in training mode": model.training,
        "gradients are on": torch.is_grad_enabled(),
        "autocast is on; load the weights in 16 bits instead": torch.is_autocast_enabled(device.type),
        "GKA_CHECK_VALUES is 1": os.environ.get("GKA_CHECK_VALUES") == "1",
        "a mode of PyTorch watches every operation": torch._C._len_torch_dispatch_stack() > 0,
        f"the steps have {', '.join(others)}": bool(others),
        "the model runs by torch.compile": any(map(_is_compiled, model.modules())),
        "hooks are registered, and a replay would not call them": _has_hooks(model),
        f"mixer {config.mixer!r} is another package's": config.mixer not in OURS,
        f"attn_implementation is {config._attn_implementation!r}, not one of {', '.join(_ATTENTION)}": (
            config.has_attention and config._attn_implementation not in _ATTENTION
        ),
        "position_ids are missing": config.has_attention and inputs.get("position_ids") is None,
        "the weights are quantised, sharded or not all on one GPU": any(
            type(x) not in (Tensor, nn.Parameter) or x.device != device for x in weights
        ),
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


def _has_hooks(model: nn.Module) -> bool:
    """Whether functions in Python are called beside the modules, of this model or of all."""
    if _has_any_global_hook():
        return True
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def _is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile runs a module: it may compile anew at any token, which no recording survives."""
    from torch._dynamo.eval_frame import OptimizedModule  # slow to import, and needed for a cache already

    forward = vars(module).get("forward")
    compiled = module._compiled_call_impl is not None or isinstance(module, OptimizedModule)
    return compiled or hasattr(forward, "_torchdynamo_orig_callable")


_told: set[str] = set()


def warn_slow(reason: str) -> None:
    """Say once for each reason that a model decodes by launching kernel after kernel."""
    if reason not in _told:
        _told.add(reason)
        warnings.warn(f"gated_kalmanet decodes without a CUDA graph, many times slower: {reason}", stacklevel=2)
