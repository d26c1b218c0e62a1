"""The template P(X) = M(X) X H, found in running mixers: which matrices mix the tokens, and what they are like.

Written out for all that the library has, a term for each head (or channel, or part):

    P(X) = sum_t M_t(X) X H_t + constant,   as one array T(X)[i, a, j, b] = sum_t M_t[i, j] H_t[a, b]
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

EXACT = 1e-9  # of the largest value: what counts as nothing in float64, transforms included

Place = tuple[str, int]
"""A module without children, by name, and which of its calls; ("", 0) is the input of the mixer."""
_INPUT: Place = ("", 0)


@dataclass(frozen=True)
class Mixing:
    """A mixer at one input, as an operator that is linear in a chosen path from the input to the output.

    Attributes:
        operator: T, `(L, dim, L, dim)`: output token and channel, input token and channel.
        bias: `(L, dim)`, what is added by biases within the path. outside: `(L, dim)`, the output where the path is zero.
        static: T does not depend on the input, because the whole mixer is linear (up to a constant).
        path: names of the modules that make up the path; "input" where the input itself takes part.
        error: largest difference between T X + bias + outside and the mixer's output, over the largest output.
        outside_moves: how much `outside` changes with the input, over how much the output does. Above zero, the mixer does
            more than the template says.
    """

    operator: Tensor
    bias: Tensor
    outside: Tensor
    static: bool
    path: tuple[str, ...]
    error: float
    outside_moves: float

    @property
    def fits(self) -> bool:
        """Whether P(X) = sum_t M_t X H_t + constant holds, and (unless the mixer is the identity or the like) by mixing."""
        return self.error <= 1e-6 and self.outside_moves <= 1e-6 and (self.static or self.mixes > EXACT)

    @cached_property
    def _terms(self) -> tuple[Tensor, Tensor, Tensor]:
        # The best Kronecker factors are the singular vectors of T with its axes regrouped (Van Loan and Pitsianis, 1993).
        length, dim = self.operator.shape[:2]
        return torch.linalg.svd(self.operator.transpose(1, 2).reshape(length**2, dim**2), full_matrices=False)

    @property
    def terms(self) -> int:
        """How many terms the template needs: one for each head, as a rule."""
        return int((self._terms[1] > EXACT * self._terms[1][0]).sum())

    @property
    def matrices(self) -> Tensor:
        """M, `(terms, L, L)`, largest first; where rows of M have a mean sum, it is one. Single terms are unique up to sign."""
        length = self.operator.shape[0]
        found = self._terms[0][:, : self.terms].t().reshape(-1, length, length)
        return found / self._sizes(found)

    @property
    def maps(self) -> Tensor:
        """H, `(terms, dim, dim)`, output channel first: T = sum_t M_t (x) H_t."""
        u, s, v = self._terms
        length, dim = self.operator.shape[:2]
        found = (s[:, None] * v)[: self.terms].reshape(-1, dim, dim)
        return found * self._sizes(u[:, : self.terms].t().reshape(-1, length, length))

    @staticmethod
    def _sizes(matrices: Tensor) -> Tensor:
        sums = matrices.sum(-1).mean(-1)
        norms = matrices.flatten(1).norm(dim=1)
        return torch.where(sums.abs() > 1e-3 * norms, sums, norms)[:, None, None]

    @property
    def blocks(self) -> Tensor:
        """`(L, L)` how strongly each token's output follows each input token: the norm of its part of T."""
        return self.operator.square().sum((1, 3)).sqrt()

    @property
    def mixes(self) -> float:
        """Share of T, in squares, between different tokens: 0 mixes nothing."""
        blocks = self.blocks.square()
        return float(1 - blocks.diagonal().sum() / blocks.sum())

    @property
    def density(self) -> float:
        """Share of pairs of tokens that are connected."""
        return float((self.blocks > EXACT * self.blocks.max()).double().mean())

    @property
    def causal(self) -> bool:
        """Whether no token sees a later one."""
        return bool(self.blocks.triu(1).max() <= EXACT * self.blocks.max())

    @property
    def rank(self) -> int:
        """Rank of a random mixture of the M_t, which is the largest that a mixture has."""
        dim = self.operator.shape[1]
        left, right = torch.randn(2, dim, dtype=self.operator.dtype, generator=torch.Generator().manual_seed(0))
        return int(torch.linalg.matrix_rank(torch.einsum("iajb,a,b->ij", self.operator, left, right), rtol=EXACT))

    @property
    def equal_row_sums(self) -> bool:
        """Whether all rows of every M_t have one sum, as probabilities have (to 1e-5, the size of epsilons in denominators)."""
        sums = self.operator.sum(2)
        return bool((sums - sums[:1]).abs().max() <= 1e-5 * self.operator.abs().max())

    @property
    def toeplitz(self) -> bool:
        """Whether M_t[i, j] depends on i - j only (positions in one order)."""
        inner = self.operator[1:, :, 1:] - self.operator[:-1, :, :-1]
        return bool(inner.abs().max() <= EXACT * self.operator.abs().max())


@torch.no_grad()
def mixing_matrix(mixer: nn.Module, x: Tensor, *, seed: int = 0) -> Mixing:
    r"""The matrices that mix the tokens of `x`: P(X) = sum_t M_t(X) X H_t + constant.

    A mixer that is linear (up to a constant) is fed basis vectors. Another one is taken apart: the outputs of its modules
    that are linear in the input (projections, convolutions; and the input itself) are the coordinates of a function
    that is known by running it. A path is a set of their channels in which the function is linear while all the others stay
    as they are, such as the values of attention with queries and keys held. Of the paths that leave nothing outside
    which depends on the input, the one that mixes tokens most is taken. What is linear is found by finite differences with
    random steps, in float64, and then holds for all inputs with probability one (up to kinks that no step crossed).

    Args:
        mixer: maps `(B, *S, dim)` to that shape, each sample for itself; it is copied, and run in evaluation mode.
        x: one grid, `(*S, dim)`; its tokens are counted row by row.
        seed: of the random steps.

    Returns:
        What was found. `fits` says whether the template describes the mixer; if not, `error` is infinite where there is no
        linear path at all, and `outside_moves` says how much is not described where there is one.

    Example:
        >>> mixing = mixing_matrix(create_mixer("softmax", 8, num_heads=1), torch.randn(16, 8))
        >>> mixing.matrices.shape, mixing.equal_row_sums
        (torch.Size([1, 16, 16]), True)
    """
    generator = torch.Generator().manual_seed(seed)
    function = _Function(copy.deepcopy(mixer).double().eval(), x.detach().double(), generator)
    basis = torch.eye(x.numel(), dtype=torch.float64).reshape(-1, *x.shape)
    if function.is_linear:
        outside = function.mixer(torch.zeros_like(basis[:1])).flatten(1, -2)[0]
        operator = _columns(function.mixer(basis).flatten(1, -2) - outside)
        return _found(function, operator, torch.zeros_like(outside), outside, 0.0, ("input",))
    best: Mixing | None = None
    here, other, none = (function.coordinates(at[None]) for at in (function.x, function.elsewhere, 0 * function.x))
    nearby = function.coordinates(function.x + basis)
    zero = {place: torch.zeros_like(value) for place, value in here.items()}
    moved = (function(other)[0] - function.base).abs().max()
    for path in _paths(function, function.joint_linearity()):
        outside = function(function.with_path(path, zero, here))[0]
        moves = float((function(function.with_path(path, zero, other))[0] - outside).abs().max() / moved)
        if best is None or moves <= max(EXACT, best.outside_moves):
            operator = _columns(function(function.with_path(path, nearby, here)) - function.base)
            bias = function(function.with_path(path, none, here))[0] - outside
            names = tuple(sorted({function.groups[g][0][0] or "input" for g in path}))
            found = _found(function, operator, bias, outside, moves if moves > EXACT else 0.0, names)
            if best is None or (found.outside_moves, -found.mixes) < (best.outside_moves, -best.mixes):
                best = found
    if best is None:
        nothing = function.base.new_zeros(*function.base.shape, *function.base.shape)
        best = Mixing(nothing, torch.zeros_like(function.base), function.base, False, (), math.inf, 1.0)
    return best


def _columns(out: Tensor) -> Tensor:
    """Outputs `(L dim, L, dim)` for basis vectors -> T."""
    return out.unflatten(0, out.shape[1:]).permute(2, 3, 0, 1)


def _found(
    function: _Function, operator: Tensor, bias: Tensor, outside: Tensor, moves: float, path: tuple[str, ...]
) -> Mixing:
    again = torch.einsum("iajb,jb->ia", operator, function.x.flatten(0, -2)) + bias + outside
    error = float((again - function.base).abs().max() / function.base.abs().max())
    return Mixing(operator, bias, outside, function.is_linear, path, error, moves)


class _Function:
    """A mixer near `x` as a function of its coordinates: what its modules that are linear in the input give.

    Coordinates are kept as `(batch, numbers)` for each place. A group is one channel (last axis) of one place.
    """

    def __init__(self, mixer: nn.Module, x: Tensor, generator: torch.Generator) -> None:
        self.mixer, self.x = mixer, x
        self._names = {m: name for name, m in mixer.named_modules() if name and not any(True for _ in m.children())}
        steps = 2 * torch.randn(3, *x.shape, dtype=x.dtype, generator=generator)
        self.elsewhere = x + steps[2]
        out, seen = self._run(torch.stack([x, x + steps[0], x + steps[1], x + steps[0] + steps[1]]))
        self.base = out[0]
        self.is_linear = _bends(out) <= EXACT * float(out.abs().max())
        self.channels: dict[Place, int] = {}
        for place, value in seen.items():
            if value.shape[0] % 4 == 0:
                rows = value.reshape(4, -1)
                limit = EXACT * float(rows.abs().max())
                if _bends(rows) <= limit < float((rows[1] - rows[0]).abs().max()):
                    self.channels[place] = value.shape[-1]
        self.groups = [(place, channel) for place, count in self.channels.items() for channel in range(count)]
        self._origin = self.coordinates(x[None])
        self._draws = [
            {p: 2 * torch.randn(v.shape, dtype=x.dtype, generator=generator) for p, v in self._origin.items()}
            for _ in range(2)
        ]

    def _run(self, x: Tensor, instead: Mapping[Place, Tensor] | None = None) -> tuple[Tensor, dict[Place, Tensor]]:
        """Output `(batch, L, dim)` and what every place gave; where `instead` has something, that is what it gives."""
        calls: dict[str, int] = {}
        seen: dict[Place, Tensor] = {_INPUT: x}

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            name = self._names[module]
            calls[name] = calls.get(name, -1) + 1
            place = (name, calls[name])
            if instead is not None and place in instead:
                return instead[place].reshape(output.shape)
            if isinstance(output, Tensor) and output.is_floating_point() and output.dim() >= 2:
                seen[place] = output
            return None

        handles = [module.register_forward_hook(hook) for module in self._names]
        try:
            return self.mixer(x).flatten(1, -2), seen
        finally:
            for handle in handles:
                handle.remove()

    def coordinates(self, x: Tensor) -> dict[Place, Tensor]:
        """Those of a batch of inputs."""
        seen = self._run(x)[1]
        return {place: seen[place].reshape(len(x), -1) for place in self.channels}

    def __call__(self, at: Mapping[Place, Tensor]) -> Tensor:
        """Outputs `(batch, L, dim)` at coordinates; a batch of one stands for as many as the others have."""
        count = max(len(value) for value in at.values())
        outs = []
        for start in range(0, count, 1024):
            stop = min(start + 1024, count)
            part = {p: v.expand(count, -1)[start:stop] for p, v in at.items()}
            outs.append(self._run(part[_INPUT].reshape(-1, *self.x.shape), part)[0])
        return torch.cat(outs)

    def _spread(self, groups: Tensor, place: Place) -> Tensor:
        """Which numbers of a place belong to the groups: `(..., groups)` of ones and zeros -> `(..., numbers)`."""
        first = self.groups.index((place, 0))
        channels = groups[..., first : first + self.channels[place]]
        return channels.repeat(*[1] * (groups.dim() - 1), self._origin[place].shape[1] // self.channels[place])

    def with_path(
        self, path: frozenset[int], inside: Mapping[Place, Tensor], rest: Mapping[Place, Tensor]
    ) -> dict[Place, Tensor]:
        """Coordinates `inside` in the groups of the path, and `rest` in all others."""
        chosen = torch.zeros(len(self.groups), dtype=self.x.dtype)
        chosen[list(path)] = 1
        masks = {place: self._spread(chosen, place) for place in self.channels}
        return {p: torch.where(mask > 0, inside[p], rest[p]) for p, mask in masks.items()}

    def _after(self, first: Tensor, second: Tensor) -> Tensor:
        """Outputs after one random step in the groups `first`, and another in `second`: `(batch, groups)` of 0 and 1."""
        one, two = self._draws
        return self(
            {p: v + self._spread(first, p) * one[p] + self._spread(second, p) * two[p] for p, v in self._origin.items()}
        )

    def joint_linearity(self) -> Tensor:
        """`(groups, groups)` whether the output is linear in two groups jointly; on the diagonal, in one, and not constant."""
        single = torch.eye(len(self.groups), dtype=self.x.dtype)
        still = torch.zeros_like(single)
        one, two, both = self._after(single, still), self._after(still, single), self._after(single, single)
        alone = self._is_zero(self.base - one - two + both) & ~self._is_zero(one - self.base)
        joint = torch.diag(alone)
        usable = alone.nonzero()[:, 0]
        g, h = (usable[index] for index in torch.triu_indices(len(usable), len(usable), 1))
        if len(g):
            pair = self._after(single[g] + single[h], still[g])
            joint[g, h] = joint[h, g] = self._is_zero(self.base - one[g] - one[h] + pair)
        return joint

    def _is_zero(self, difference: Tensor) -> Tensor:
        return difference.flatten(1).abs().amax(1) <= EXACT * self.base.abs().max()


def _bends(values: Tensor) -> float:
    """How far a function is from linear, at x, x + a, x + b and x + a + b."""
    return float((values[0] - values[1] - values[2] + values[3]).abs().max())


def _paths(function: _Function, joint: Tensor) -> list[frozenset[int]]:
    """Largest sets of groups in which the output is jointly linear, grown from parts of what every module gives."""
    usable = joint.diagonal().nonzero()[:, 0].tolist()
    seeds = []
    for place in reversed(list(function.channels)):
        own = [g for g in usable if function.groups[g][0] == place]
        for parts in (1, 2, 3, 4):
            size = max(1, -(-function.channels[place] // parts))
            cuts = [[g for g in own if function.groups[g][1] // size == part] for part in reversed(range(parts))]
            seeds += [cut for cut in cuts if cut]
    found: dict[frozenset[int], None] = {}
    for seed in seeds:
        chosen: list[int] = []
        for g in [*seed, *reversed(usable)]:
            if g not in chosen and bool(joint[g, chosen].all()):
                chosen.append(g)
        found[frozenset(chosen)] = None
    return list(found)
