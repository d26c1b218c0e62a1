"""The bars of `regard bench --suite`: what the speed of this library is judged by. Each prints as it came out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

from regard.registry import create_model
from regard.workbench.bench import Case, Contender, Inputs, Run
from regard.workbench.bench_cases import Way, made, make_case

_TRAIN, _BOTH = Way("training"), (Way(), Way("training"))
_STAGES = ((8, 56, 56, 3, 32), (8, 28, 28, 6, 32), (8, 14, 14, 12, 32), (8, 7, 7, 24, 32))
_MAP, _VIDEO = (1, 56, 56, 4, 32), (1, 8, 28, 28, 4, 32)
_IMAGES = (8, 3, 224, 224)


def windows() -> list[Case]:
    """window attention at the four stages of Swin-T, 8 images: against SDPA, and as a share of GEMM"""
    return [make_case("window_attention", s, way, window_size=7, bias=True) for way, s in product(_BOTH, _STAGES)]


def dinat() -> list[Case]:
    """DiNAT-Mini beside Swin-T at 224 pixels, 8 images: GMAC/s tells the time per multiply-add"""

    def swin(inputs: Inputs) -> Run:
        return made(lambda: create_model("swin_tiny"), Way())

    case = make_case("dinat_mini", _IMAGES)
    return [replace(case, contenders=[*case.contenders, Contender("swin_tiny", swin, "another model", same=False)])]


def neighborhood() -> list[Case]:
    """neighborhood attention in two and three dimensions: against compiled FlexAttention and NATTEN"""
    grid = product(((1, side, side, 4, 32) for side in (56, 64)), (7, 13), (1, 4))
    flat = [make_case("neighborhood_attention", s, kernel_size=k, dilation=d) for s, k, d in grid]
    return [*flat, make_case("neighborhood_attention", _VIDEO, kernel_size=(3, 7, 7))]


def neighborhood_training() -> list[Case]:
    """a training step of neighborhood attention: against the plain PyTorch path"""
    name = "neighborhood_attention"
    return [make_case(name, _MAP, _TRAIN, kernel_size=7), make_case(name, _VIDEO, _TRAIN, kernel_size=(3, 7, 7))]


def linear() -> list[Case]:
    """causal linear attention from 1k to 256k tokens: tokens a second, memory, growth"""
    way = Way(series="causal linear attention")
    return [make_case("linear_attention", (1, 1024 * 4**i, 4, 64), way, causal=True) for i in range(5)]


def decode() -> list[Case]:
    """one query to 4k up to 64k keys: against SDPA, and as a share of the read rate"""
    return [make_case("decode", (1, 4096 * 2**i, 8, 64), Way(series="decode")) for i in range(5)]


def scan() -> list[Case]:
    """the selective scan, 256 channels of 16 states: against the chunked form (torch) and a loop"""
    way = Way(series="selective scan")
    return [make_case("selective_scan", (1, 16384 * 2**i, 256, 16), way) for i in range(5)]


def models() -> list[Case]:
    """whole models at 224 pixels, 8 images: against timm's"""
    return [make_case(name, _IMAGES) for name in ("swin_tiny", "maxvit_tiny_224", "davit_tiny", "poolformer_s12")]


def threads() -> list[Case]:
    """every kernel with two threads, against one"""
    names = (
        "window_attention",
        "neighborhood_attention",
        "routed_attention",
        "grouped_attention",
        "decode",
        "selective_scan",
    )
    cases = [make_case("linear_attention", causal=True), *map(make_case, names)]
    pairs = [[c.contenders[0], replace(c.contenders[0], name="one thread", threads=1)] for c in cases]
    return [
        replace(case, title=f"{case.title}, two threads", contenders=pair, threads=2)
        for case, pair in zip(cases, pairs, strict=True)
    ]


BARS: dict[str, Callable[[], list[Case]]] = {
    bar.__name__: bar
    for bar in (windows, dinat, neighborhood, neighborhood_training, linear, decode, scan, models, threads)
}
