"""Make a language model that you already have linear in the length of its text, and constant in memory, by Lizard's way.

    >>> from regard.linearize import Imitation, NextToken, add_low_rank, convert
    >>> student = convert(teacher)                                       # a LlamaForCausalLM, or a model of this library
    >>> train(student, Imitation(task, teacher), TrainConfig(lr=1e-3))   # stage 1: say what softmax attention said
    >>> add_low_rank(student)                                            # stage 2: they and low-rank updates of q, k and v
    >>> train(NextToken(student), task, TrainConfig(lr=5e-4))            # ... learn to predict text
    >>> student.generate(prompt)                                         # Hugging Face's own, on a cache that does not grow

Nothing is written over: the student shares the teacher's weights, which are frozen, and owns what is new. See
`regard.systems.sequence.lizard` for the mechanism.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, Metric

from regard import checks
from regard.checkpoint import read_state_dict
from regard.layers.rotary_attention import RotaryAttention
from regard.systems.sequence.lizard import LizardAttention, LizardCore, LizardState, keeps_softmax
from regard.tasks.base import Task

M = TypeVar("M", bound=nn.Module)

_HUGGING_FACE = ("q_proj", "k_proj", "v_proj", "o_proj")
_OURS = ("q", "k", "v", "proj")
_WEIGHTS, _SETTINGS = "lizard.safetensors", "lizard.json"


class ConvertedAttention(nn.Module):
    """What stands in the place of an attention of Hugging Face's LLaMA, Mistral or Qwen: its projections around `LizardCore`.

    Args:
        attention: with q_proj, k_proj, v_proj and o_proj, which are used on, and q_norm and k_norm where it has them.
        core: on q, k and v of its widths.
    """

    def __init__(self, attention: nn.Module, core: LizardCore) -> None:
        super().__init__()
        for name in (*_HUGGING_FACE, "q_norm", "k_norm"):
            if hasattr(attention, name):
                setattr(self, name, getattr(attention, name))
        index: Any = attention.layer_idx
        self.core, self.layer_idx = core, index

    def heads(self, x: Tensor, state: LizardState | None = None) -> tuple[Tensor, LizardState]:
        """What attention gives before its output projection, `(B, N, heads, head_dim)`, and the state after the last token."""
        q, k, v = (part(x).unflatten(-1, (-1, self.core.head_dim)) for part in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        return self.core(x, q, k, v, state)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: object = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """As the layers of Hugging Face's models call it; places are not used, and the mask for a check only."""
        count = hidden_states.shape[1]
        if attention_mask is not None and not _shows_first(attention_mask, count):
            raise ValueError(
                "attention_mask hides the first tokens, but padding on the left would enter the memory: pad on the right, "
                "or pass texts of one length."
            )
        layer = None if past_key_values is None else _layer_of(past_key_values, self.layer_idx)
        heads, state = self.heads(hidden_states, None if layer is None else layer.state)
        if layer is not None:
            layer.keep(state, count)
        return self.o_proj(heads.flatten(-2)), None


def _shows_first(mask: Tensor, count: int) -> bool:
    """Whether the first of `count` new tokens sees itself, by a mask of any kind that transformers makes."""
    if mask.dim() == 2:  # 1 for tokens, 0 for padding
        return bool(mask[:, -count].all())
    first = mask[:, 0, 0, -count]  # True, or 0 to be added to scores, where a key is seen
    return bool((first if mask.dtype == torch.bool else first == 0).all())


def _layer_of(cache: Any, index: int) -> Any:
    """The state of layer `index` in a cache of transformers, which is given a layer of our kind there at the first call."""
    kind = _cache_layer()
    while len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    if not isinstance(cache.layers[index], kind):
        cache.layers[index] = kind()
    return cache.layers[index]


@lru_cache(maxsize=1)
def _cache_layer() -> Any:
    from transformers.cache_utils import CacheLayerMixin

    class LizardCacheLayer(CacheLayerMixin):
        """One layer's `LizardState`, and how many tokens went by (positions and masks of other layers depend on it)."""

        is_sliding = False

        def __init__(self) -> None:
            super().__init__()
            self.state: LizardState | None = None
            self.seen = 0

        def keep(self, state: LizardState, count: int) -> None:
            """The state after `count` more tokens."""
            self.state, self.seen, self.is_initialized = state, self.seen + count, True

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            """Nothing: the first tokens make the state."""

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            raise ValueError("this layer was converted: it keeps a state, not all keys and values.")

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.seen + query_length, 0

        def get_seq_length(self) -> int:
            return self.seen

        def get_max_length(self) -> int:
            return -1

        def reset(self) -> None:
            self.state, self.seen, self.is_initialized = None, 0, False

        def reorder_cache(self, beam_idx: Tensor) -> None:
            if self.state is not None:
                self.state = LizardState(*(part.index_select(0, beam_idx.to(part.device)) for part in self.state))

        def offload(self) -> None:
            """Nothing: the state is small."""

        prefetch = offload

    return LizardCacheLayer


def attention_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The softmax attentions of a model that can be converted, by name and in order: ours, and those of Hugging Face."""
    return {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, RotaryAttention) and not isinstance(module, LizardAttention))
        or (
            not isinstance(module, ConvertedAttention)
            and hasattr(module, "layer_idx")
            and all(isinstance(getattr(module, part, None), nn.Linear) for part in _HUGGING_FACE)
        )
    }


def converted_layers(model: nn.Module) -> dict[str, Any]:
    """The attentions of a converted model that are Lizard's, by name and in order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (LizardAttention, ConvertedAttention))
    }


def convert(model: M, *, softmax_share: float | Sequence[bool] = 0.0, **core: Any) -> M:
    """A copy of a language model with Lizard's attention, which shares all weights that `model` has.

    These are frozen, in `model` too; what is new is to be learned (stage 1, `Imitation`).

    Args:
        model: `LlamaForCausalLM`, or another of Hugging Face's with q_proj, k_proj, v_proj and o_proj (Mistral, Qwen); or a
            `DecoderLM` with `RotaryAttention`.
        softmax_share: of the layers that keep softmax, spread evenly (the paper's hybrid: 0.5), or one boolean for each.
        core: arguments of `LizardCore`: window_size, meta, feature_dim, gate, gate_start.

    Raises:
        ValueError: for a model without attention of either kind.
    """
    names = list(attention_layers(model))
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no attention to convert: expected modules with q_proj, k_proj, v_proj and o_proj as "
            "in transformers' LlamaForCausalLM, or RotaryAttention in a model of this library."
        )
    keep = keeps_softmax(len(names), softmax_share) if isinstance(softmax_share, (int, float)) else list(softmax_share)
    if len(keep) != len(names):
        raise ValueError(f"softmax_share must hold one boolean for each of {len(names)} layers, got {len(keep)}.")
    model.requires_grad_(False)
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    student = copy.deepcopy(model, shared)
    for name, kept in zip(names, keep, strict=True):
        if not kept:
            student.set_submodule(name, _converted(student.get_submodule(name), core))
    student.lizard = {"softmax_share": keep, **core}  # type: ignore[assignment]
    return student


def _converted(attention: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    if isinstance(attention, RotaryAttention):
        weight = attention.q.weight
        size: dict[str, Any] = {"kv_heads": attention.kv_heads, "head_dim": attention.head_dim}
        ours = LizardAttention(attention.dim, attention.num_heads, **size, **options).to(weight)
        for name in _OURS:
            setattr(ours, name, getattr(attention, name))
        return ours
    q: Any = attention.q_proj
    head_dim: Any = attention.head_dim
    kv_heads = attention.k_proj.out_features // head_dim  # type: ignore[union-attr, operator]
    scale: Any = getattr(attention, "scaling", None)
    core = LizardCore(q.in_features, q.out_features // head_dim, kv_heads, head_dim, scale=scale, **options)
    return ConvertedAttention(attention, core.to(q.weight))


def _projections(attention: nn.Module) -> tuple[str, ...]:
    return _OURS if isinstance(attention, RotaryAttention) else _HUGGING_FACE


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Tokens `(B, N)` -> logits `(B, N, vocabulary)`, of Hugging Face's models and ours."""
    if hasattr(model, "config") and hasattr(model.config, "use_cache"):
        return model(tokens, use_cache=False).logits
    return model(tokens)


class NextToken(nn.Module):
    """A language model of Hugging Face as the tasks take one: tokens in, logits out. (Ours pass through.)"""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """`(B, N)` int64 -> `(B, N, vocabulary)`."""
        return logits_of(self.model, tokens)


@contextmanager
def _listening(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """While open, a pass of `model` fills, for each attention, its input and its output before the output projection."""
    heard: dict[str, Any] = {name: [None, None] for name in names}

    def note(into: list[Any], place: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            into[place] = args[0]

        return hook

    handles = []
    for name in names:
        attention = model.get_submodule(name)
        for place, part in ((0, _projections(attention)[0]), (1, _projections(attention)[3])):
            handles.append(getattr(attention, part).register_forward_pre_hook(note(heard[name], place)))
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def teacher_signals(teacher: nn.Module, tokens: Tensor, names: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """For each attention named: its input `(B, N, dim)` and what it gives to its output projection, without gradients."""
    with torch.no_grad(), _listening(teacher, names) as heard:
        logits_of(teacher, tokens)
    return heard


class Imitation(Task):
    """Stage 1: each converted attention, fed what the teacher's is fed, is to give what the teacher's gives.

    The loss is the mean squared error before the output projection, summed over layers; so is the metric.

    Args:
        task: whose batches hold "tokens", such as "text". teacher: the model that `convert` was given.
    """

    name = "imitation"
    metric = "error"
    higher_is_better = False

    def __init__(self, task: Task, teacher: nn.Module) -> None:
        self.task, self.teacher = task, teacher.eval()
        self.train_set, self.eval_set, self.collate = task.train_set, task.eval_set, task.collate

    @property
    def description(self) -> str:
        return f"What the attentions of {type(self.teacher).__name__} give, from what they are fed. {self.task.description}"

    @property
    def trivial_answer(self) -> str:
        return "zeros"

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return torch.stack(list(self.errors(model, batch["tokens"][:, :-1]).values())).sum()

    def errors(self, student: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
        """The mean squared error of each converted attention, by name."""
        layers = converted_layers(student)
        signals = teacher_signals(self.teacher.to(tokens.device), tokens, list(layers))
        return {name: F.mse_loss(layers[name].heads(x)[0].flatten(-2), wanted) for name, (x, wanted) in signals.items()}

    def metrics(self) -> dict[str, Metric]:
        return {"error": MeanMetric()}

    def update(self, metrics: Mapping[str, Metric], model: nn.Module, batch: dict[str, Tensor]) -> None:
        metrics["error"].update(self.loss(model, batch), weight=len(batch["tokens"]))

    def trivial(self) -> dict[str, float]:
        error, names = MeanMetric(), list(attention_layers(self.teacher))
        for batch in DataLoader(self.eval_set, batch_size=64, collate_fn=self.collate):
            signals = teacher_signals(self.teacher, batch["tokens"][:, :-1], names).values()
            error.update(sum(wanted.square().mean() for _, wanted in signals), weight=len(batch["tokens"]))
        return {"error": float(error.compute())}


class LowRank(nn.Module):
    r"""A frozen linear layer and a low-rank update: $W x + \frac{\alpha}{r} B A x$, B zero at first (LoRA, Hu et al., 2021)."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        checks.positive("rank", rank)
        self.linear, self.factor = linear.requires_grad_(False), alpha / rank
        at: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.lora_down = nn.Parameter(torch.empty(rank, linear.in_features, **at))
        self.lora_up = nn.Parameter(torch.zeros(linear.out_features, rank, **at))
        nn.init.kaiming_uniform_(self.lora_down, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in_features)` -> `(..., out_features)`."""
        return self.linear(x) + self.factor * F.linear(F.linear(x, self.lora_down), self.lora_up)

    def merged(self) -> nn.Linear:
        """One linear layer that does the same; the frozen one is left as it is."""
        linear = copy.deepcopy(self.linear)
        linear.weight.data += self.factor * self.lora_up.detach() @ self.lora_down.detach()
        return linear


def add_low_rank(student: M, rank: int = 8, alpha: float = 16.0, *, freeze_new: bool = False) -> M:
    """Stage 2: q, k and v of the converted layers get low-rank updates, which are trained together with what is new.

    (Section 3.2 of the paper fine-tunes "the entire model", by low-rank updates of q, k and v: a reading, which leaves the
    teacher's weights alone. `freeze_new` trains the updates only, as LoLCATs does.)
    """
    student.requires_grad_(False)
    for layer in converted_layers(student).values():
        layer.core.requires_grad_(not freeze_new)
        for name in _projections(layer)[:3]:
            setattr(layer, name, LowRank(getattr(layer, name), rank, alpha))
    student.lizard |= {"rank": rank, "alpha": alpha}  # type: ignore[operator]
    return student


def merge_low_rank(student: M) -> M:
    """Low-rank updates become part of q, k and v, which the student then owns; the teacher stays as it is."""
    for name, module in list(student.named_modules()):
        if isinstance(module, LowRank):
            student.set_submodule(name, module.merged())
    student.lizard |= {"merged": True}  # type: ignore[operator]
    return student


def save_converted(student: nn.Module, folder: str | Path) -> None:
    """Write what is new in a converted model, not the teacher's weights, into a folder.

    Raises:
        ValueError: once low-rank updates are merged, when what is new cannot be told apart.
    """
    settings: dict[str, Any] = student.lizard  # type: ignore[assignment]
    if settings.get("merged"):
        raise ValueError(
            "low-rank updates are merged: save_converted before merge_low_rank, or save the whole state_dict()."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(_new(student), str(folder / _WEIGHTS))
    (folder / _SETTINGS).write_text(json.dumps(settings, indent=1))


def _new(student: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in student.state_dict().items() if ".core." in name or ".lora_" in name}


def load_converted(model: M, folder: str | Path) -> M:
    """The converted model that `save_converted` wrote, from the model that was converted.

    Raises:
        ValueError: if what was written does not fit `model`.
    """
    settings = json.loads((Path(folder) / _SETTINGS).read_text())
    rank, alpha = settings.pop("rank", None), settings.pop("alpha", None)
    student = convert(model, **settings)
    if rank is not None:
        add_low_rank(student, rank, alpha)
    saved, new = read_state_dict(Path(folder) / _WEIGHTS), _new(student)
    odd = sorted(
        {key for key in saved.keys() | new.keys() if key not in saved or key not in new}
        or {key for key in new if saved[key].shape != new[key].shape}
    )
    if odd:
        raise ValueError(f"what {folder} holds does not fit this {type(model).__name__}: {odd[:5]} differ.")
    student.load_state_dict(saved, strict=False)
    return student
