"""The compiled CPU kernels: as exact as plain PyTorch in the same precision, forward and backward, wherever they run."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import deterministic

from oracles import assert_errs_like, outputs_and_gradients
from regard import kernels, ops
from regard.kernels.cpu import build
from test_ops import drawn, neighborhoods, qkv, windows

pytestmark = pytest.mark.skipif(build.load() is not None, reason=f"no kernels: {build.load()}")

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
DIMS = st.sampled_from([1, 7, 8, 16, 17, 40, 64, 100, 256])
HEADS = st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)])


def check(call, inputs, dtype=torch.float32):
    """`call(backend, *inputs)`: the kernel against the definition."""
    inputs = [x.to(dtype) for x in inputs]
    assert_errs_like(lambda *x: call("cpu", *x), lambda *x: call("reference", *x), inputs)


@given(windows(), HEADS, DIMS, DIMS, st.booleans(), DTYPES, st.integers(0, 2))
def test_windows(shape, heads, dim, value_dim, with_bias, dtype, batch):
    spatial, size, shift, partition = shape
    q, k, _ = qkv(batch, tuple(spatial), heads[0], dim, heads[1])
    inputs = [q, k, drawn(batch, *spatial, heads[1], value_dim, seed=3)]
    if with_bias:
        inputs.append(drawn(heads[0], math.prod(size), math.prod(size), seed=4))
    check(
        lambda backend, q, k, v, bias=None: ops.window_attention(
            q, k, v, window_size=size, shift=shift, partition=partition, bias=bias, backend=backend
        ),
        inputs,
        dtype,
    )


@given(neighborhoods(), HEADS, DIMS, DIMS, st.booleans(), st.booleans(), DTYPES)
def test_neighborhoods(shape, heads, dim, value_dim, with_bias, lse, dtype):
    spatial, kernel, stride, dilation, causal = shape
    q, k, _ = qkv(1, tuple(spatial), heads[0], dim, heads[1])
    inputs = [q, k, drawn(1, *spatial, heads[1], value_dim, seed=3)]
    if with_bias:
        inputs.append(drawn(heads[0], *(2 * width - 1 for width in kernel), seed=4))
    check(
        lambda backend, q, k, v, bias=None: ops.neighborhood_attention(
            q,
            k,
            v,
            kernel_size=kernel,
            stride=stride,
            dilation=dilation,
            causal=causal,
            bias=bias,
            return_lse=lse,
            backend=backend,
        ),
        inputs,
        dtype,
    )


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 3))
def test_neighborhoods_around_every_tile(length, kernel, gap):
    """One more and one less than every number of lanes, queries and blocks."""
    kernel = max(1, min(kernel, length // gap))
    gap = min(gap, length // kernel)
    check(
        lambda backend, q, k, v: ops.neighborhood_attention(q, k, v, kernel_size=kernel, dilation=gap, backend=backend),
        qkv(1, (length,), 1, 4),
    )


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=5),
    st.booleans(),
    HEADS,
    DIMS,
    DTYPES,
)
def test_ragged_groups(groups, cross, heads, dim, dtype):
    counts = torch.tensor(groups)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts[:, 0].cumsum(0)])
    key_offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts[:, 1].cumsum(0)]) if cross else None
    rows, keys = int(offsets[-1]), int((offsets if key_offsets is None else key_offsets)[-1])
    inputs = [drawn(rows, heads[0], dim, seed=1), drawn(keys, heads[0], dim, seed=2), drawn(keys, heads[0], 5, seed=3)]
    check(
        lambda backend, q, k, v: ops.grouped_attention(q, k, v, offsets, key_offsets=key_offsets, backend=backend),
        inputs,
        dtype,
    )


@given(st.integers(0, 2), st.integers(1, 6), st.integers(1, 20), st.integers(1, 20), st.integers(1, 4), HEADS, DTYPES)
def test_routed_blocks(batch, blocks, queries, keys, chosen, heads, dtype):
    index = torch.randint(0, blocks, (batch, blocks, chosen), generator=torch.Generator().manual_seed(5))
    inputs = [drawn(batch, blocks, queries, heads[0], 8, seed=1)]
    inputs += [drawn(batch, blocks, keys, heads[1], d, seed=s) for s, d in ((2, 8), (3, 20))]
    call = lambda backend, q, k, v: ops.routed_attention(q, k, v, index, backend=backend)  # noqa: E731
    check(call, inputs, dtype)
    assert_errs_like(lambda *x: call("torch", *x), lambda *x: call("reference", *x), inputs)


@given(st.integers(1, 16), st.integers(256, 400), HEADS, DIMS, DIMS, st.booleans(), st.booleans(), DTYPES)
def test_decoding(queries, keys, heads, dim, value_dim, causal, lse, dtype):
    check(
        lambda backend, q, k, v: ops.attention(q, k, v, causal=causal, return_lse=lse, backend=backend),
        [
            drawn(2, queries, heads[0], dim, seed=1),
            *(drawn(2, keys, heads[1], d, seed=s) for s, d in ((2, dim), (3, value_dim))),
        ],
        dtype,
    )


@given(
    st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 130]), HEADS, DIMS, DIMS, st.booleans(), st.booleans(),
    st.booleans(), DTYPES,
)  # fmt: skip
def test_causal_linear(length, heads, dim, value_dim, decayed, normalize, carried, dtype):
    q, k, _ = qkv(2, (length,), heads[0], dim, heads[1])
    q, k = (q.abs(), k.abs()) if normalize else (q, k)
    inputs = [q, k, drawn(2, length, heads[1], value_dim, seed=3)]
    if carried:
        inputs += [drawn(2, heads[0], dim, value_dim, seed=4), drawn(2, heads[0], dim, seed=5).abs()]
    rates = torch.linspace(0.05, 3.0, heads[0]) if decayed else None

    def call(backend, q, k, v, *state):
        decay = None if rates is None else rates.to(q.dtype)
        # The reference carries no state: the plain path, which is held to it elsewhere, stands for it.
        backend = "torch" if backend == "reference" and carried else backend
        given_state = {"state": ops.LinearState(*state), "return_state": True} if carried else {}
        result = ops.linear_attention(
            q, k, v, causal=True, decay=decay, normalize=normalize, backend=backend, **given_state
        )
        return (result[0], *result[1]) if carried else result

    check(call, inputs, dtype)


@given(st.sampled_from([1, 5, 31, 32, 33, 63, 64, 65, 100]), st.sampled_from([1, 8, 16, 17, 40, 100]),
       st.sampled_from([1, 4, 16, 20]), st.booleans(), st.booleans(), st.sampled_from([0.25, 1e7]), DTYPES)  # fmt: skip
def test_selective_scan(length, channels, states, skip, carried, step, dtype):
    x, dt = drawn(2, length, channels, seed=1), drawn(2, length, channels, seed=2).exp() * step
    a = -drawn(channels, states, seed=3).exp()
    inputs = [x, dt, a, drawn(2, length, states, seed=4), drawn(2, length, states, seed=5)]
    inputs += [drawn(channels, seed=6)] if skip else []
    inputs += [drawn(2, channels, states, seed=7)] if carried else []

    def call(backend, *given_inputs):
        x, dt, a, b, c, *rest = given_inputs
        d = rest.pop(0) if skip else None
        h = rest.pop(0) if carried else None
        y, after = ops.selective_scan(x, dt, a, b, c, skip=d, state=h, return_state=True, backend=backend)
        return y, after.to(x.dtype)

    check(call, inputs, dtype)
    assert_errs_like(lambda *i: call("torch", *i), lambda *i: call("reference", *i), inputs)


OFFSETS = torch.tensor([0, 3, 3, 20, 56])
INDEX = torch.tensor([[[0, 2], [1, 1], [2, 0]]] * 2)
CALLS = {
    "window": lambda q, k, v, backend="cpu": ops.window_attention(q, k, v, window_size=3, shift=1, backend=backend),
    "window with bias": lambda q, k, v, backend="cpu": ops.window_attention(
        q, k, v, window_size=3, bias=q.flatten()[:162].view(2, 9, 9), backend=backend
    ),
    "neighborhood": lambda q, k, v, backend="cpu": ops.neighborhood_attention(
        q, k, v, kernel_size=3, dilation=2, backend=backend
    ),
    "neighborhood with bias": lambda q, k, v, backend="cpu": ops.neighborhood_attention(
        q, k, v, kernel_size=3, bias=q.flatten()[:50].view(2, 5, 5), backend=backend
    ),
    "grouped": lambda q, k, v, backend="cpu": ops.grouped_attention(
        *(x[0].flatten(0, 1) for x in (q, k, v)), OFFSETS, backend=backend
    ),
    "routed": lambda q, k, v, backend="cpu": ops.routed_attention(*(x[:, :3] for x in (q, k, v)), INDEX, backend=backend),
    "decode": lambda q, k, v, backend="cpu": ops.attention(
        q[:, :1, :3], *(torch.cat([x] * 5, 1) for x in (k, v)), return_lse=True, backend=backend
    ),
    "linear": lambda q, k, v, backend="cpu": ops.linear_attention(
        *(x.flatten(1, 2) for x in (q.exp(), k.exp(), v)), causal=True, backend=backend
    ),
    "scan": lambda q, k, v, backend="cpu": ops.selective_scan(
        q.flatten(2), k.exp().flatten(2), -torch.ones(112, 4), v[..., :2].flatten(2)[..., :4], v.flatten(2)[..., -4:],
        backend=backend,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_repeats_are_equal_to_the_bit_and_fresh_memory_does_not_show(name):
    inputs = qkv(2, (7, 8), 2, 7)
    first = outputs_and_gradients(CALLS[name], inputs)
    for again in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, outputs_and_gradients(CALLS[name], inputs), strict=True)), (
            again
        )
    threads = deterministic.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True)
        deterministic.fill_uninitialized_memory = True
        poisoned = outputs_and_gradients(CALLS[name], inputs)
    finally:
        torch.use_deterministic_algorithms(False)
        deterministic.fill_uninitialized_memory = threads
    assert all(torch.equal(a, b) for a, b in zip(first, poisoned, strict=True))


@pytest.mark.skipif(sys.platform == "darwin", reason="built without OpenMP there")
def test_kernels_run_in_as_many_threads_as_pytorch():
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.ops.regard.threads_in_use() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", CALLS)
def test_threads_do_not_matter(name):
    inputs = qkv(2, (7, 8), 2, 7)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(outputs_and_gradients(CALLS[name], inputs))
    torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_compiles_to_one_graph(name):
    """One graph, the same numbers, gradients too."""
    inputs = [x.requires_grad_() for x in qkv(2, (7, 8), 2, 7)]
    torch._dynamo.reset()
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")
    for ours, plain in zip(
        outputs_and_gradients(compiled, inputs), outputs_and_gradients(CALLS[name], inputs), strict=True
    ):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("name", CALLS)
def test_gradients_of_gradients(name):
    """Those of PyTorch's own path, from which none is missing."""

    def slopes(backend, *x):
        outs = CALLS[name](*x, backend)
        total = sum(out.square().sum() for out in (outs if isinstance(outs, tuple) else (outs,)))
        return torch.autograd.grad(total, x, create_graph=True)

    def plain(*x):
        with sdpa_kernel(SDPBackend.MATH):  # the fused one has no second derivatives
            return slopes("torch", *x)

    inputs = qkv(2, (7, 8), 2, 7)
    assert_errs_like(partial(slopes, "cpu"), plain, inputs)
    assert all(x.any() for x in outputs_and_gradients(partial(slopes, "cpu"), inputs))


def test_views_and_not_a_number():
    wide = torch.stack(qkv(2, (7, 8), 2, 8), -2)
    for call in (CALLS["window"], CALLS["neighborhood"], CALLS["routed"], CALLS["linear"]):
        torch.testing.assert_close(call(*wide.unbind(-2)), call(*(x.contiguous() for x in wide.unbind(-2))))
    q, k, v = qkv(1, (4, 4), 1, 4)
    k[0, 0, 0] = math.nan
    out = ops.window_attention(q, k, v, window_size=2, backend="cpu")
    assert out[0, :2, :2].isnan().all()
    assert out[0, 2:].isfinite().all()


def test_routing_out_of_range_teaches():
    q, k, v = (drawn(1, 2, 3, 1, 4, seed=s) for s in range(3))
    for index, message in (
        (torch.tensor([[[0], [2]]]), "0 to 1, got 2"),
        (torch.tensor([[[0], [-1]]]), "got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.routed_attention(q, k, v, index, backend="cpu")


def test_dispatch_says_why_not():
    q, k, v = qkv(1, (8, 8), 2, 4)
    assert "cpu: taken" in kernels.explain("window_attention", q, k, v, window_size=(4, 4))
    assert "float64" in kernels.explain("window_attention", q.double(), k, v, window_size=(4, 4))
    assert "on meta" in kernels.explain("window_attention", q.to("meta"), k, v, window_size=(4, 4))
    assert "queries" in kernels.explain("attention", q, k, v)
    long = drawn(1, 500, 2, 4)
    assert "cpu: taken" in kernels.explain("attention", q[:, :1, :1], long, long)
    assert "bias" in kernels.explain("attention", q[:, :1, :1], long, long, bias=torch.zeros(500))
    assert "not causal" in kernels.explain("linear_attention", q, k, v)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"REGARD_KERNELS": "off"}, "REGARD_KERNELS=off"),
        ({"CXX": "no-such-compiler", "TORCH_EXTENSIONS_DIR": "{folder}"}, "no C++ compiler"),
    ],
)
def test_without_kernels_plain_pytorch_runs(settings, said, tmp_path):
    script = (
        "import torch; from regard import kernels, ops; q = torch.randn(1, 8, 8, 2, 4);"
        "print(kernels.explain('window_attention', q, q, q, window_size=(4, 4)));"
        "print(ops.window_attention(q, q, q, window_size=4).shape)"
    )
    settings = {key: value.format(folder=tmp_path) for key, value in settings.items()}
    ran = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **settings}, capture_output=True, text=True, check=True
    )
    assert said in ran.stdout
    assert "torch: taken" in ran.stdout
    assert "(1, 8, 8, 2, 4)" in ran.stdout.replace("torch.Size([", "(").replace("])", ")")


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="flags of another instruction set")
@pytest.mark.parametrize("machine", ["haswell", "x86-64-v2"])
def test_with_narrower_vectors(machine):
    """This file once more, compiled for eight lanes and for four."""
    if machine == "haswell" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this machine has no AVX2")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*command, "-k", "not compiles and not without and not narrower"],
        env={**os.environ, "REGARD_KERNEL_FLAGS": f"-O1 -march={machine}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout
