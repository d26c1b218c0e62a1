"""Index tables that depend on sizes alone: computed once, by NumPy, and constants to torch.compile and torch.export.

NumPy keeps them out of what PyTorch may have switched on when a table is first asked for: a default device, a mode that
counts, tracing with tensors that hold no numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from operator import index

import numpy as np
import torch
from torch import Tensor


def table(build: Callable[..., tuple[np.ndarray, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Decorator: `build(*integers)`, which makes arrays, becomes a function that gives them as CPU tensors to read.

    Results are kept, so that later calls cost next to nothing.
    """
    kept = lru_cache(maxsize=256)(build)

    @torch.compiler.assume_constant_result
    def constant(*sizes: int) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(array) for array in kept(*sizes))

    def call(*sizes: int) -> tuple[Tensor, ...]:
        # `index` makes a size that a compiler would like to keep open into the number that the table needs.
        return constant(*[index(size) for size in sizes])

    call.__name__, call.__doc__ = build.__name__, build.__doc__
    return call
