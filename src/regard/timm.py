"""Every image backbone of this library in timm's registry, under its name with `regard_` in front.

    >>> import regard.timm
    >>> import timm
    >>> model = timm.create_model("regard_cswin_tiny", num_classes=10)

So timm's scripts train, validate and measure them: `train.py DATA --model regard_cswin_tiny`, after this import. Its
registry knows them as module "timm" of this package: `timm.list_models("regard_*")` lists them.

Sizes and classes of each `default_cfg` are the published ones; mean, deviation and crop are ImageNet's usual ones, which
timm takes where nothing else is said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

try:
    from timm.models import FeatureInfo, PretrainedCfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
except ImportError as error:
    raise ImportError(
        f"regard.timm puts this library's models into timm's registry and needs timm 1.0 or later ({error}): "
        "pip install 'regard[timm]'. Without timm the same models are regard.create_model(NAME)."
    ) from error
from torch import Tensor, nn

from regard.checkpoint import load_authors_weights
from regard.registry import System, Variant, create_model, find_variant, list_models
from regard.skeletons import ImageModel

PREFIX = "regard_"

default_cfgs: dict[str, Any] = {}
"""By model, as timm's own modules have them: `register_model` looks here."""


class FeatureMaps(nn.Module):
    """What `features_only=True` gives: the maps of the stages, as timm's feature extractors return them.

    Args:
        model: its classifier is taken off. out_indices: of the stages; an integer is the last so many, None all of them.

    Attributes:
        feature_info: `channels()` and `reduction()` of the maps, in timm's terms.
    """

    def __init__(self, model: ImageModel, out_indices: int | Sequence[int] | None = None) -> None:
        super().__init__()
        stages = len(model.feature_dims)
        wanted = range(stages) if out_indices is None else out_indices
        if isinstance(wanted, int):
            wanted = range(stages - wanted, stages)
        if not wanted or not all(-stages <= index < stages for index in wanted):
            raise ValueError(f"out_indices={out_indices!r}: this model has stages 0..{stages - 1}.")
        self.out_indices = [index % stages for index in wanted]
        model.reset_classifier(0)
        self.model = model
        self.feature_info = FeatureInfo([], self.out_indices)
        # Filled afterwards: timm takes it for granted that strides never fall, and some have two branches.
        self.feature_info.info = [
            {"num_chs": channels, "reduction": stride, "module": f"stages.{stage}", "index": stage}
            for stage, (channels, stride) in enumerate(zip(model.feature_dims, model.feature_strides, strict=True))
        ]

    def forward(self, x: Tensor) -> list[Tensor]:
        """`(B, in_chans, H, W)` -> `(B, C_s, H_s, W_s)` for each stage in `out_indices`."""
        return self.model.forward_intermediates(x, self.out_indices)


def _entrypoint(name: str, system: System, variant: Variant) -> Callable[..., nn.Module]:
    published = {"num_classes": 1000, "in_chans": 3} | variant.options

    def build(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: Any = None,
        features_only: bool = False,
        out_indices: int | Sequence[int] | None = None,
        drop_rate: float = 0.0,
        **options: Any,
    ) -> nn.Module:
        if drop_rate:
            raise ValueError(
                f"drop_rate={drop_rate} is no option of {variant.name}, which has its own head. "
                "Stochastic depth is drop_path_rate, where the paper has it."
            )
        cfg = resolve_pretrained_cfg(name, pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=pretrained_cfg_overlay)
        classes = options.pop("num_classes", published["num_classes"])
        model = create_model(variant.name, **options, num_classes=published["num_classes"] if pretrained else classes)
        assert isinstance(model, ImageModel)
        if pretrained:
            _load(model, cfg, system, variant)
            if classes != model.num_classes:
                model.reset_classifier(classes)
        model.pretrained_cfg = model.default_cfg = cfg.to_dict()
        if not features_only:
            return model
        maps = FeatureMaps(model, out_indices)
        maps.pretrained_cfg = maps.default_cfg = model.pretrained_cfg
        return maps

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{variant.name} of {system.title} ({system.year}): see `regard.create_model`."
    return build


def _load(model: ImageModel, cfg: PretrainedCfg, system: System, variant: Variant) -> None:
    """The authors' weights, from where timm is told that they are."""
    weights = cfg.state_dict or cfg.file
    if not weights:
        home = f"https://github.com/{system.repo}" if system.repo else f"the authors of arXiv {system.arxiv}"
        raise ValueError(
            f"pretrained=True: no weights of {variant.name} come with this library. Get the authors' file from {home} "
            "and say where it is: timm.create_model(..., pretrained=True, pretrained_cfg_overlay={'file': PATH}). "
            "Weights that you trained yourself load with checkpoint_path=PATH."
        )
    load_authors_weights(model, weights)


def _default_cfg(system: System, variant: Variant) -> PretrainedCfg:
    return PretrainedCfg(
        input_size=tuple(variant.inputs[0][1:]),
        num_classes=variant.options.get("num_classes", 1000),
        classifier="head",
        origin_url=f"https://github.com/{system.repo}" if system.repo else None,
        paper_name=system.title,
        paper_ids=f"arXiv:{system.arxiv}",
    )


def _register() -> None:
    for model in list_models():
        system, variant = find_variant(model)
        made_by: Any = getattr(variant.build, "func", variant.build)
        if not issubclass(made_by, ImageModel):
            continue
        name = PREFIX + model
        default_cfgs.update(generate_default_cfgs({name: _default_cfg(system, variant)}))
        globals()[name] = register_model(_entrypoint(name, system, variant))


__all__ = ["PREFIX", "FeatureMaps", "default_cfgs"]
_register()
