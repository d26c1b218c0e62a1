"""BiFormer in Swin's layout, of which there is no recording: the names of its published weights."""

from __future__ import annotations

import re

from regard.checkpoint import load_authors_weights
from regard.systems.backbones.biformer import BiFormerSTL


def _theirs(name: str) -> str:
    """A name of ours as the release has it."""
    for pattern, replacement in (
        (r"^stem\.0\.proj\.", "downsample_layers.0.0."),
        (r"^stem\.1\.", "downsample_layers.0.1."),
        (r"^downs\.(\d)\.0\.", r"downsample_layers.\1.0."),
        (r"^downs\.(\d)\.1\.proj\.", r"downsample_layers.\1.1."),
        (r"^stages\.(\d)\.", r"stages.\1.blocks."),
        (r"^(stages\.0.*)\.mixer\.qkv\.", r"\1.attn.qkv.qkv."),
        (r"^(stages\.0.*)\.mixer\.proj\.", r"\1.attn.wo."),
        (r"\.mixer\.local\.", ".attn.lepe."),
        (r"\.mixer\.", ".attn."),
        (r"\.mlp\.fc1\.", ".mlp.0."),
        (r"\.mlp\.fc2\.", ".mlp.2."),
    ):
        name = re.sub(pattern, replacement, name)
    return name


def test_names_of_the_swin_layout():
    model = BiFormerSTL(
        dims=(8, 16), depths=(1, 1), head_dim=4, global_heads=2, num_regions=2, topks=(1, None), num_classes=3
    )
    load_authors_weights(model, {_theirs(name): value for name, value in model.state_dict().items()})
