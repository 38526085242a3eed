"""Triton's interpreter without work that comes to nothing; what it computes stays the same to the bit.

Nearly all of its time goes to finding out types and to calls of functions by functions, not to NumPy:

- Launching a kernel replaces what `triton.language` holds by what NumPy computes. The interpreter does so once
  more wherever one function of a kernel calls another: it goes through all names of the language, which takes
  longer than the call. Here that is done once a launch for every module of kernels.
- It works out whether sums and products of integers overflow, for assertions that it then leaves out unless it
  debugs, as the compiler does; the compiler does not work it out either.
- Every value gets types and shapes made anew. Here a type of blocks is made once, with its values' shape.
- What has one type already needs no promotion: such operands go to NumPy at once.
- bfloat16 is the upper half of float32: only numbers below the normal ones take more than a shift, they alone.

All this is made for the inside of one version of Triton; others interpret as they are, in more time.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import math
from collections.abc import Callable
from typing import Any

import numpy as np

VERSION = "3.9.0"


def is_made_for_this() -> bool:
    """Whether the installed Triton is the version that this is made for."""
    try:
        return importlib.metadata.version("triton") == VERSION
    except importlib.metadata.PackageNotFoundError:
        return False


def install() -> None:
    """Change the interpreter of this process."""
    _check_no_overflow()
    _replace_the_language_once()
    _keep_types()
    _compute_at_once()
    _convert_by_shifts()


def _check_no_overflow() -> None:
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)


def _replace_the_language_once() -> None:
    from triton.language import core
    from triton.runtime import interpreter

    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: set[int] = set()  # modules, by their globals, in which the language is replaced in this launch

    def replace_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module in done:
            return None
        done.add(module)
        return replace(function)

    def launch_anew(self: Any, *arguments: Any, **named: Any) -> Any:
        done.clear()
        try:
            return launch(self, *arguments, **named)
        finally:
            done.clear()

    wrapper = core.add.__code__  # of what `core.builtin` makes of a function: asks for _semantic, and calls

    def replace_one(target: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        function = member.__wrapped__ if getattr(member, "__code__", None) is wrapper else member
        semantic = interpreter.interpreter_semantic

        def call(*arguments: Any, _semantic: Any = None, **named: Any) -> Any:
            return function(*arguments, _semantic=semantic, **named)

        scope.set_attr(target, name, call)

    interpreter._patch_lang, interpreter._patch_attr = replace_once, replace_one
    interpreter.GridExecutor.__call__ = launch_anew


def _keep_types() -> None:
    """One object for each type of blocks, so that types are equal where they are the same object."""
    from triton.language import core
    from triton.runtime import interpreter

    kept: dict[tuple[Any, ...], Any] = {}
    make, unwrap = core.block_type.__init__, core._unwrap_if_constexpr

    def keep(cls: Any, element: Any, shape: Any) -> Any:
        key = (element.name, getattr(element, "address_space", None), *shape)
        if key not in kept:
            kept[key] = object.__new__(cls)
        return kept[key]

    def make_once(self: Any, element: Any, shape: Any) -> None:
        if "name" not in vars(self):
            make(self, element, shape)

    core.block_type.__new__, core.block_type.__init__ = keep, make_once
    core.block_type.with_element_ty = functools.cache(core.block_type.with_element_ty)
    core.block_type.__hash__, core.pointer_type.__hash__ = object.__hash__, core.dtype.__hash__

    def shape_of(kind: Any) -> tuple[Any, Any]:
        shape = kind.shape if kind.is_block() else ()
        kind.shape_of_values = core.tuple([core.constexpr(n) for n in shape]), core.constexpr(math.prod(shape))
        return kind.shape_of_values

    def fill(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = vars(type).get("shape_of_values") or shape_of(type)

    core.tensor.__init__ = fill

    @functools.cache
    def holds(kind: type) -> bool:
        return issubclass(kind, (list, tuple, core.tuple, core.constexpr))

    def unwrap_quickly(value: Any) -> Any:
        kind = type(value)
        if kind is core.constexpr:
            return value.value
        return unwrap(value) if holds(kind) else value

    core._unwrap_if_constexpr = unwrap_quickly

    for cls in (core.dtype, core.block_type, core.pointer_type):
        cls.__eq__ = _or_the_same(cls.__eq__)

    numpy_types, of_name = interpreter._get_np_dtype, {}

    def numpy_type(kind: Any) -> Any:
        if kind.name not in of_name:
            of_name[kind.name] = numpy_types(kind)
        return of_name[kind.name]

    interpreter._get_np_dtype = numpy_type


def _or_the_same(equal: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    return lambda a, b: a is b or equal(a, b)


def _compute_at_once() -> None:
    """Operations on two values of one type, or on one and a number."""
    from triton.language import core
    from triton.runtime import interpreter

    semantic, builder = interpreter.interpreter_semantic, interpreter.interpreter_builder
    handle, tensor = interpreter.TensorHandle, core.tensor
    plain = {core.float32} if builder.options.sanitize_overflow else {core.float32, core.int32, core.int64}
    limits = {id(dtype): 2.0**128 if dtype is core.float32 else 2 ** (dtype.int_bitwidth - 1) for dtype in plain}

    @functools.cache
    def together(a: Any, b: Any) -> Any:
        """The type of both after broadcasting, in the dtype of the first; None where they do not go together."""
        if not (a.is_block() and b.is_block()):
            return a if a.is_block() else b.with_element_ty(a.scalar) if b.is_block() else a
        if len(a.shape) != len(b.shape):
            return None
        if any(m != n and 1 not in (m, n) for m, n in zip(a.shape, b.shape, strict=True)):
            return None
        return core.block_type(a.scalar, [max(m, n) for m, n in zip(a.shape, b.shape, strict=True)])

    def as_tensor(value: Any, like: Any) -> Any:
        """A number in the dtype of a value, or None where it has another."""
        if type(like) is not tensor or id(like.dtype) not in limits:
            return None
        if type(value) is int or (type(value) is float and like.dtype is core.float32):
            if -limits[id(like.dtype)] <= value < limits[id(like.dtype)]:
                data = np.array([value], dtype=like.handle.data.dtype)
                return tensor(handle(data, like.dtype), like.dtype)
        return None

    def is_simple(a: Any, b: Any) -> bool:
        """Whether NumPy lays out what it computes as it would had it copied a scalar to the other's shape."""
        return a.type.is_block() == b.type.is_block() or (
            a.handle.data.flags.c_contiguous and b.handle.data.flags.c_contiguous
        )

    def quick(name: str, operation: Any, compares: bool = False) -> None:
        general = getattr(semantic, name)

        def compute(a: Any, b: Any, *options: Any, **named: Any) -> Any:
            x = a if type(a) is tensor else as_tensor(a, b)
            y = b if type(b) is tensor else as_tensor(b, a)
            if x is None or y is None:
                return general(a, b, *options, **named)
            if x.dtype is y.dtype and id(x.dtype) in limits and is_simple(x, y):
                kind = together(x.type, y.type)
                if kind is not None:
                    result = handle(operation(x.handle.data, y.handle.data), x.dtype)
                    return tensor(result, kind.with_element_ty(core.int1) if compares else kind)
            elif name == "add" and x.dtype.is_ptr() and id(y.dtype) in limits and y.dtype is not core.float32:
                kind = together(x.type, y.type)
                if kind is not None and is_simple(x, y):
                    return tensor(builder.create_addptr(x.handle, y.handle), kind)
            return general(a, b, *options, **named)

        setattr(semantic, name, compute)

    for name, operation in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
        quick(name, operation)
    for name, operation in (
        ("less_than", np.less),
        ("less_equal", np.less_equal),
        ("greater_than", np.greater),
        ("greater_equal", np.greater_equal),
        ("equal", np.equal),
        ("not_equal", np.not_equal),
    ):
        quick(name, operation, compares=True)

    check, broadcast, cast = semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value, semantic.cast

    def check_quickly(a: Any, b: Any, *options: Any, **named: Any) -> Any:
        same = type(a) is tensor and type(b) is tensor and a.dtype is b.dtype
        if same and (id(a.dtype) in limits or a.dtype is core.int1):
            return broadcast_quickly(a, b)
        return check(a, b, *options, **named)

    def stretched(a: Any, kind: Any) -> Any:
        if a.type.shape == kind.shape:
            return a
        data = np.broadcast_to(a.handle.data, kind.shape)
        return tensor(handle(data, a.handle.dtype.scalar), kind.with_element_ty(a.dtype))

    def broadcast_quickly(a: Any, b: Any) -> Any:
        if a.type is b.type:
            return a, b
        if a.type.is_block() and b.type.is_block():
            kind = together(a.type, b.type)
            if kind is not None:
                return stretched(a, kind), stretched(b, kind)
        return broadcast(a, b)

    def cast_quickly(a: Any, kind: Any, *options: Any) -> Any:
        return a if a.dtype is kind.scalar else cast(a, kind, *options)

    semantic.binary_op_type_checking_impl = check_quickly
    semantic.broadcast_impl_value = broadcast_quickly
    semantic.cast = cast_quickly


def _convert_by_shifts() -> None:
    from triton.language import core
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_quickly(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if rounding is None and source is core.float32 and target is core.bfloat16:
            bits = np.ascontiguousarray(data).view(np.uint32)
            result, magnitude, least = (bits >> 16).astype(np.uint16), bits & 0x7FFFFFFF, 0x00800000
        elif rounding is None and source is core.bfloat16 and target is core.float32:
            bits = np.ascontiguousarray(data)
            result, magnitude, least = bits.astype(np.uint32) << 16, bits & 0x7FFF, 0x0080
        else:
            return convert(data, source, target, rounding)
        subnormal = (magnitude - 1) < (least - 1)  # unsigned: 0 - 1 is the largest
        if subnormal.any():
            result[subnormal] = convert(bits[subnormal], source, target, rounding)
        return result

    interpreter._convert_float = convert_quickly
