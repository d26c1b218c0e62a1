"""Which patterns of attention a mixer really has: noncausal or causal, self or cross, alone and in padded batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regard.layers import run_stream

DIM, HEADS, TOLERANCE = 16, 2, 1e-6
LENGTHS = (20, 13, 3)
"""Of the samples of a padded batch; the last is shorter than windows, segments and chunks."""


def conformance(made: type[nn.Module], **options: Any) -> dict[str, bool]:
    """What holds of a mixer class, of what it says it can do.

    "self" is noncausal self attention, a function of each sample; "padding", that padded batches equal samples alone.
    "prefix": outputs do not change when the future is cut off; "stream": token by token equals all at once; "memory": the
    derivative of an output by the input before has a rank above the number of heads, so that more than a factor of each
    head depends on the past. "cross": the context is read, and its padding is not; "causal cross": outputs do not change when
    later queries are cut off, while the context is whole.

    Weights and inputs are drawn, in float64.
    """
    can = {name: getattr(made, name, False) for name in ("can_causal", "can_cross", "can_stream", "can_mask")}
    found: dict[str, bool] = {}
    x = torch.randn(len(LENGTHS), max(LENGTHS), DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        if _takes_both_directions(made, options):
            mixer = _built(made, options)
            whole = mixer(x)
            found["self"] = all(_equal(mixer(one[None])[0], part) for one, part in zip(x, whole, strict=True))
            if can["can_mask"]:
                found["padding"] = _padding_is_left_out(mixer, x)
        if can["can_causal"]:
            mixer = _built(made, {**options, "causal": True})
            whole = mixer(x)
            found["prefix"] = all(_equal(mixer(x[:, :t]), whole[:, :t]) for t in range(1, x.shape[1]))
            if can["can_mask"]:
                found["padding"] = found.get("padding", True) and _padding_is_left_out(mixer, x)
            if can["can_stream"]:
                found["stream"] = _equal(run_stream(mixer, x)[0], whole)
            found["memory"] = _rank_of_the_past(mixer, x[:1]) > HEADS
        if can["can_cross"]:
            mixer, context = _built(made, options), x[:, :9].flip(0) + 1
            whole = mixer(x, context)
            visible = torch.arange(9) < torch.tensor([9, 5, 2])[:, None]
            alone = [mixer(x[i : i + 1], context[i : i + 1, : int(visible[i].sum())])[0] for i in range(len(x))]
            read = not _equal(whole, mixer(x, context + 1))
            found["cross"] = read and _equal(torch.stack(alone), mixer(x, context, mask=visible))
            found["causal cross"] = all(_equal(mixer(x[:, :t], context), whole[:, :t]) for t in (1, 5, 12, 19))
    return found


def patterns(found: dict[str, bool]) -> str:
    """Of the four patterns those for which all that was checked holds: "NS CS NC CC"."""
    needs = {
        "NS": ("self",),
        "CS": ("prefix", "stream", "memory"),
        "NC": ("cross",),
        "CC": ("cross", "causal cross"),
    }
    padded = found.get("padding", True)
    return " ".join(
        name
        for name, parts in needs.items()
        if all(found.get(part, False) for part in parts) and (padded or name in ("NC", "CC"))
    )


def _takes_both_directions(made: type[nn.Module], options: dict[str, Any]) -> bool:
    try:
        made(DIM, HEADS, **{**options, "causal": False})
    except ValueError:
        return False
    except TypeError:  # no such argument
        return True
    return True


def _built(made: type[nn.Module], options: dict[str, Any]) -> nn.Module:
    """With drawn weights: fresh biases are often zero, and then hide mistakes."""
    mixer = made(DIM, HEADS, **options).double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in mixer.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return mixer


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= TOLERANCE)


def _padding_is_left_out(mixer: nn.Module, x: Tensor) -> bool:
    mask = torch.arange(x.shape[1]) < torch.tensor(LENGTHS)[:, None]
    batch = mixer(x, mask=mask)
    return all(_equal(mixer(x[i : i + 1, :n])[0], batch[i, :n]) for i, n in enumerate(LENGTHS))


def _rank_of_the_past(mixer: nn.Module, x: Tensor) -> int:
    def last(before: Tensor) -> Tensor:
        return mixer(torch.cat([x[:, :5], before[None, None], x[:, 6:7]], 1))[0, -1]

    with torch.enable_grad():
        jacobian = torch.autograd.functional.jacobian(last, x[0, 5])
    return int(torch.linalg.matrix_rank(jacobian, rtol=1e-7))
