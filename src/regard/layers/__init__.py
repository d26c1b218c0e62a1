"""Small modules that many systems share. Everything takes and gives channels-last tensors `(batch, *spatial, channels)`."""

from regard.layers.attention import Identity, LinearAttention, SoftmaxAttention
from regard.layers.block import Block
from regard.layers.conv import Conv1d, Conv2d, Conv3d, SqueezeExcite, conv, depthwise, pad_same
from regard.layers.drop import DropPath, LayerScale, linear_rates
from regard.layers.init import vit_init
from regard.layers.mixer import Cost, Mixer, heads_of
from regard.layers.mlp import GatedMlp, Mlp
from regard.layers.norm import BatchNorm, GlobalNorm, SimpleRMSNorm
from regard.layers.patch import PatchEmbed, PatchMerging
from regard.layers.position import RelativePositionBias, relative_index, resize_table, sincos

__all__ = [
    "BatchNorm",
    "Block",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Cost",
    "DropPath",
    "GatedMlp",
    "GlobalNorm",
    "Identity",
    "LayerScale",
    "LinearAttention",
    "Mixer",
    "Mlp",
    "PatchEmbed",
    "PatchMerging",
    "RelativePositionBias",
    "SimpleRMSNorm",
    "SoftmaxAttention",
    "SqueezeExcite",
    "conv",
    "depthwise",
    "heads_of",
    "linear_rates",
    "pad_same",
    "relative_index",
    "resize_table",
    "sincos",
    "vit_init",
]
