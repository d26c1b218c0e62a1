"""Small modules that many systems share. Everything takes and gives channels-last tensors `(batch, *spatial, channels)`."""

from regard.layers.attention import Identity, LinearAttention, SoftmaxAttention, split_qkv
from regard.layers.auxiliary import attach_loss
from regard.layers.block import Block, ContextBlock, PositionedBlock
from regard.layers.conv import Conv1d, Conv2d, Conv3d, PixelShuffle, SqueezeExcite, conv, depthwise, pad_same
from regard.layers.conv_norm import LEVIT_NAMES, ConvNorm, RepConv, Residual, flat_kernels, fuse
from regard.layers.cross_shaped import CrossShaped, LePEAttention
from regard.layers.drop import DropPath, LayerScale, linear_rates
from regard.layers.init import fan_out_init, kernel_init, vit_init
from regard.layers.mamba import Mamba, MambaBlock, MambaState
from regard.layers.mbconv import MBConv
from regard.layers.mixer import Cost, Mixer, heads_of, run_stream
from regard.layers.mlp import ConvMlp, GatedMlp, Mlp
from regard.layers.norm import BatchNorm, GlobalNorm, SimpleRMSNorm
from regard.layers.patch import ConvEmbed, ConvStem, PatchEmbed, PatchMerging
from regard.layers.position import (
    DistanceBias,
    DynamicPositionBias,
    OffsetTable,
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
from regard.layers.resnet import ResNet
from regard.layers.spectral import GlobalFilter

__all__ = [
    "LEVIT_NAMES",
    "BatchNorm",
    "Block",
    "ContextBlock",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvEmbed",
    "ConvMlp",
    "ConvNorm",
    "ConvStem",
    "Cost",
    "CrossShaped",
    "DistanceBias",
    "DropPath",
    "DynamicPositionBias",
    "GatedMlp",
    "GlobalFilter",
    "GlobalNorm",
    "Identity",
    "LayerScale",
    "LePEAttention",
    "LinearAttention",
    "MBConv",
    "Mamba",
    "MambaBlock",
    "MambaState",
    "Mixer",
    "Mlp",
    "OffsetTable",
    "PatchEmbed",
    "PatchMerging",
    "PixelShuffle",
    "PositionTable",
    "PositionedBlock",
    "ProjectedCore",
    "RelativePositionBias",
    "RepConv",
    "ResNet",
    "Residual",
    "SimpleRMSNorm",
    "SoftmaxAttention",
    "SpatialReductionAttention",
    "SqueezeExcite",
    "alibi_slopes",
    "attach_loss",
    "conv",
    "depthwise",
    "fan_out_init",
    "flat_kernels",
    "fuse",
    "heads_of",
    "kernel_init",
    "linear_rates",
    "pad_same",
    "relative_index",
    "resize_bias_tables",
    "resize_map",
    "resize_sequence_table",
    "resize_table",
    "run_stream",
    "sincos",
    "split_qkv",
    "vit_init",
]
