"""How softmax attention decodes in the experiments."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch.nn.attention import SDPBackend, sdpa_kernel


def ready_kernels() -> AbstractContextManager[None]:
    """Let PyTorch's attention take only kernels that are ready at every length.

    On a Hopper GPU it takes cuDNN's first, which plans anew at each length that it has not met, and in decoding
    every step has another one.
    """
    kernels: AbstractContextManager[None] = sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )
    return kernels
