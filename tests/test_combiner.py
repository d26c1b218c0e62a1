"""Combiner: what the shared tests cannot know."""

from __future__ import annotations

import pytest
import torch

from regard.systems.sequence.combiner import PATTERNS, CombinerFixed, CombinerLM, CombinerMixture
from regard.training import seeded

COMBINERS = ("fixed", "logsparse", "axial", "mixture")


@pytest.mark.parametrize("pattern", COMBINERS)
@pytest.mark.parametrize("causal", [False, True])
def test_a_grid_is_its_raster(pattern, causal):
    """Rows of a grid are the segments, unless told otherwise."""
    grid = seeded(lambda: PATTERNS[pattern](12, num_heads=2, causal=causal), 0)
    options = {} if pattern == "logsparse" else {"segment_size": 5}
    line = seeded(lambda: PATTERNS[pattern](12, num_heads=2, causal=causal, **options), 0)
    x = torch.randn(2, 4, 5, 12)
    torch.testing.assert_close(grid(x).flatten(1, 2), line(x.flatten(1, 2)))


@pytest.mark.parametrize("pattern", COMBINERS)
def test_padding_is_not_read(pattern):
    mixer = seeded(lambda: PATTERNS[pattern](12, num_heads=2), 0)
    x, mask = torch.randn(2, 40, 12), torch.ones(2, 40, dtype=torch.bool)
    mask[0, 33:] = mask[1, :35] = False
    other = torch.where(mask[..., None], x, 9.0)
    torch.testing.assert_close(mixer(x, mask)[mask], mixer(other, mask)[mask])
    with pytest.raises(ValueError, match="mask must be boolean"):
        mixer(x, mask.float())


@pytest.mark.parametrize("pattern", [*COMBINERS, "dense"])
def test_model_continues_from_its_state(pattern):
    model = CombinerLM(11, 16, 2, 2, pattern=pattern, segment_size=4).eval()
    tokens = torch.randint(0, 11, (2, 7))
    longer = model.generate(tokens, 12, temperature=0)
    for length in range(7, 19):
        assert torch.equal(model(longer[:, :length])[:, -1].argmax(-1), longer[:, length])


def test_masked_language_model_sees_both_ways():
    model = CombinerLM(11, 16, 1, 2, segment_size=4, causal=False).eval()
    tokens = torch.randint(0, 11, (1, 10))
    changed = tokens.clone()
    changed[0, -1] = (tokens[0, -1] + 1) % 11
    assert not torch.allclose(model(tokens)[:, 0], model(changed)[:, 0])
    with pytest.raises(ValueError, match="causal=True"):
        model.generate(tokens, 1)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="segment_size"):
        CombinerFixed(8, 2, segment_size=0)
    with pytest.raises(ValueError, match="running"):
        CombinerMixture(8, 2, running="mean")
    with pytest.raises(ValueError, match="pattern"):
        CombinerLM(pattern="logn")
    with pytest.raises(ValueError, match="whole segments"):
        CombinerMixture(8, 2, segment_size=4, authors_quirks=True)(torch.randn(1, 6, 8))
