"""Small modules that many systems share. Everything takes and gives channels-last tensors `(batch, *spatial, channels)`."""

from regard.layers.attention import Identity, LinearAttention, SoftmaxAttention, split_qkv
from regard.layers.block import Block
from regard.layers.conv import Conv1d, Conv2d, Conv3d, PixelShuffle, SqueezeExcite, conv, depthwise, pad_same
from regard.layers.cross_shaped import CrossShaped, LePEAttention
from regard.layers.drop import DropPath, LayerScale, linear_rates
from regard.layers.init import vit_init
from regard.layers.mbconv import MBConv
from regard.layers.mixer import Cost, Mixer, heads_of
from regard.layers.mlp import GatedMlp, Mlp
from regard.layers.norm import BatchNorm, GlobalNorm, SimpleRMSNorm
from regard.layers.patch import ConvEmbed, PatchEmbed, PatchMerging
from regard.layers.position import (
    PositionTable,
    RelativePositionBias,
    alibi_slopes,
    relative_index,
    resize_bias_tables,
    resize_map,
    resize_sequence_table,
    resize_table,
    sincos,
)
from regard.layers.projected import ProjectedCore
from regard.layers.reduction import SpatialReductionAttention

__all__ = [
    "BatchNorm",
    "Block",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvEmbed",
    "Cost",
    "CrossShaped",
    "DropPath",
    "GatedMlp",
    "GlobalNorm",
    "Identity",
    "LayerScale",
    "LePEAttention",
    "LinearAttention",
    "MBConv",
    "Mixer",
    "Mlp",
    "PatchEmbed",
    "PatchMerging",
    "PixelShuffle",
    "PositionTable",
    "ProjectedCore",
    "RelativePositionBias",
    "SimpleRMSNorm",
    "SoftmaxAttention",
    "SpatialReductionAttention",
    "SqueezeExcite",
    "alibi_slopes",
    "conv",
    "depthwise",
    "heads_of",
    "linear_rates",
    "pad_same",
    "relative_index",
    "resize_bias_tables",
    "resize_map",
    "resize_sequence_table",
    "resize_table",
    "sincos",
    "split_qkv",
    "vit_init",
]
