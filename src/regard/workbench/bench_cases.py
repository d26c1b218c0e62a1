"""What can be benched (ops, mixers, models), and beside what: peers join by themselves where they are installed."""

from __future__ import annotations

import inspect
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks, ops
from regard.checkpoint import KeyMap, load_authors_weights
from regard.kernels import backends, taken, using
from regard.kernels.flex.neighborhoods import neighborhood_mask
from regard.layouts import windows
from regard.registry import create_model, find_variant, list_mixers, list_models
from regard.skeletons.host import build_in_stack
from regard.training import seeded
from regard.workbench.bench import Case, Contender, Inputs, Run, Skip

Options = Mapping[str, Any]
Draw = Callable[..., Tensor]
DENSE, LOOP = 4096, 16384
"""Most tokens for a peer that holds all pairs, most steps for a Python loop: beyond, nobody would take them."""


def explained(run: Callable[[], Any]) -> dict[str, dict[str, str]]:
    """For each op that `run` calls, what `kernels.explain` says of each backend ("taken", "could", "cannot, ...")."""
    with taken() as seen:
        run()
    return {
        op: {name: reason for name, _, reason in (line.partition(": ") for line in said.splitlines())}
        for op, said in seen.items()
    }


class Plain(nn.Module):
    """A module whose ops take their plain PyTorch paths."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        """As the module's own."""
        with using("torch"):
            return self.module(*inputs)


def _first(x: Tensor) -> Tensor:
    """`(B, *S, heads, dim)` -> `(B, heads, N, dim)`, as PyTorch's own functions want it."""
    return x.flatten(1, -3).transpose(1, 2)


def _last(x: Tensor, like: Tensor) -> Tensor:
    """The way back."""
    return x.transpose(1, 2).unflatten(1, like.shape[1:-2])


def sdpa(options: Options, inputs: Inputs) -> Run:
    """PyTorch SDPA"""
    attend, causal = F.scaled_dot_product_attention, options.get("causal", False)
    return lambda q, k, v, bias=None: _last(attend(_first(q), _first(k), _first(v), bias, is_causal=causal), q)


def sdpa_windows(options: Options, inputs: Inputs) -> Run:
    """PyTorch SDPA, windows folded into the batch, the bias expanded over them"""
    spatial, size = inputs[0].shape[1:-2], options["window_size"]
    if any(length % side for length, side in zip(spatial, size, strict=True)):
        raise Skip("written for maps that are a multiple of the window")

    def fold(x: Tensor) -> Tensor:
        return windows.partition(x, size).flatten(0, 1).transpose(1, 2)

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        folded = fold(q)
        mask = None if bias is None else bias.expand(len(folded), -1, -1, -1)
        out = F.scaled_dot_product_attention(folded, fold(k), fold(v), mask).transpose(1, 2)
        return windows.unpartition(out.unflatten(0, (len(q), -1)), size, spatial)

    return run


def _mask(options: Options, inputs: Inputs) -> tuple[Callable[..., Tensor], int]:
    """The mask function of neighborhood attention, and the number of tokens."""
    if len(inputs) > 3:
        raise Skip("written without bias")
    spatial = inputs[0].shape[1:-2]
    past = checks.tuple_of_bools("causal", options.get("causal", False), len(spatial))
    mask = neighborhood_mask(spatial, options["kernel_size"], (1,) * len(spatial), options["dilation"], past)
    return mask, spatial.numel()


def sdpa_mask(options: Options, inputs: Inputs) -> Run:
    """PyTorch SDPA with a dense mask"""
    sees, count = _mask(options, inputs)
    if count > DENSE:
        raise Skip(f"a dense mask is for up to {DENSE} tokens")
    attend, mask = F.scaled_dot_product_attention, sees(None, None, torch.arange(count)[:, None], torch.arange(count))
    return lambda q, k, v: _last(attend(_first(q), _first(k), _first(v), mask), q)


def flex_attention(options: Options, inputs: Inputs) -> Run:
    """compiled FlexAttention with a block mask"""
    from torch.nn.attention import flex_attention as flex

    sees, count = _mask(options, inputs)
    if any(x.requires_grad for x in inputs):
        raise Skip("FlexAttention has no backward pass on CPU")
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise Skip("needs a C++ compiler")
    mask = flex.create_block_mask(sees, None, None, count, count, device="cpu")
    attend = torch.compile(flex.flex_attention, dynamic=False)
    return lambda q, k, v: _last(attend(_first(q), _first(k), _first(v), block_mask=mask), q)


def natten(options: Options, inputs: Inputs) -> Run:
    """NATTEN as it comes; on CPU that is FlexAttention that is not compiled"""
    _, count = _mask(options, inputs)  # refuses a bias, which NATTEN does not take either
    package = _imported("natten")
    if count > DENSE and not package.HAS_LIBNATTEN:
        raise Skip(f"holds all pairs at once here, which is for up to {DENSE} tokens")
    asked = {"is_causal" if name == "causal" else name: value for name, value in options.items()}
    return partial(getattr(package, f"na{inputs[0].dim() - 3}d"), **asked)


def loop(options: Options, inputs: Inputs) -> Run:
    """a Python loop over time"""
    if inputs[0].shape[1] > LOOP:
        raise Skip(f"a Python loop is for up to {LOOP} steps")
    return partial(cast(Run, ops.selective_scan), backend="reference")


def _imported(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError:
        raise Skip(f"not installed (pip install {package})") from None


def _qkv(draw: Draw, *shape: int) -> list[Tensor]:
    return [draw(*shape) for _ in "qkv"]


def _one_query(draw: Draw, batch: int, keys: int, *heads: int) -> list[Tensor]:
    return [draw(batch, length, *heads) for length in (1, keys, keys)]


def _features(draw: Draw, *shape: int) -> list[Tensor]:
    return [draw(*shape).abs(), draw(*shape).abs(), draw(*shape)]


def _routed(draw: Draw, batch: int, blocks: int, *rest: int) -> list[Tensor]:
    return [*_qkv(draw, batch, blocks, *rest), torch.rand(batch, blocks, blocks).argsort(-1)[..., :4].contiguous()]


def _grouped(draw: Draw, groups: int, tokens: int, *heads: int) -> list[Tensor]:
    ends = torch.randint(1, 2 * tokens, (groups,)).cumsum(0)
    return [*_qkv(draw, int(ends[-1]), *heads), F.pad(ends, (1, 0))]


def _scan(draw: Draw, batch: int, length: int, channels: int, states: int) -> list[Tensor]:
    x, dt, a = draw(batch, length, channels), draw(batch, length, channels), draw(channels, states)
    return [x, F.softplus(dt - 4), -a.abs() - 0.1, draw(batch, length, states), draw(batch, length, states)]


@dataclass(frozen=True)
class Op:
    """How an op is benched.

    Args:
        layout: what `--shape` means. shape: a usual one. options: the usual ones.
        draw: the inputs, from a source of random numbers and the shape. bias: the bias' shape, from options and shape.
        peers: who else computes it. function: its name in `regard.ops`, where it is another.
    """

    layout: str
    shape: tuple[int, ...]
    draw: Callable[..., list[Tensor]] = _qkv
    peers: Sequence[Callable[[Options, Inputs], Run]] = ()
    options: Options = field(default_factory=dict)
    bias: Callable[[Options, Sequence[int]], list[int]] | None = None
    function: str = ""


_GRID = "batch x spatial x heads x head_dim"
_NEAR = [sdpa_mask, flex_attention, natten]
OPS = {
    "attention": Op(_GRID, (1, 1024, 4, 64), _qkv, [sdpa], {}, lambda o, s: [s[-2], *[math.prod(s[1:-2])] * 2]),
    "decode": Op("batch x keys x heads x head_dim", (1, 16384, 8, 64), _one_query, [sdpa], function="attention"),
    "window_attention": Op(
        *(_GRID, (8, 56, 56, 3, 32), _qkv, [sdpa_windows], {"window_size": 7}),
        bias=lambda options, shape: [shape[-2], *[math.prod(options["window_size"])] * 2],
    ),
    "neighborhood_attention": Op(
        *(_GRID, (1, 56, 56, 4, 32), _qkv, _NEAR, {"kernel_size": 7, "dilation": 1}),
        bias=lambda options, shape: [shape[-2], *(2 * side - 1 for side in options["kernel_size"])],
    ),
    "linear_attention": Op(_GRID, (1, 4096, 4, 64), _features),
    "selective_scan": Op("batch x length x channels x states", (1, 16384, 256, 16), _scan, [loop]),
    "routed_attention": Op("batch x blocks x tokens x heads x head_dim", (1, 49, 64, 4, 32), _routed),
    "grouped_attention": Op("groups x mean tokens x heads x head_dim", (64, 64, 4, 32), _grouped),
}


@dataclass(frozen=True)
class Way:
    """How a target is run: "forward" or "training", its numbers, and the series of cases that it belongs to."""

    mode: str = "forward"
    dtype: torch.dtype = torch.float32
    series: str = ""

    def inputs(self, draw: Callable[[Draw], list[Tensor]], leaves: bool = True) -> Callable[[], Inputs]:
        """Draws the same inputs at every call; in training with gradients, if they are `leaves`."""

        def drawn() -> list[Tensor]:
            torch.manual_seed(0)
            found = draw(lambda *shape: torch.randn(shape).to(self.dtype))
            return [x.requires_grad_(leaves and self.mode == "training" and x.is_floating_point()) for x in found]

        return drawn

    def title(self, name: str, shape: Sequence[int], options: Options) -> str:
        """What is run, in a line."""
        said = [name, _times(shape)]
        for option, value in options.items():
            sizes = value if isinstance(value, tuple) else (value,)
            said += [option if value is True else f"{option}={_times(sizes)}"] if value is not False else []
        return " ".join(
            [*said, *([self.mode] if self.mode != "forward" else []), str(self.dtype).removeprefix("torch.")]
        )


def _times(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def make_case(target: str, shape: Sequence[int] = (), way: Way = Way(), **options: Any) -> Case:
    """A case of an op, a mixer or a model.

    Args:
        shape: of an op as in `OPS`; of a mixer `batch x spatial x channels`; of a model `batch x channels x height x
            width`. Empty is a usual one.
        options: the target's own, as `kernel_size=7`; with `bias=True` an op gets a bias.

    Raises:
        ValueError: for a target that is not known, a shape that does not fit it, or an option that it does not take.
    """
    names: Callable[[], Any]
    for names, build in ((lambda: OPS, _op), (list_mixers, _mixer), (list_models, _model)):
        if target in names():
            return build(target, tuple(shape), way, options)
    raise ValueError(f"target={target!r} is not known.{checks.nearest(target, [*OPS, *list_mixers(), *list_models()])}")


def _op(name: str, shape: tuple[int, ...], way: Way, options: Options) -> Case:
    """An op beside its other backends and its peers."""
    op = OPS[name]
    registered, shape, asked = op.function or name, shape or op.shape, {**op.options, **options}
    function = getattr(ops, registered)
    if len(shape) not in ((4, 5, 6) if op.layout == _GRID else (len(op.shape),)):
        raise ValueError(f"shape of {name} is {op.layout}, like {_times(op.shape)}; got {_times(shape)}.")
    for option, value in asked.items():
        if option not in inspect.signature(function).parameters or (option == "bias" and op.bias is None):
            raise ValueError(f"{name} takes no {option}.")
        if not isinstance(value, bool):
            asked[option] = checks.tuple_of(option, value, len(shape) - 3)
    title = way.title(name, shape, asked)
    bias = op.bias if asked.pop("bias", False) else None

    def draw(randn: Draw) -> list[Tensor]:
        return [*op.draw(randn, *shape), *([randn(*bias(asked, shape))] if bias else [])]

    def run(*inputs: Tensor, backend: str = "auto") -> Tensor:
        extra = {"bias": inputs[-1]} if bias else {}
        return function(*inputs[: len(inputs) - len(extra)], **asked, **extra, backend=backend)

    def path(backend: str, inputs: Inputs) -> Run:
        said = explained(lambda: run(*inputs))[registered][backend]
        if said != "could":
            raise Skip("regard takes this path here" if said == "taken" else said)
        return partial(run, backend=backend)

    contenders = [
        Contender("regard", lambda inputs: run),
        *(
            Contender(f"regard/{b}", partial(path, b), f"backend={b!r}")
            for b in backends(registered)
            if b != "reference"
        ),
        *(Contender(peer.__name__, partial(peer, asked), inspect.getdoc(peer) or "") for peer in op.peers),
    ]
    return Case(title, way.inputs(draw), contenders, math.prod(shape[:-2]), way.mode, series=way.series)


def made(build: Callable[[], nn.Module], way: Way) -> nn.Module:
    """A module in the mode and numbers asked for, without chance: nothing is dropped."""
    module = seeded(build, 0).train(way.mode == "training").to(way.dtype)
    for part in module.modules():
        if type(part).__name__ in ("Dropout", "DropPath"):  # timm has its own
            part.eval()
    return module


def _beside_itself(module: Callable[[], nn.Module]) -> list[Contender]:
    def plain(inputs: Inputs) -> Run:
        said = explained(lambda: module()(*inputs)).values()
        if all("taken" in (paths.get("torch"), paths.get("reference")) for paths in said):
            raise Skip("regard takes these paths here")
        return Plain(module())

    note = "the same module, its ops on plain PyTorch paths"
    return [Contender("regard", lambda inputs: module()), Contender("regard/torch", plain, note)]


def _mixer(name: str, shape: tuple[int, ...], way: Way, options: Options) -> Case:
    """A mixer with heads of 32 channels, beside itself on plain PyTorch paths."""
    shape = shape or (1, 56, 56, 96)
    if len(shape) not in (3, 4, 5):
        raise ValueError(f"shape of a mixer is batch x spatial x channels, like 1x56x56x96; got {_times(shape)}.")
    heads = max(shape[-1] // 32, 1)
    module = cache(lambda: made(lambda: build_in_stack(name, 0, shape[1:-1], shape[-1], heads, **options), way))
    title, inputs = way.title(name, shape, options), way.inputs(lambda randn: [randn(*shape)])
    return Case(title, inputs, _beside_itself(module), math.prod(shape[:-1]), way.mode, series=way.series)


def _model(name: str, shape: tuple[int, ...], way: Way, options: Options) -> Case:
    """A whole model of images beside itself on plain PyTorch paths, and timm's."""
    published = find_variant(name)[1].inputs
    if len(published) != 1 or len(published[0]) != 4:
        raise ValueError(f"bench takes models of images, and {name} is none.")
    shape = shape or published[0]
    if len(shape) != 4:
        raise ValueError(
            f"shape of a model is batch x channels x height x width, like 8x3x224x224; got {_times(shape)}."
        )
    module = cache(lambda: made(lambda: create_model(name, **options), way))
    contenders = [
        *_beside_itself(module),
        Contender("timm", partial(timm, name, module, way), inspect.getdoc(timm) or ""),
    ]
    title, inputs = way.title(name, shape, options), way.inputs(lambda randn: [randn(*shape)], leaves=False)
    return Case(title, inputs, contenders, math.prod(shape) // shape[1], way.mode, series=way.series)


_HEAD = (r"^head\.fc", "head")
TIMM: dict[str, tuple[str, list[Any]]] = {
    r"swin_(tiny|small|base|large)": (
        r"swin_\1_patch4_window7_224",
        [(r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample"), _HEAD],
    ),
    r"maxvit_([a-z]+_)(\d+)": (r"maxvit_\1tf_\2", []),
    r"davit_(tiny|small|base)": (
        r"davit_\1",
        [
            (r"^(stem|stages\.(\d)\.downsample)\.", lambda m: f"patch_embeds.{m[2] or 0}."),
            (r"^(patch_embeds\.\d)\.conv", r"\1.proj"),
            (r"^stages\.(\d)\.blocks\.", r"main_blocks.\1."),
            (r"\.cpe(\d)\.", lambda m: f".cpe.{int(m[1]) - 1}."),
            (r"^head\.norm", "norms"),
            _HEAD,
        ],
    ),
    r"poolformer_(\w+)": (
        r"poolformer_\1",
        [
            (r"^stem\.conv", "patch_embed.proj"),
            (r"^stages\.(\d)\.downsample\.conv", lambda m: f"network.{2 * int(m[1]) - 1}.proj"),
            (r"^stages\.(\d)\.blocks", lambda m: f"network.{2 * int(m[1])}"),
            (r"layer_scale(\d)\.scale", r"layer_scale_\1"),
            (r"^head\.norm", "norm"),
            _HEAD,
        ],
    ),
}
"""timm's models of an architecture of ours: our names, its name, and how the authors call its parameters."""


def timm(name: str, own: Callable[[], nn.Module], way: Way, inputs: Inputs) -> Run:
    """timm's model of the same architecture, with the same weights (and for PoolFormer the authors' head)"""
    matches = ((re.fullmatch(ours, name), *entry) for ours, entry in TIMM.items())
    match, theirs, rules = next((entry for entry in matches if entry[0]), (None, "", []))
    if match is None:
        raise Skip("no model of timm is known here to be the same")
    model: Any = made(partial(_imported("timm").create_model, match.expand(theirs)), way)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # scales that start near zero would hide their branches from the check
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    load_authors_weights(own(), KeyMap(rules).apply(model.state_dict()))
    if name.startswith("poolformer"):  # timm takes the norm after the mean, the authors before it
        norm = nn.GroupNorm(1, model.num_features)  # type: ignore[arg-type]
        norm.load_state_dict(model.head.norm.state_dict())
        model.head.norm, model.head.global_pool = model.head.global_pool, norm.to(way.dtype)  # type: ignore[method-assign]
    return model
