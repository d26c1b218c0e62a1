"""Macro-architectures that host any mixer."""

from regard.skeletons.base import ImageModel, Model
from regard.skeletons.conv_pyramid import ConvPyramid
from regard.skeletons.cswin import CSWinPyramid
from regard.skeletons.decoder_lm import DecoderLM, host_lm
from regard.skeletons.deit import DeiT, TokenBlock
from regard.skeletons.hierarchical import Hierarchical
from regard.skeletons.isotropic import Isotropic
from regard.skeletons.light import LightPyramid
from regard.skeletons.place import MixerAt, Place, places
from regard.skeletons.pvt import PVT
from regard.skeletons.restoration import Reconstruction, ResidualGroup, Restoration, body_conv
from regard.skeletons.swin import SwinPyramid

__all__ = [
    "PVT",
    "CSWinPyramid",
    "ConvPyramid",
    "DecoderLM",
    "DeiT",
    "Hierarchical",
    "ImageModel",
    "Isotropic",
    "LightPyramid",
    "MixerAt",
    "Model",
    "Place",
    "Reconstruction",
    "ResidualGroup",
    "Restoration",
    "SwinPyramid",
    "TokenBlock",
    "body_conv",
    "host_lm",
    "places",
]
