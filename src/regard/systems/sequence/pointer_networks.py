"""Pointer Networks (Vinyals, Fortunato and Jaitly, 2015, arXiv 1506.03134).

An encoder LSTM reads points, a decoder LSTM answers by pointing at them: the attention over the encoder's states is not
used to mix them but is itself the distribution over answers, so the output vocabulary is as large as the input.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from regard import checks
from regard.checkpoint import KeyMap
from regard.registry import System, Variant, register_system
from regard.skeletons.encoder_decoder import EncoderDecoder


class PointerAttention(nn.Module):
    r"""Scores of keys for a query (eq. 3): $u_{ij} = v^\top \tanh(W_1 e_j + W_2 d_i)$; their softmax over j points.

    Works for any number of keys with the same parameters, and permuting keys permutes the scores.

    Args:
        dim: channels of keys, queries and v. bias: add biases to both projections (not in the paper).
    """

    def __init__(self, dim: int, *, bias: bool = False) -> None:
        super().__init__()
        checks.positive("dim", dim)
        self.key = nn.Linear(dim, dim, bias=bias)
        self.query = nn.Linear(dim, dim, bias=bias)
        self.score = nn.Parameter(torch.empty(dim).uniform_(-(dim**-0.5), dim**-0.5))

    def forward(self, query: Tensor, keys: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Queries `(B, M, dim)` and keys `(B, K, dim)` -> scores `(B, M, K)`; one query `(B, dim)` -> `(B, K)`.

        Args:
            allowed: `(B, K)`, False for keys that cannot be pointed at; their score is -inf.
        """
        if keys.dim() != 3 or query.dim() not in (2, 3):
            raise ValueError(
                f"query must be (batch, [steps,] dim) and keys (batch, keys, dim), got {tuple(query.shape)} and "
                f"{tuple(keys.shape)}."
            )
        return self.scores(query, self.key(keys), allowed)

    def scores(self, query: Tensor, projected: Tensor, allowed: Tensor | None = None) -> Tensor:
        """`forward` with the keys projected already (`self.key(keys)`): what a decoder needs to do only once."""
        steps = query if query.dim() == 3 else query[:, None]
        out = torch.tanh(projected[:, None] + self.query(steps)[:, :, None]) @ self.score  # (B, M, K)
        if allowed is not None:
            out = out.masked_fill(~allowed[:, None], -torch.inf)
        return out if query.dim() == 3 else out.squeeze(1)


class Memory(NamedTuple):
    """What the decoders read. Position 0 of each is the end of the answer; position i + 1 is point i.

    Attributes:
        fed: `(B, 1 + N, *)`, the decoder's next input after each symbol (at 0: the start vector).
        keys: `(B, 1 + N, H)` encoder states. projected: the same, under the attention's key projection.
        valid: `(B, 1 + N)`, False for padding.
    """

    fed: Tensor
    keys: Tensor
    projected: Tensor
    valid: Tensor


def only_tours(symbols: Tensor, memory: Memory) -> Tensor:
    """What may follow `symbols` (R, t) in a tour: points not visited yet, or the end after the last of them."""
    unvisited = memory.valid.scatter(1, symbols, False)
    unvisited[:, 0] = ~unvisited[:, 1:].any(1)
    return unvisited


def read_sequence(lstm: nn.LSTM, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """States `(B, N, H)` (zero past `lengths`) and the last (h, c), `(layers x directions, B, H)`, of ragged sequences."""
    packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
    states, (h, c) = lstm(packed)
    return pad_packed_sequence(states, batch_first=True, total_length=x.shape[1])[0], h, c


class PointingModel(EncoderDecoder):
    """Points `(B, N, input_dim)` in, symbols out: 0 ends the answer, i + 1 is point i. What all models here share."""

    input_dim: int

    def decode(
        self,
        points: Tensor,
        lengths: Tensor | None = None,
        max_length: int | None = None,
        beam: int = 1,
        tour: bool = False,
    ) -> Tensor:
        """The most probable answer: symbols `(B, M)`, read up to the first 0.

        Args:
            lengths: `(B,)` real points; None for all. max_length: most symbols, 1 + N by default.
            beam: width of the search; 1 is greedy.
            tour: allow only answers that visit every point once.
        """
        longest = points.shape[1] + 1
        if tour and max_length is not None and max_length < longest:
            raise ValueError(f"a tour of {longest - 1} points and its end take max_length={longest}, got {max_length}.")
        answers, _ = self.search(
            points, lengths, max_length=max_length or longest, beam=beam, allow=only_tours if tour else None
        )
        return answers[:, 0]

    def check_points(self, points: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Check the input at the door; lengths, and `(B, 1 + N)`: True for the end and for real points."""
        if points.dim() != 3 or points.shape[1] == 0 or points.shape[2] != self.input_dim:
            raise ValueError(
                f"points must be (batch, points, {self.input_dim}) with at least one point, got {tuple(points.shape)}."
            )
        count = points.shape[1]
        if lengths is None:
            lengths = torch.full((len(points),), count, device=points.device)
        elif lengths.shape != (len(points),):
            raise ValueError(
                f"lengths must be one number for each of {len(points)} inputs, got {tuple(lengths.shape)}."
            )
        return lengths, torch.arange(count + 1, device=points.device) <= lengths[:, None]


class PointerNetwork(PointingModel):
    """LSTM encoder, LSTM decoder, `PointerAttention` as the output (section 2.3). The next input is the point chosen last.

    The encoder's last state starts the decoder. The end of the answer is one more key, learned.

    Args:
        hidden: units of both LSTMs. num_layers: of both. input_dim: coordinates of a point.
        feed: the decoder's next input: "point", the point itself (the paper); "state", the encoder's state there without
            gradient, where the start vector also is the end's key (the TensorFlow port).
        init_range: all weights start uniform in ± this.
    """

    def __init__(
        self,
        hidden: int = 256,
        num_layers: int = 1,
        input_dim: int = 2,
        feed: Literal["point", "state"] = "point",
        init_range: float = 0.08,
    ) -> None:
        super().__init__()
        self.hidden, self.input_dim = hidden, input_dim
        self.feed = checks.one_of("feed", feed, ("point", "state"))
        width = input_dim if feed == "point" else hidden
        self.encoder = nn.LSTM(input_dim, hidden, num_layers, batch_first=True)
        self.decoder = nn.LSTM(width, hidden, num_layers, batch_first=True)
        self.attend = PointerAttention(hidden)
        self.start = nn.Parameter(torch.empty(width))
        self.end = nn.Parameter(torch.empty(hidden)) if feed == "point" else None
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -init_range, init_range)

    def encode(self, inputs: Tensor, lengths: Tensor | None) -> tuple[Memory, tuple[Tensor, Tensor]]:
        """The points' states, and (h, c) of the decoder, each `(B, layers, H)`."""
        lengths, valid = self.check_points(inputs, lengths)
        states, h, c = read_sequence(self.encoder, inputs, lengths)
        keys = _first(self.start if self.end is None else self.end, states)
        fed = _first(self.start, inputs if self.feed == "point" else states.detach())
        return Memory(fed, keys, self.attend.key(keys), valid), (h.transpose(0, 1), c.transpose(0, 1))

    def forward(self, inputs: Tensor, lengths: Tensor | None, targets: Tensor) -> Tensor:
        """Teacher forcing, all steps at once: points `(B, N, input_dim)`, targets `(B, M)` -> logits `(B, M, 1 + N)`."""
        memory, (h, c) = self.encode(inputs, lengths)
        said = _gather(memory.fed, self.shifted(targets))
        out, _ = self.decoder(said, (h.transpose(0, 1).contiguous(), c.transpose(0, 1).contiguous()))
        return self.attend.scores(out, memory.projected, memory.valid)

    def advance(
        self, symbols: Tensor, memory: Memory, state: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One step: symbols `(B,)` -> scores of the end and of all points `(B, 1 + N)`."""
        out, state = _one_step(self.decoder, _gather(memory.fed, symbols[:, None]), state)
        return self.attend.scores(out, memory.projected, memory.valid), state


class Seq2Seq(PointingModel):
    """The paper's baselines (sections 2.1 and 2.2): LSTM to LSTM with a dictionary of `max_points` fixed positions.

    With `attention`, the decoder also reads $d'_i = \\sum_j a_{ij} e_j$ (Bahdanau et al., 2015): prediction and next step
    get [d_i, d'_i]. More points than `max_points` cannot be answered.
    """

    def __init__(
        self, max_points: int, hidden: int = 256, attention: bool = False, input_dim: int = 2, init_range: float = 0.08
    ) -> None:
        super().__init__()
        self.max_points, self.hidden, self.input_dim = max_points, hidden, input_dim
        self.encoder = nn.LSTM(input_dim, hidden, batch_first=True)
        self.decoder = nn.LSTM(input_dim + (hidden if attention else 0), hidden, batch_first=True)
        self.attend = PointerAttention(hidden) if attention else None
        self.start = nn.Parameter(torch.empty(input_dim))
        self.head = nn.Linear(hidden * (2 if attention else 1), 1 + max_points)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -init_range, init_range)

    def encode(self, inputs: Tensor, lengths: Tensor | None) -> tuple[Memory, tuple[Tensor, ...]]:
        """The points' states, and (h, c, d') of the decoder."""
        lengths, valid = self.check_points(inputs, lengths)
        if inputs.shape[1] > self.max_points:
            raise ValueError(
                f"this model's dictionary ends at {self.max_points} points, got {inputs.shape[1]}: a fixed dictionary "
                "cannot grow, use PointerNetwork."
            )
        states, h, c = read_sequence(self.encoder, inputs, lengths)
        projected = states if self.attend is None else self.attend.key(states)
        memory = Memory(_first(self.start, inputs), states, projected, valid)
        return memory, (h.transpose(0, 1), c.transpose(0, 1), torch.zeros_like(states[:, 0]))

    def advance(self, symbols: Tensor, memory: Memory, state: Any) -> tuple[Tensor, Any]:
        """One step: symbols `(B,)` -> logits of the end and of all points `(B, 1 + N)`."""
        x, (h, c, read) = _gather(memory.fed, symbols[:, None]), state
        if self.attend is not None:
            x = torch.cat([x, read[:, None]], -1)
        out, (h, c) = _one_step(self.decoder, x, (h, c))
        if self.attend is not None:
            weights = self.attend.scores(out, memory.projected, memory.valid[:, 1:]).softmax(-1)
            read = (weights[:, None] @ memory.keys).squeeze(1)
            out = torch.cat([out, read], -1)
        logits = self.head(out)[:, : memory.valid.shape[1]]
        return logits.masked_fill(~memory.valid, -torch.inf), (h, c, read)


class PointerNetworkPort(PointingModel):
    """The PyTorch port that many have used, which differs from the paper; loads its checkpoints.

    Points are embedded; the attention has biases; points chosen already are masked; the state carried on is
    tanh(W [sum_j a_j (W1 e_j + b1), h]). It says every point once and has no end symbol: here, the end follows the last.

    Departure: `forward` follows the targets, as everywhere here; the port always follows its own choice.

    Args:
        embed_dim: of the points. hidden: units. num_layers, bidirectional: of the encoder (each direction has half the
            units).
    """

    authors_keys = KeyMap(
        rules=[
            (r"^embedding\.", "embed."),
            (r"^encoder\.lstm\.", "encoder."),
            (r"^decoder\.input_to_hidden\.(\w+)", r"cell.\1_ih"),
            (r"^decoder\.hidden_to_hidden\.(\w+)", r"cell.\1_hh"),
            (r"^decoder\.hidden_out\.", "out."),
            (r"^decoder\.att\.", "attend."),
            (r"input_linear\.", "query."),
            (r"context_linear\.", "key."),
            (r"(^|\.)V$", r"\1score"),
            (r"^decoder_input0$", "start"),
        ],
        drop=[r"encoder\.[hc]0$", r"decoder\.(mask|runner)$", r"_inf$"],
        # Convolutions of width 1 over the points are linear layers.
        convert=lambda name, value: {name: value.squeeze(-1) if value.dim() == 3 else value},
    )
    start: Tensor

    def __init__(
        self,
        embed_dim: int = 128,
        hidden: int = 512,
        num_layers: int = 2,
        bidirectional: bool = True,
        input_dim: int = 2,
    ) -> None:
        super().__init__()
        self.input_dim, self.directions = input_dim, 1 + bidirectional
        checks.divisible("hidden", hidden, "directions", self.directions)
        self.embed = nn.Linear(input_dim, embed_dim)
        self.encoder = nn.LSTM(
            embed_dim, hidden // self.directions, num_layers, batch_first=True, bidirectional=bidirectional
        )
        self.cell = nn.LSTMCell(embed_dim, hidden)
        self.attend = PointerAttention(hidden, bias=True)
        self.out = nn.Linear(2 * hidden, hidden)
        self.register_buffer("start", torch.empty(embed_dim).uniform_(-1, 1))  # drawn once, never trained
        nn.init.uniform_(self.attend.score, -1, 1)

    def encode(self, inputs: Tensor, lengths: Tensor | None) -> tuple[Memory, tuple[Tensor, ...]]:
        """The points' states (no key for the end), and (h, c, open): `open` (B, N) is True for points not chosen yet."""
        lengths, valid = self.check_points(inputs, lengths)
        embedded = self.embed(inputs)
        states, h, c = read_sequence(self.encoder, embedded, lengths)
        h, c = (torch.cat(tuple(last[-self.directions :]), -1) for last in (h, c))
        return Memory(_first(self.start, embedded), states, self.attend.key(states), valid), (h, c, valid[:, 1:])

    def advance(self, symbols: Tensor, memory: Memory, state: Any) -> tuple[Tensor, Any]:
        """One step: symbols `(B,)` -> scores of the end and of all points `(B, 1 + N)`."""
        h, c, unvisited = state
        said = F.one_hot(symbols.clamp(min=0), memory.valid.shape[1])[:, 1:].bool()
        unvisited = unvisited & ~said
        h, c = self.cell(_gather(memory.fed, symbols[:, None]).squeeze(1), (h, c))
        left = unvisited.any(-1, keepdim=True)
        scores = self.attend.scores(h, memory.projected, unvisited | ~left)  # a softmax over nothing would be NaN
        read = (scores.softmax(-1)[:, None] @ memory.projected).squeeze(1)
        h = torch.tanh(self.out(torch.cat([read, h], -1)))
        logits = torch.cat([torch.zeros_like(scores[:, :1]), scores], -1)
        return logits.masked_fill(torch.cat([left, ~unvisited], -1), -torch.inf), (h, c, unvisited)


def _first(vector: Tensor, states: Tensor) -> Tensor:
    """A vector of the model before the states `(B, N, C)`: `(B, 1 + N, C)`."""
    return torch.cat([vector.to(states.dtype).expand(len(states), 1, -1), states], 1)


def _gather(table: Tensor, symbols: Tensor) -> Tensor:
    """Rows `(B, M, C)` of the table `(B, 1 + N, C)` for symbols `(B, M)`; START and padding give row 0."""
    index = symbols.clamp(min=0)[..., None].expand(-1, -1, table.shape[-1])
    return table.gather(1, index)


def _one_step(lstm: nn.LSTM, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One input `(B, 1, C)` of an LSTM whose (h, c) have the batch first: `(B, H)`, and the new state."""
    h, c = (part.transpose(0, 1).contiguous() for part in state)
    out, (h, c) = lstm(x, (h, c))
    return out.squeeze(1), (h.transpose(0, 1), c.transpose(0, 1))


_SHAPES = ((1, 10, 2), (1,), (1, 11))
_PORT = "trainable parameters of a third-party port (shirgur/PointerNet), counted from its code; the paper gives none"

SYSTEM = register_system(
    System(
        slug="pointer_networks",
        title="Pointer Networks",
        year=2015,
        arxiv="1506.03134",
        evidence="other_code",
        repo="shirgur/PointerNet",
        idea="The attention over the input is itself the output distribution, so answers point at inputs of any number.",
        variants=(
            Variant("pointer_network_256", PointerNetwork, inputs=_SHAPES, source="paper, no count published"),
            Variant(
                "pointer_network_512",
                PointerNetwork,
                inputs=_SHAPES,
                source="paper, no count published",
                options={"hidden": 512},
            ),
            Variant(
                "pointer_network_tf_port",
                PointerNetwork,
                inputs=_SHAPES,
                source="configuration of devsisters/pointer-network-tensorflow, no count published",
                options={"feed": "state"},
            ),
            Variant(
                "pointer_network_port_256",
                PointerNetworkPort,
                1_054_080,
                inputs=_SHAPES,
                source=_PORT,
                options={"hidden": 256, "num_layers": 1, "bidirectional": False},
            ),
            Variant(
                "pointer_network_port_512",
                PointerNetworkPort,
                3_680_640,
                inputs=_SHAPES,
                source=_PORT,
                options={"num_layers": 1, "bidirectional": False},
            ),
            Variant("pointer_network_port_bidirectional", PointerNetworkPort, 4_733_312, inputs=_SHAPES, source=_PORT),
        ),
        reports=(
            "All figures of the paper as recalled by others. Convex hull of 50 points, accuracy / area: LSTM 1.9 % / fails, "
            "with attention 38.9 % / 99.7 %, pointer network 72.6 % / 99.9 %",
            "One pointer network trained on hulls of 5 to 50 points: accuracy 92.0 % at 5, 69.6 % at 50, 50.3 % at 100, "
            "1.3 % at 500 (area 99.2 %)",
            "Tours learned from optimal ones of 5 to 20 points, length / optimum: 2.12 / 2.12 at 5, 2.87 / 2.87 at 10, "
            "3.88 / 3.83 at 20",
        ),
    )
)
