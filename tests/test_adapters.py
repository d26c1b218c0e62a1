"""Adapters to GPU libraries: what they hand over, through stand-ins that keep the libraries' own conventions."""

from __future__ import annotations

import math
import subprocess
import sys
from types import ModuleType
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention as torch_flex

from oracles import outputs_and_gradients
from regard import kernels, ops
from regard.kernels import flex, libraries
from regard.kernels.flex.core import block_mask
from regard.kernels.flex.groups import runs as runs_of
from regard.kernels.flex.groups import runs_blocks, runs_mask
from regard.kernels.flex.neighborhoods import neighborhood_mask
from regard.kernels.flex.windows import windows as sort_by_window
from regard.ops import LinearState, reference
from test_ops import drawn, neighborhoods, qkv, windows


@pytest.fixture
def stand_in(monkeypatch):
    """`stand_in(module, **functions)` installs a module for the test, and lets adapters take tensors on CPU."""
    caches = [libraries._found, libraries._lacks]
    monkeypatch.setattr(libraries, "DEVICES", ("cpu",))
    for cache in caches:
        cache.cache_clear()

    def install(name: str, **functions: object) -> None:
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:depth]), ModuleType(parts[depth - 1]))
        vars(sys.modules[name]).update(functions)

    yield install
    for cache in caches:
        cache.cache_clear()


def same(ours, true, inputs: list[Tensor]) -> None:
    for a, b in zip(outputs_and_gradients(ours, inputs), outputs_and_gradients(true, inputs), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)


# NATTEN: heads last, scale=None is head_dim ** -0.5, log-sum-exp float32 without gradient, equally many heads


def natten_stand_in(axes: int):
    def na(
        query, key, value, kernel_size, stride=1, dilation=1, is_causal=False, scale=None, backend=None, return_lse=False
    ):  # fmt: skip
        assert query.dim() == 3 + axes
        assert query.shape == key.shape == value.shape
        assert query.shape[-1] % 8 == 0
        for option in (kernel_size, stride, dilation):
            assert len(option) == axes
            assert all(type(x) is int for x in option)
        assert min(kernel_size) > 1
        assert all(type(x) is bool for x in is_causal)
        out, lse = reference.neighborhood_attention(
            query, key, value, kernel_size=kernel_size, stride=stride, dilation=dilation, causal=is_causal, scale=scale,
            return_lse=True,
        )  # fmt: skip
        return (out, lse.detach().float()) if return_lse else out

    return na


NATTEN = {"HAS_LIBNATTEN": True, **{f"na{axes}d": natten_stand_in(axes) for axes in (1, 2, 3)}}


@pytest.mark.parametrize("spatial", [(11,), (6, 9), (3, 4, 5)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_natten(stand_in, spatial, scale):
    stand_in("natten", **NATTEN)
    options = {"kernel_size": 3, "stride": 2, "causal": (True,) + (False,) * (len(spatial) - 1), "scale": scale}

    def call(backend):
        return lambda q, k, v: ops.neighborhood_attention(q, k, v, **options, backend=backend)

    for kv_heads in (2, 1):
        same(call("natten"), call("reference"), qkv(2, spatial, 2, 8, kv_heads))
    q, k, v = qkv(2, spatial, 2, 8)
    for ours, true in zip(
        ops.neighborhood_attention(q, k, v, **options, return_lse=True, backend="natten"),
        ops.neighborhood_attention(q, k, v, **options, return_lse=True, backend="reference"),
        strict=True,
    ):
        torch.testing.assert_close(ours, true)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bias": torch.zeros(2, 5, 5)}, "bias is not supported by natten"),
        ({"kernel_size": (3, 1)}, "at least 2 on every axis"),
        ({"scale": 0.0}, "scale=0"),
        ({"return_lse": True}, "no gradient to the log-sum-exp"),
        ({"dim": 12}, "a multiple of 8"),
        ({"dtype": torch.float64}, "takes float32, float16 and bfloat16"),
    ],
)
def test_natten_refuses(stand_in, change, reason):
    stand_in("natten", **NATTEN)
    dim, dtype = change.pop("dim", 8), change.pop("dtype", torch.float32)
    q, k, v = (x.to(dtype).requires_grad_() for x in qkv(1, (6, 6), 2, dim))
    with pytest.raises(ValueError, match=reason):
        ops.neighborhood_attention(q, k, v, **{"kernel_size": 3, **change}, backend="natten")


def test_libraries_that_are_not_right(stand_in):
    q, k, v = qkv(1, (6, 6), 2, 8)

    def said() -> str:
        libraries._found.cache_clear()
        libraries._lacks.cache_clear()
        return kernels.explain("neighborhood_attention", q, k, v, kernel_size=3, return_lse=True)

    assert "natten is not installed: pip install natten" in said()
    stand_in("natten", **{**NATTEN, "HAS_LIBNATTEN": False})
    assert "without its CUDA library" in said()
    stand_in("natten", na2d=lambda query, key, value, kernel_size, stride, dilation, is_causal, scale: query)
    assert "this natten has no na2d(..., return_lse=...): upgrade it" in said()
    stand_in("natten")
    sys.modules["natten"] = None  # as an import that fails
    assert "natten is installed but does not load" in said()


# flash-attn: half precision, (B, N, heads, d), log-sum-exp (B, heads, N) with +inf for rows without keys


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    assert q.dim() == k.dim() == v.dim() == 4
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert q.shape[-1] == v.shape[-1] <= 256
    out, lse = reference.attention(q, k, v, causal=causal, scale=softmax_scale, return_lse=True)
    lse = lse.detach().float().transpose(1, 2)
    return (out, lse.masked_fill(lse == -math.inf, math.inf), None) if return_attn_probs else out


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    assert q.dtype in (torch.float16, torch.bfloat16)
    for ends, most in ((cu_seqlens_q, max_seqlen_q), (cu_seqlens_k, max_seqlen_k)):
        assert ends.dtype == torch.int32
        assert type(most) is int
        assert most == ends.diff().max()
    return reference.grouped_attention(q, k, v, cu_seqlens_q, key_offsets=cu_seqlens_k, scale=softmax_scale)


FLASH = {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}


@pytest.mark.parametrize(("queries", "keys"), [((5,), (9,)), ((3, 4), (2, 4))])
@pytest.mark.parametrize("causal", [False, True])
def test_flash(stand_in, queries, keys, causal):
    stand_in("flash_attn", **FLASH)
    q, k, v = drawn(2, *queries, 4, 12), drawn(2, *keys, 2, 12, seed=1), drawn(2, *keys, 2, 12, seed=2)
    q, k, v = (x.bfloat16() for x in (q, k, v))

    def call(backend, **options):
        return lambda q, k, v: ops.attention(q, k, v, causal=causal, scale=0.4, backend=backend, **options)

    same(call("flash"), call("reference"), [q, k, v])
    for ours, true in zip(
        call("flash", return_lse=True)(q, k, v), call("reference", return_lse=True)(q, k, v), strict=True
    ):
        torch.testing.assert_close(ours, true)


def test_flash_groups(stand_in):
    stand_in("flash_attn", **FLASH)
    offsets, key_offsets = torch.tensor([0, 3, 3, 8, 9]), torch.tensor([0, 2, 6, 6, 10])
    inputs = [drawn(rows, 2, 8, seed=rows).bfloat16() for rows in (9, 10, 10)]

    def call(backend):
        return lambda q, k, v: ops.grouped_attention(q, k, v, offsets, key_offsets=key_offsets, backend=backend)

    same(call("flash"), call("reference"), inputs)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda q: ops.attention(q.float(), q.float(), q.float(), backend="flash"), "takes float16 and bfloat16"),
        (lambda q: ops.attention(q, q, q[..., :4], backend="flash"), "head_dim=8, value_dim=4"),
        (lambda q: ops.attention(q, q, q, bias=q.new_zeros(5, 5), backend="flash"), "bias is not supported"),
        (lambda q: ops.attention(q, q, q, mask=torch.ones(5, 5).bool(), backend="flash"), "mask is not supported"),
        (lambda q: ops.attention(q, q, q, return_lse=True, backend="flash"), "no gradient to the log-sum-exp"),
        (lambda q: ops.attention(q[:0], q[:0], q[:0], backend="flash"), "q is empty"),
        (lambda q: ops.grouped_attention(q[0], q[0, :0], q[0, :0], torch.tensor([0, 5]),
                                         key_offsets=torch.tensor([0, 0]), backend="flash"), "k is empty"),
    ],
)  # fmt: skip
def test_flash_refuses(stand_in, call, reason):
    stand_in("flash_attn", **FLASH)
    with pytest.raises(ValueError, match=reason):
        call(drawn(2, 5, 2, 8).bfloat16().requires_grad_())


# fla: (B, T, heads, d), equally many heads, log decay a head, float32 states (B, heads, K, V), scale 1 / sqrt(K) by default


def chunk_simple_gla(
    q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None
):
    assert g is None
    assert q.shape == k.shape
    assert k.shape[:-1] == v.shape[:-1]
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]).float()
    if initial_state is not None:
        assert initial_state.dtype == torch.float32
        state = state + initial_state
    outs = []
    for t in range(q.shape[1]):
        if g_gamma is not None:
            state = state * g_gamma.exp()[:, None, None]
        state = state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outs.append(((q[:, t] * scale)[..., None, :].float() @ state).squeeze(-2))
    return torch.stack(outs, 1).to(q.dtype), state if output_final_state else None


@pytest.mark.parametrize("decayed", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_fla(stand_in, decayed, normalize, kv_heads):
    stand_in("fla.ops.simple_gla", chunk_simple_gla=chunk_simple_gla)
    q, k, v = qkv(2, (9,), 2, 4, kv_heads)
    decay = torch.tensor([0.05, 0.7]) if decayed else None
    state = [drawn(2, 2, 4, 4, seed=8), drawn(2, 2, 4, seed=9).abs()]

    def call(backend, **options):
        def attend(q, k, v, *state):
            options["state"] = LinearState(*state) if state else None
            result = ops.linear_attention(
                q, k, v, causal=True, decay=decay, normalize=normalize, backend=backend, **options
            )
            return (result[0], *result[1]) if options.get("return_state") else result

        return attend

    q, k = q.abs(), k.abs()
    same(call("fla"), call("torch"), [q, k, v])
    same(call("fla"), call("torch"), [q, k, v, *state])
    same(call("fla", return_state=True), call("torch", return_state=True), [q, k, v, *state])


def test_fla_refuses_and_declines(stand_in):
    stand_in("fla.ops.simple_gla", chunk_simple_gla=chunk_simple_gla)
    q, k, v = qkv(1, (9,), 2, 4)
    with pytest.raises(ValueError, match="causal is False"):
        ops.linear_attention(q, k, v, backend="fla")
    said = kernels.explain("linear_attention", q, k, v, causal=True)
    assert "fla: only by name, fla multiplies float32 in TF32" in said
    assert "fla: taken" in "\n".join(
        kernels.explain("linear_attention", *(x.half() for x in (q, k, v)), causal=True).splitlines()
    )


# FlexAttention. Without `torch.compile` it traces its functions anew for every size: the drawn sizes skip that.


UNTRACED = mock.patch.object(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def numbers(mask_mod, queries: int, keys: int) -> Tensor:
    return mask_mod(None, None, torch.arange(queries)[:, None], torch.arange(keys))


def visible(attend, tokens: tuple[int, ...]) -> Tensor:
    """Which key has a weight in the output of each query."""
    count = math.prod(tokens)
    q, v = torch.zeros(1, *tokens, 1, 1), torch.eye(count).view(1, *tokens, 1, count)
    return attend(q, q, v).view(count, count) > 0


@given(neighborhoods())
def test_neighborhood_mask_and_blocks(shape):
    spatial, kernel, stride, dilation, causal = shape
    tokens, sizes = math.prod(spatial), (tuple(spatial), *(tuple(x) for x in (kernel, stride, dilation, causal)))
    seen = visible(
        lambda q, k, v: reference.neighborhood_attention(
            q, k, v, kernel_size=kernel, stride=stride, dilation=dilation, causal=causal
        ),
        tuple(spatial),
    )
    assert torch.equal(numbers(neighborhood_mask(*sizes), tokens, tokens), seen)
    blocks = block_mask(neighborhood_mask, sizes, tokens, tokens, seen)
    assert torch.equal(blocks.to_dense()[0, 0].bool(), by_blocks(seen).any(3).any(1))


def by_blocks(seen: Tensor) -> Tensor:
    rows, keys = seen.shape
    return (
        torch.nn.functional.pad(seen, (0, -keys % 128, 0, -rows % 128)).unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
    )


def unlisted(counts: Tensor, places: Tensor) -> Tensor:
    listed = torch.zeros(places.shape, dtype=torch.bool)
    for row, (count, columns) in enumerate(zip(counts, places, strict=True)):
        listed[row, columns[:count].long()] = True
    return listed


@given(windows())
def test_window_order_and_mask(shape):
    spatial, size, shift, partition = shape
    tokens = math.prod(spatial)
    seen = visible(
        lambda q, k, v: reference.window_attention(q, k, v, window_size=size, shift=shift, partition=partition),
        tuple(spatial),
    )
    order, back, _, offsets = sort_by_window(spatial, size, shift, partition, torch.device("cpu"))
    sorted_mask = numbers(runs_mask(runs_of(offsets, offsets, tokens)), tokens, tokens)
    assert torch.equal(sorted_mask, seen[order][:, order])
    assert torch.equal(order[back], torch.arange(tokens))


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), min_size=1, max_size=6))
def test_group_blocks(groups):
    offsets, key_offsets = (torch.tensor([0, *column]).cumsum(0) for column in zip(*groups, strict=True))
    rows, keys = int(offsets[-1]), int(key_offsets[-1])
    if not rows or not keys:
        return
    seen = torch.zeros(rows, keys, dtype=torch.bool)
    for group in range(len(groups)):
        seen[offsets[group] : offsets[group + 1], key_offsets[group] : key_offsets[group + 1]] = True
    runs = runs_of(offsets, key_offsets, rows)
    assert torch.equal(numbers(runs_mask(runs), rows, keys), seen)
    blocks = runs_blocks(runs, keys)
    needed, whole = by_blocks(seen).any(3).any(1), by_blocks(seen).all(3).all(1)
    visited = blocks.to_dense()[0, 0].bool()
    assert not (needed & ~visited).any()
    full = unlisted(blocks.full_kv_num_blocks[0, 0], blocks.full_kv_indices[0, 0])
    assert torch.equal(full, whole)


def flex_equals_reference(op, inputs, **options):
    inputs = [x.double() for x in inputs]
    torch.testing.assert_close(op(*inputs, **options, backend="flex"), op(*inputs, **options, backend="reference"))


@UNTRACED
@given(neighborhoods(), st.sampled_from([(1, 1), (4, 2)]), st.booleans(), st.booleans())
def test_flex_neighborhoods(shape, heads, with_bias, lse):
    spatial, kernel, stride, dilation, causal = shape
    flex_equals_reference(
        ops.neighborhood_attention, qkv(2, tuple(spatial), heads[0], 3, heads[1]),
        kernel_size=kernel, stride=stride, dilation=dilation, causal=causal, return_lse=lse,
        bias=drawn(heads[0], *(2 * k - 1 for k in kernel), seed=4).double() if with_bias else None,
    )  # fmt: skip


@UNTRACED
@given(windows(), st.sampled_from([(1, 1), (4, 2)]), st.sampled_from([None, 1, 4]))
def test_flex_windows(shape, heads, bias_heads):
    spatial, size, shift, partition = shape
    tokens = math.prod(size)
    bias = None if bias_heads is None else drawn(min(bias_heads, heads[0]), tokens, tokens, seed=4).double()
    flex_equals_reference(
        ops.window_attention, qkv(2, tuple(spatial), heads[0], 3, heads[1]),
        window_size=size, shift=shift, partition=partition, bias=bias,
    )  # fmt: skip


@UNTRACED
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, (), (1, 1), (4, 1, 0), (2, 1, 1, 0), (1, 4, 0, 0), (0, 0)]),
    st.booleans(),
)
def test_flex_dense(queries, keys, causal, lse, bias_shape, masked):
    q, k, v = drawn(2, queries, 4, 3), drawn(2, keys, 2, 3, seed=1), drawn(2, keys, 2, 5, seed=2)
    sizes = (2, 4, queries, keys)  # a 0 in bias_shape stands for the full size
    bias = None
    if bias_shape is not None:
        ends = sizes[len(sizes) - len(bias_shape) :]
        shape = [a or b for a, b in zip(bias_shape, ends, strict=True)]
        bias = drawn(*shape, 1, seed=3).squeeze(-1).double()
    mask = drawn(1, 1, queries, keys, seed=5) > 0.3 if masked else None
    flex_equals_reference(ops.attention, [q, k, v], causal=causal, return_lse=lse, bias=bias, mask=mask)


@UNTRACED
@given(st.lists(st.tuples(st.integers(0, 90), st.integers(0, 90)), min_size=1, max_size=6))
def test_flex_groups(groups):
    offsets, key_offsets = (torch.tensor([0, *column]).cumsum(0) for column in zip(*groups, strict=True))
    rows, keys = int(offsets[-1]), int(key_offsets[-1])
    if rows and keys:
        inputs = [drawn(rows, 2, 4), drawn(keys, 2, 4, seed=1), drawn(keys, 2, 4, seed=2)]
        flex_equals_reference(
            lambda q, k, v, **options: ops.grouped_attention(q, k, v, offsets, **options),
            inputs,
            key_offsets=key_offsets,
        )


def test_flex_gradients(monkeypatch):
    """On CPU only the door is closed to training: behind it the functions that CUDA compiles have their gradients."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(libraries, "wants_gradient", lambda *tensors: False)
    bias = drawn(2, 5, 3, seed=4)

    def call(backend):
        return lambda q, k, v, bias: ops.neighborhood_attention(
            q, k, v, kernel_size=(3, 2), dilation=(1, 2), bias=bias, return_lse=True, backend=backend
        )

    same(call("flex"), call("reference"), [*qkv(1, (5, 6), 2, 4), bias])

    def call(backend):
        return lambda q, k, v, bias: ops.window_attention(
            q, k, v, window_size=(3, 2), shift=(1, 1), bias=bias, backend=backend
        )

    same(call("flex"), call("reference"), [*qkv(1, (5, 6), 2, 4), drawn(1, 6, 6, seed=4)])


def test_flex_inside_a_compiled_function():
    q, k, v = qkv(1, (9, 10), 2, 8)

    def call(backend):
        return lambda q, k, v: ops.neighborhood_attention(q, k, v, kernel_size=3, dilation=2, backend=backend)

    compiled = torch.compile(call("flex"), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), call("reference")(q, k, v))


def test_flex_steps_aside():
    q, k, v = qkv(1, (8, 8), 2, 8)
    said = kernels.explain("neighborhood_attention", q, k, v, kernel_size=3)
    assert "flex: only by name, on CPU it holds all pairs at once" in said
    q.requires_grad_()
    with pytest.raises(ValueError, match="no backward on CPU"):
        ops.neighborhood_attention(q, k, v, kernel_size=3, backend="flex")


def test_on_cuda():
    """What is said of tensors on CUDA, where there is none: tensors without numbers will do."""
    with FakeTensorMode():
        small, large = (torch.empty(1, side, side, 2, 32, device="cuda", dtype=torch.bfloat16) for side in (8, 64))
        row, few, rows = (
            torch.empty(shape, device="cuda") for shape in ((1, 4096, 2, 32), (1, 512, 2, 32), (4096, 2, 32))
        )
    said = kernels.explain("neighborhood_attention", small, small, small, kernel_size=3)
    assert "natten: cannot, natten is not installed: pip install natten" in said
    assert "flex: cannot, q is a FakeTensor" in said
    said = kernels.explain("linear_attention", row, row, row, causal=True)
    assert "fla: cannot, fla is not installed: pip install flash-linear-attention" in said
    said = kernels.explain("attention", small, small, small)
    assert "flash: cannot, flash-attn is not installed: pip install flash-attn" in said
    assert "64 tokens do not repay" in flex.declines_neighborhood(small)
    assert flex.declines_neighborhood(large) is None
    assert "windows of 49 tokens" in flex.declines_window(large, window_size=7)
    assert flex.declines_window(large, window_size=(16, 16)) is None
    assert "PyTorch's own" in flex.declines_attention(large, large, large)
    assert flex.declines_attention(large, large, large, return_lse=True) is None
    assert flex.declines_attention(large, few, row, causal=True) is None
    assert "do not repay" in flex.declines_attention(small, large, large, causal=True)
    assert "half empty" in flex.declines_grouped(rows, rows, rows, torch.zeros(65))
    assert flex.declines_grouped(rows, rows, rows, torch.zeros(9)) is None


def test_import_loads_no_library():
    heavy = ("natten", "flash_attn", "fla", "triton", "torch.nn.attention.flex_attention")
    code = f"""if True:
        import sys, torch
        before = set(sys.modules)
        import regard.ops
        print(set({heavy!r}) & (set(sys.modules) - before))"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
