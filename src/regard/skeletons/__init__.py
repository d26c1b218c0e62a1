"""Macro-architectures that host any mixer."""

from regard.skeletons.base import ImageModel, Model
from regard.skeletons.conv_pyramid import ConvPyramid
from regard.skeletons.cswin import CSWinPyramid
from regard.skeletons.decoder_lm import DecoderLM, host_lm
from regard.skeletons.deit import DeiT, TokenBlock
from regard.skeletons.dit import AdaptiveBlock, DiT
from regard.skeletons.hierarchical import Hierarchical
from regard.skeletons.isotropic import Isotropic
from regard.skeletons.light import LightPyramid
from regard.skeletons.llama import Llama
from regard.skeletons.place import MixerAt, Place, places
from regard.skeletons.pvt import PVT
from regard.skeletons.restoration import Reconstruction, ResidualGroup, Restoration, body_conv
from regard.skeletons.swin import SwinPyramid
from regard.skeletons.timesformer import Clip, DividedBlock, TimeSformer

__all__ = [
    "PVT",
    "AdaptiveBlock",
    "CSWinPyramid",
    "Clip",
    "ConvPyramid",
    "DecoderLM",
    "DeiT",
    "DiT",
    "DividedBlock",
    "Hierarchical",
    "ImageModel",
    "Isotropic",
    "LightPyramid",
    "Llama",
    "MixerAt",
    "Model",
    "Place",
    "Reconstruction",
    "ResidualGroup",
    "Restoration",
    "SwinPyramid",
    "TimeSformer",
    "TokenBlock",
    "body_conv",
    "host_lm",
    "places",
]
