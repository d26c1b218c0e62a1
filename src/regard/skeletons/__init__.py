"""Macro-architectures that host any mixer."""

from regard.skeletons.base import ImageModel, Model
from regard.skeletons.hierarchical import Hierarchical
from regard.skeletons.isotropic import Isotropic

__all__ = ["Hierarchical", "ImageModel", "Isotropic", "Model"]
