"""FlexAttention (torch.nn.attention.flex_attention): attention whose mask and bias are functions, compiled for CUDA.

A mask is index arithmetic on query and key numbers; blocks of 128 x 128 pairs without a visible pair are skipped. Which
blocks those are is found once for each combination of sizes and kept. On CPU FlexAttention holds all pairs at once and
has no backward: there it runs only when asked for by name.
"""

from regard.kernels.flex.core import refuses
from regard.kernels.flex.dense import attention, declines_attention
from regard.kernels.flex.groups import declines_grouped, grouped_attention
from regard.kernels.flex.neighborhoods import declines_neighborhood, neighborhood_attention
from regard.kernels.flex.windows import declines_window, window_attention

__all__ = [
    "attention",
    "declines_attention",
    "declines_grouped",
    "declines_neighborhood",
    "declines_window",
    "grouped_attention",
    "neighborhood_attention",
    "refuses",
    "window_attention",
]
