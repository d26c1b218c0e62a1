"""The vocabulary: attention as pure functions on `q, k, v` of shape `(batch, *spatial, heads, head_dim)`.

Every op takes `backend=` ("auto" picks the fastest path that fits; see `regard.kernels.explain`) and has the shortest
correct version of itself under the same name in `regard.ops.reference`.
"""

from regard.ops.dense import attention
from regard.ops.fft import fft_conv
from regard.ops.grouped import grouped_attention
from regard.ops.landmark import landmark_attention
from regard.ops.linear import LinearState, linear_attention, linear_attention_step
from regard.ops.merge import merge_attention
from regard.ops.neighborhood import neighborhood_attention
from regard.ops.routed import routed_attention
from regard.ops.scan import selective_scan
from regard.ops.window import window_attention

__all__ = [
    "LinearState",
    "attention",
    "fft_conv",
    "grouped_attention",
    "landmark_attention",
    "linear_attention",
    "linear_attention_step",
    "merge_attention",
    "neighborhood_attention",
    "routed_attention",
    "selective_scan",
    "window_attention",
]
