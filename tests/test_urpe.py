"""Offset tables beyond what mixers show (shared entries), and padding in the encoder."""

import math

import pytest
import torch

from regard.layers import OffsetTable
from regard.systems.sequence.urpe import URPETransformer


def test_distant_offsets_share_entries_as_the_release_has_them():
    table = OffsetTable((128,), 1, buckets=64)
    assert table.table.shape == (65, 1)
    torch.nn.init.constant_(table.table, 0)
    with torch.no_grad():
        table.table[:, 0] = torch.arange(65)

    def row(offset):
        n = abs(offset)
        bucket = n if n < 16 else min(31, 16 + int(math.log(n / 16) / math.log(8) * 16))
        bucket = bucket if offset > 0 else -bucket
        return bucket + 2 + 31 if bucket >= 0 else bucket + 31

    for length in (1, 5, 200):
        values = table((length,))[0].tolist()
        assert values == [row(offset) for offset in range(1 - length, length)]
    matrix = table.matrix((5,))[0]
    assert all(matrix[i, j] == row(j - i) for i in range(5) for j in range(5))


def test_a_table_of_no_use_is_refused():
    for size, buckets in (((128,), 6), ((8,), 32), ((8, 8), 8)):
        with pytest.raises(ValueError, match="buckets"):
            OffsetTable(size, 1, buckets=buckets)


def test_padding_changes_nothing_before_it():
    model = URPETransformer(20, 16, 2, 2, length=8).double()
    for table in (model.bias, model.factor):
        torch.nn.init.normal_(table.table, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(12).view(2, 6)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    torch.testing.assert_close(model(tokens, mask)[1, :4], model(tokens[1:, :4])[0], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="mask"):
        model(tokens, mask[:1])
