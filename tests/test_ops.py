"""Every op: its fast path equals its reference, forward and backward, over shapes drawn where mistakes live."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oracles import assert_errs_like, assert_exact
from regard import kernels, ops
from regard.ops import reference

HEAD_DIMS = st.sampled_from([1, 3, 8, 12])


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def qkv(batch: int, spatial: tuple[int, ...], heads: int, dim: int, kv_heads: int | None = None) -> list[torch.Tensor]:
    kv = kv_heads or heads
    return [drawn(batch, *spatial, h, dim, seed=s) for s, h in ((1, heads), (2, kv), (3, kv))]


@st.composite
def neighborhoods(draw):
    axes = draw(st.integers(1, 3))
    most = {1: 9, 2: 5, 3: 3}[axes]
    kernel = [draw(st.integers(1, most)) for _ in range(axes)]
    dilation = [draw(st.integers(1, 3 if axes < 3 else 2)) for _ in range(axes)]
    stride = [draw(st.integers(1, k)) for k in kernel]
    extra = st.sampled_from([0, 0, 1, 2, 5])
    spatial = [k * d + draw(extra) for k, d in zip(kernel, dilation, strict=True)]
    causal = [draw(st.booleans()) for _ in range(axes)]
    return spatial, kernel, stride, dilation, causal


@given(neighborhoods(), st.sampled_from([(1, 1), (2, 2), (4, 2)]), HEAD_DIMS, st.booleans(), st.booleans())
def test_neighborhood_equals_reference(shape, heads, dim, with_bias, lse):
    spatial, kernel, stride, dilation, causal = shape
    inputs = qkv(2, tuple(spatial), heads[0], dim, heads[1])
    if with_bias:
        inputs.append(drawn(heads[0], *(2 * k - 1 for k in kernel), seed=4))

    def run(backend):
        def call(q, k, v, bias=None):
            return ops.neighborhood_attention(
                q, k, v, kernel_size=kernel, stride=stride, dilation=dilation, causal=causal, bias=bias,
                return_lse=lse, backend=backend,
            )  # fmt: skip

        return call

    assert_exact(run("torch"), run("reference"), inputs)


@given(st.integers(1, 40), st.integers(1, 40))
def test_neighborhood_around_tile_sizes(length, kernel):
    kernel = min(kernel, length)
    inputs = qkv(1, (length,), 1, 4)
    assert_exact(
        lambda q, k, v: ops.neighborhood_attention(q, k, v, kernel_size=kernel),
        lambda q, k, v: ops.neighborhood_attention(q, k, v, kernel_size=kernel, backend="reference"),
        inputs,
    )


def test_neighborhood_special_cases():
    q, k, v = qkv(1, (12, 12), 2, 8)
    whole = ops.neighborhood_attention(q, k, v, kernel_size=12)
    torch.testing.assert_close(whole, ops.attention(q, k, v))
    blocked = ops.neighborhood_attention(q, k, v, kernel_size=4, stride=4)
    torch.testing.assert_close(blocked, ops.window_attention(q, k, v, window_size=4))
    strip = ops.neighborhood_attention(q[:, 0], k[:, 0], v[:, 0], kernel_size=12, causal=True)
    torch.testing.assert_close(strip, ops.attention(q[:, 0], k[:, 0], v[:, 0], causal=True))


def test_neighborhood_never_holds_all_pairs():
    """At 64 x 64 tokens the N x N matrix alone would be 64 MiB a head; the blocked path stays far below."""
    from regard.measure import peak_bytes

    q, k, v = qkv(1, (64, 64), 1, 16)
    assert peak_bytes(lambda: ops.neighborhood_attention(q, k, v, kernel_size=7)) < 4096 * 4096 * 4 / 2


@st.composite
def windows(draw):
    axes = draw(st.integers(1, 3))
    size = [draw(st.integers(1, 5 if axes < 3 else 3)) for _ in range(axes)]
    spatial = [draw(st.integers(1, 9 if axes < 3 else 5)) for _ in range(axes)]
    partition = draw(st.sampled_from(["window", "grid"]))
    shift = [0 if partition == "grid" else draw(st.integers(0, s - 1)) for s in size]
    return spatial, size, shift, partition


@given(windows(), st.sampled_from([(1, 1), (2, 1)]), HEAD_DIMS, st.booleans())
def test_window_equals_reference(shape, heads, dim, with_bias):
    spatial, size, shift, partition = shape
    tokens = math.prod(size)
    inputs = qkv(2, tuple(spatial), heads[0], dim, heads[1])
    if with_bias:
        inputs.append(drawn(heads[0], tokens, tokens, seed=4))

    def run(backend):
        def call(q, k, v, bias=None):
            return ops.window_attention(
                q, k, v, window_size=size, shift=shift, partition=partition, bias=bias, backend=backend
            )

        return call

    assert_exact(run("torch"), run("reference"), inputs)


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    HEAD_DIMS,
    st.sampled_from(["none", "causal", "mask", "bias", "bias+mask"]),
    st.booleans(),
)
def test_dense_equals_reference(queries, keys, heads, dim, kind, lse):
    q = drawn(2, queries, heads[0], dim, seed=1)
    k, v = (drawn(2, keys, heads[1], dim, seed=s) for s in (2, 3))
    inputs = [q, k, v]
    mask = drawn(1, 1, queries, keys, seed=5) > 0.3 if "mask" in kind else None  # some rows have no key at all
    if "bias" in kind:
        inputs.append(drawn(1, heads[0], queries, keys, seed=6))

    def run(backend):
        def call(q, k, v, bias=None):
            return ops.attention(
                q, k, v, bias=bias, mask=mask, causal=kind == "causal", return_lse=lse, backend=backend
            )

        return call

    assert_exact(run("torch"), run("reference"), inputs)


@given(st.integers(1, 300), st.integers(1, 2), HEAD_DIMS, st.booleans(), st.booleans(), st.booleans())
def test_linear_equals_reference(length, heads, dim, causal, decayed, normalize):
    q, k, v = qkv(2, (length,), heads, dim)
    q, k = (q.abs(), k.abs()) if normalize else (q, k)
    rates = torch.linspace(0.05, 3.0, heads) if decayed and causal else None

    def run(backend):
        def call(q, k, v):
            decay = None if rates is None else rates.to(q.dtype)
            return ops.linear_attention(q, k, v, causal=causal, decay=decay, normalize=normalize, backend=backend)

        return call

    assert_exact(run("torch"), run("reference"), [q, k, v])


@given(st.integers(2, 260), st.data())
def test_linear_streams(length, data):
    """Split anywhere and carry the state, or go token by token: the same as all at once."""
    q, k, v = (x.double() for x in qkv(1, (length,), 2, 4))
    q, k = q.abs(), k.abs()
    decay = torch.tensor([0.02, 0.5], dtype=torch.float64)
    whole, end = ops.linear_attention(q, k, v, causal=True, decay=decay, return_state=True)
    cut = data.draw(st.integers(1, length - 1))
    first, state = ops.linear_attention(q[:, :cut], k[:, :cut], v[:, :cut], causal=True, decay=decay, return_state=True)
    second, last = ops.linear_attention(
        q[:, cut:], k[:, cut:], v[:, cut:], causal=True, decay=decay, state=state, return_state=True
    )
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(last, end)
    state, outs = None, []
    for t in range(length):
        out, state = ops.linear_attention_step(q[:, t], k[:, t], v[:, t], state, decay=decay)
        outs.append(out)
    torch.testing.assert_close(torch.stack(outs, 1), whole)
    torch.testing.assert_close(state, end)


@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 20), st.booleans())
def test_landmark_equals_reference(queries, landmarks, keys, with_bias):
    inputs = [drawn(2, n, 2, 4, seed=s) for s, n in enumerate((queries, landmarks, keys, keys))]
    if with_bias:
        inputs += [drawn(2, landmarks, keys, seed=7), drawn(2, queries, landmarks, seed=8)]

    def run(backend):
        def call(q, a, k, v, gather=None, read=None):
            return ops.landmark_attention(q, a, k, v, gather_bias=gather, read_bias=read, backend=backend)

        return call

    assert_exact(run("torch"), run("reference"), inputs)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8), st.booleans())
def test_grouped_equals_reference(groups, cross):
    counts = torch.tensor(groups)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts[:, 0].cumsum(0)])
    key_offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts[:, 1].cumsum(0)]) if cross else None
    rows, keys = int(offsets[-1]), int(key_offsets[-1]) if cross else int(offsets[-1])
    inputs = [drawn(rows, 2, 4, seed=1), drawn(keys, 2, 4, seed=2), drawn(keys, 2, 4, seed=3)]

    def run(backend):
        return lambda q, k, v: ops.grouped_attention(q, k, v, offsets, key_offsets=key_offsets, backend=backend)

    assert_exact(run("torch"), run("reference"), inputs)


@st.composite
def convolutions(draw):
    axes = draw(st.integers(1, 3))
    spatial = [draw(st.integers(1, {1: 20, 2: 6, 3: 3}[axes])) for _ in range(axes)]
    causal = [draw(st.booleans()) for _ in range(axes)]
    wide = [draw(st.integers(1, length + 2)) for length in spatial]
    return spatial, causal, [k if past else 2 * k - 1 for k, past in zip(wide, causal, strict=True)]


@given(convolutions(), st.sampled_from([1, 3]), st.booleans())
def test_fft_conv_equals_reference(shape, channels, with_skip):
    spatial, causal, taps = shape
    inputs = [drawn(2, *spatial, channels, seed=1), drawn(*taps, channels, seed=2)]
    if with_skip:
        inputs.append(drawn(channels, seed=3))

    def run(backend):
        return lambda x, kernel, skip=None: ops.fft_conv(x, kernel, causal=causal, skip=skip, backend=backend)

    assert_exact(run("torch"), run("reference"), inputs)


def test_fft_conv_special_cases():
    x, kernel = drawn(2, 7, 5, 3), drawn(3, 5, 3, seed=1)
    turned = kernel.flip(0, 1).movedim(-1, 0)[:, None]
    plain = torch.nn.functional.conv2d(x.movedim(-1, 1), turned, padding=(1, 2), groups=3).movedim(1, -1)
    torch.testing.assert_close(ops.fft_conv(x, kernel), plain)
    assert ops.fft_conv(x[:0], kernel).shape == (0, 7, 5, 3)
    assert ops.fft_conv(x.bfloat16(), kernel).dtype == torch.bfloat16
    torch.autograd.gradcheck(ops.fft_conv, [t.double().requires_grad_() for t in (x[:1, :3, :3], kernel)])
    for message, bad in (
        (r"\(\*taps, channels\)", kernel[0]),
        ("must be odd", kernel[:2]),
        ("3 channels", kernel[..., :2]),
    ):
        with pytest.raises(ValueError, match=message):
            ops.fft_conv(x, bad)
    with pytest.raises(ValueError, match="skip"):
        ops.fft_conv(x, kernel, skip=kernel[0])


@given(st.integers(1, 4), st.integers(1, 9), st.floats(0, 60))
def test_merge_equals_reference_and_dense(parts, keys, height):
    q = drawn(2, 5, 2, 4, seed=1)
    chunks = [(drawn(2, keys, 2, 4, seed=10 + n), drawn(2, keys, 2, 4, seed=20 + n)) for n in range(parts)]
    results = [ops.attention(q, k, v, return_lse=True) for k, v in chunks]
    outs, lses = [r[0] for r in results], [r[1] for r in results]
    merged, lse = ops.merge_attention(outs, lses)
    plain, plain_lse = reference.merge_attention(outs, lses)
    torch.testing.assert_close(merged, plain)
    torch.testing.assert_close(lse, plain_lse)
    dense = ops.attention(q, torch.cat([k for k, _ in chunks], 1), torch.cat([v for _, v in chunks], 1))
    torch.testing.assert_close(merged, dense)
    # Adding a constant to every log-sum-exp changes nothing, however large: nothing overflows.
    lifted, _ = ops.merge_attention([x.double() for x in outs], [x.double() + 10 * height for x in lses])
    torch.testing.assert_close(lifted.float(), merged)


def test_merge_without_any_key_gives_zeros():
    out, lse = ops.merge_attention([torch.zeros(1, 2, 1, 4)] * 2, [torch.full((1, 2, 1), -math.inf)] * 2)
    assert torch.equal(out, torch.zeros(1, 2, 1, 4))
    assert torch.isneginf(lse).all()


CALLS = {
    "attention": lambda q, k, v: ops.attention(q, k, v),
    "window": lambda q, k, v: ops.window_attention(q, k, v, window_size=3, shift=1),
    "neighborhood": lambda q, k, v: ops.neighborhood_attention(q, k, v, kernel_size=3, dilation=2),
    "linear": lambda q, k, v: ops.linear_attention(q.exp(), k.exp(), v),
    "landmark": lambda q, k, v: ops.landmark_attention(q, q[:, :2], k, v),
}


@pytest.mark.parametrize("name", CALLS)
def test_batch_and_heads_are_independent(name):
    q, k, v = (x.double() for x in qkv(3, (7, 8), 4, 4))
    order, heads = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2])
    out = CALLS[name](q, k, v)
    shuffled = CALLS[name](*(x[order][..., heads, :] for x in (q, k, v)))
    torch.testing.assert_close(shuffled, out[order][..., heads, :], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CALLS)
def test_empty_batch_strides_and_repeats(name):
    q, k, v = qkv(2, (7, 8), 2, 4)
    assert CALLS[name](q[:0], k[:0], v[:0]).shape == (0, 7, 8, 2, 4)
    contiguous = CALLS[name](q, k, v)
    assert torch.equal(contiguous, CALLS[name](q, k, v))
    wide = torch.stack([q, k, v], -2)  # views with gaps between the head channels
    torch.testing.assert_close(CALLS[name](*wide.unbind(-2)), contiguous)


PLAIN = {
    "attention": lambda q, k, v: reference.attention(q, k, v),
    "window": lambda q, k, v: reference.window_attention(q, k, v, window_size=(3, 3), shift=(1, 1)),
    "neighborhood": lambda q, k, v: reference.neighborhood_attention(
        q, k, v, kernel_size=(3, 3), stride=(1, 1), dilation=(2, 2), causal=(False, False)
    ),
    "linear": lambda q, k, v: reference.linear_attention(q.exp(), k.exp(), v),
    "landmark": lambda q, k, v: reference.landmark_attention(q, q[:, :2], k, v),
}


@pytest.mark.parametrize("name", CALLS)
def test_bfloat16_errs_like_the_plain_form(name):
    assert_errs_like(CALLS[name], PLAIN[name], [x.bfloat16() for x in qkv(2, (7, 8), 2, 8)])


@pytest.mark.parametrize("name", CALLS)
def test_gradcheck(name):
    inputs = [x.double().requires_grad_() for x in qkv(1, (6, 6), 1, 2)]
    torch.autograd.gradcheck(CALLS[name], inputs)


BAD = [
    (lambda q, k, v: ops.attention(q[0, 0], k, v), "at least one spatial axis"),
    (lambda q, k, v: ops.attention(q, k[..., :3], v), "one head_dim"),
    (lambda q, k, v: ops.attention(q, k.double(), v), "one dtype"),
    (lambda q, k, v: ops.attention(q, k[:1], v), "one batch size"),
    (lambda q, k, v: ops.attention(q, k.repeat(1, 1, 1, 2, 1), v.repeat(1, 1, 1, 2, 1)), "must divide the heads"),
    (lambda q, k, v: ops.attention(q.half(), k.half(), v.half()), "bfloat16"),
    (lambda q, k, v: ops.attention(q, k, v, mask=torch.zeros(64, 64)), "must be boolean"),
    (lambda q, k, v: ops.attention(q, k, v, bias=torch.zeros(3, 64, 64)), "must broadcast"),
    (lambda q, k, v: ops.attention(q, k, v, backend="turbo"), "no backend='turbo'"),
    (lambda q, k, v: ops.attention(q.long(), k.long(), v.long()), "floating-point"),
    (lambda q, k, v: ops.window_attention(q, k, v, window_size=(4, 4, 4)), "2 integers"),
    (lambda q, k, v: ops.window_attention(q, k, v, window_size=4, shift=4), "smaller than the window"),
    (lambda q, k, v: ops.window_attention(q, k, v, window_size=4, shift=1, partition="grid"), "no shift"),
    (lambda q, k, v: ops.window_attention(q, k, v, window_size=4, partition="gird"), "Did you mean 'grid'"),
    (lambda q, k, v: ops.window_attention(q, k, v, window_size=4, bias=torch.zeros(2, 9, 9)), r"\(2, 16, 16\)"),
    (lambda q, k, v: ops.neighborhood_attention(q, k, v, kernel_size=9), "must fit into every axis"),
    (lambda q, k, v: ops.neighborhood_attention(q, k, v, kernel_size=3, dilation=3), "must fit into every axis"),
    (lambda q, k, v: ops.neighborhood_attention(q, k, v, kernel_size=3, stride=4), "must not exceed"),
    (lambda q, k, v: ops.neighborhood_attention(q, k, v, kernel_size=0), "at least 1"),
    (lambda q, k, v: ops.neighborhood_attention(q, k[:, :7], v[:, :7], kernel_size=3), "equal spatial axes"),
    (lambda q, k, v: ops.neighborhood_attention(q, k, v, kernel_size=3, bias=torch.zeros(2, 5)), r"\(2, 5, 5\)"),
    (lambda q, k, v: ops.linear_attention(q, k, v, causal=True), "flatten them first"),
    (lambda q, k, v: ops.linear_attention(q, k, v, decay=torch.ones(2)), "need causal=True"),
    (lambda q, k, v: ops.linear_attention(q[:, 0], k[:, 0], v[:, 0], causal=True, decay=torch.ones(3)), "one rate"),
    (lambda q, k, v: ops.grouped_attention(q, k, v, torch.tensor([0, 2])), "rows, heads, head_dim"),
    (
        lambda q, k, v: ops.grouped_attention(q[0, 0], k[0, 0], v[0, 0], torch.tensor([0, 5, 3, 8])),
        "must rise from 0",
    ),
    (lambda q, k, v: ops.merge_attention([], []), "at least one"),
    (lambda q, k, v: ops.merge_attention([q], [q]), "part 0 does not fit"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_wrong_input_teaches(call, message):
    with pytest.raises(ValueError, match=message):
        call(*qkv(2, (8, 8), 2, 4))


def test_explain_names_every_path():
    q, k, v = qkv(1, (8, 8), 2, 4)
    said = kernels.explain("neighborhood_attention", q, k, v, kernel_size=(3, 3))
    assert said.count("taken") == 1
    assert "torch: taken" in said or "torch: could" in said
    assert "reference: could" in said
    with pytest.raises(ValueError, match="Did you mean 'attention'"):
        kernels.explain("atention", q, k, v)


def test_costs_are_those_of_the_definition():
    from regard.flops import MacCounter

    q, k, v = qkv(1, (16, 16), 2, 8)
    for call, expected in (
        (lambda: ops.attention(q, k, v), 2 * 256 * 256 * 16),
        (lambda: ops.window_attention(q, k, v, window_size=4), 2 * 256 * 16 * 16),
        (lambda: ops.neighborhood_attention(q, k, v, kernel_size=5, dilation=3), 2 * 256 * 25 * 16),
        (lambda: ops.linear_attention(q, k, v), 2 * 2 * 256 * 64),
    ):
        with MacCounter() as counter:
            call()
        assert counter.macs == expected
