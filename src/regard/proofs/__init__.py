"""What stands behind a system: `proofs/<slug>.py` holds recordings to equal, a recipe to train, and the paper's claim.

The systems themselves stay free of experiments; `regard verify SLUG` runs what is here and writes the evidence.
"""

from regard.proofs.base import Check, Proofs, Recipe, get_proofs
from regard.proofs.recordings import Recorded, Recording, check_recorded, golden_folder

__all__ = [
    "Check",
    "Proofs",
    "Recipe",
    "Recorded",
    "Recording",
    "check_recorded",
    "get_proofs",
    "golden_folder",
]
