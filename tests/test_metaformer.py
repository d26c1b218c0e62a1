"""What the shared tests cannot know of MetaFormer: the numbering of the hybrids' checkpoints, and maps of fixed size."""

import pytest
import torch

from regard.checkpoint import load_authors_weights
from regard.systems.backbones.metaformer import MetaFormer, SpatialFc

TINY = {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "head_dim": 8, "norm": "channel", "num_classes": 3}


def authors_names(position_stage):
    """Names in the order of the authors' `network`, where the map of positions takes a number before its stage."""
    names, number = ["patch_embed.proj"], 0
    for stage in range(4):
        if stage == position_stage:
            names.append(f"network.{number}.pos_embed")
            number += 1
        names.append(f"network.{number}.0.norm1")
        if stage < 3:
            names.append(f"network.{number + 1}.proj")
        number += 2
    return names


@pytest.mark.parametrize("position_stage", [0, 1, 2, 3])
def test_hybrid_checkpoints_are_numbered_as_published(position_stage):
    keys = [f"{name}.weight" if "pos_embed" not in name else name for name in authors_names(position_stage)]
    ours = [MetaFormer.authors_keys.rename(key) for key in keys]
    embeds = ["stem", "downs.1", "downs.2", "downs.3"]
    expected = ["stem.weight"]
    for stage in range(4):
        expected += [f"{embeds[stage]}.position.table"] if stage == position_stage else []
        expected += [f"stages.{stage}.0.norm1.weight"] + ([f"downs.{stage + 1}.weight"] if stage < 3 else [])
    assert ours == expected


def test_positions_of_another_image_size_are_interpolated():
    small = MetaFormer(**TINY, mixers=("pooling", "pooling", "pooling", "softmax"), position_stage=3, img_size=64)
    large = MetaFormer(**TINY, mixers=("pooling", "pooling", "pooling", "softmax"), position_stage=3, img_size=128)
    torch.nn.init.normal_(small.downs[3].position.table)
    state = large.adapt_state_dict(dict(small.state_dict()))
    large.load_state_dict(state)
    assert large.downs[3].position.table.shape == (1, 16, 16)
    x = torch.randn(1, 3, 128, 128)
    torch.testing.assert_close(large(x), small(x))


def test_maps_of_fixed_size_say_so():
    with pytest.raises(ValueError, match=r"grid=\(4, 5\)"):
        SpatialFc(6, grid=(4, 5))(torch.randn(1, 5, 4, 6))
    with pytest.raises(ValueError, match="at least 3 pixels"):
        MetaFormer(**TINY)(torch.randn(1, 3, 2, 40))
    with pytest.raises(ValueError, match="left over"):
        load_authors_weights(MetaFormer(**TINY), {"network.9.9.nothing": torch.zeros(1)})
