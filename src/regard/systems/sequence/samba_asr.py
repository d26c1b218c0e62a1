r"""Samba-ASR: speech recognition with state space models in attention's place (2025, arXiv 2501.02832).

A recogniser of Whisper's shape (log-mels, two convolutions, encoder, autoregressive decoder) in which Mamba blocks do all the
mixing, on both sides; what was heard reaches the text through a "Mamba-cross-connection".

This is a reconstruction from the abstract: neither code nor weights nor sizes are public, nor how the cross-connection
works. Ours are the features, the encoder that reads both ways, both cross-connections, all sizes and the decoding. (Not to be
confused with Samba, a language model of Mamba and sliding windows by others.)
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard import checks, ops
from regard.layers import ContextBlock, Conv1d, Mamba, MambaBlock, MambaState, SoftmaxAttention, sincos
from regard.registry import System, Variant, register_system
from regard.skeletons.encoder_decoder import EncoderDecoder

WINDOW, HOP = 0.025, 0.010
"""Seconds that a frame spans, and seconds between two frames."""

Cross = Literal["concat", "state"]
CROSSES = ("concat", "state")


def mel_bands(mels: int, bins: int, sample_rate: int) -> np.ndarray:
    r"""Triangular bands, evenly spaced in mels, over the bins of a spectrum: `(bins, mels)` float32.

    $$w_i(f) = \max\Big(0,\ 1 - \frac{|m(f) - m_i|}{m_1}\Big),\quad m(f) = 2595 \log_{10}\Big(1 + \frac{f}{700}\Big),\quad
      m_i = \frac{i\, m(f_s / 2)}{\mathrm{mels} + 1},\ i = 1, \ldots, \mathrm{mels}$$

    Raises:
        ValueError: if a band lies between two bins, so that it would hear nothing.
    """

    def mel(frequency: Any) -> Any:
        return 2595 * np.log10(1 + frequency / 700)

    step = mel(sample_rate / 2) / (mels + 1)
    centres = step * np.arange(1, mels + 1)
    weights = np.maximum(0, 1 - np.abs(mel(np.linspace(0, sample_rate / 2, bins))[:, None] - centres) / step)
    if not weights.any(0).all():
        raise ValueError(f"mels={mels} are too many for {bins} bins up to {sample_rate / 2:g} Hz: some would be empty.")
    return weights.astype(np.float32)


class LogMel(nn.Module):
    r"""Log energies in mel bands, 100 frames a second: $\log(10^{-6} + |\mathrm{FFT}(\mathrm{hann} \odot x)|^2 W)$.

    Each band is then shifted and scaled to mean 0 and deviation 1 over the frames of its recording, which takes away the
    loudness and the microphone.

    Args:
        mels: bands. sample_rate: samples a second.
    """

    def __init__(self, mels: int = 80, sample_rate: int = 16000) -> None:
        super().__init__()
        self.mels, self.size, self.hop = mels, round(WINDOW * sample_rate), round(HOP * sample_rate)
        self.n_fft = 1 << (self.size - 1).bit_length()
        bands = torch.from_numpy(mel_bands(mels, self.n_fft // 2 + 1, sample_rate))
        self.register_buffer("bands", bands, persistent=False)
        self.register_buffer("taper", torch.hann_window(self.size, device="cpu"), persistent=False)

    def forward(self, waveforms: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """`(B, S)`, of which the first `lengths` (B,) samples are real -> `(B, T, mels)` and real frames (B,).

        Frames lie within the recording; one shorter than a frame is filled up with zeros to one.
        """
        if lengths is not None:
            waveforms = waveforms * real_places(waveforms, lengths)
        if waveforms.shape[1] < self.size:
            waveforms = F.pad(waveforms, (0, self.size - waveforms.shape[1]))
        frames = waveforms.unfold(1, self.size, self.hop) * self.taper
        spectra = torch.view_as_real(torch.fft.rfft(frames, self.n_fft))
        energies = spectra.square().sum(-1) @ self.bands
        counts = None if lengths is None else 1 + (lengths - self.size).clamp(min=0) // self.hop
        return self.normalise((energies + 1e-6).log(), counts), counts

    @staticmethod
    def normalise(x: Tensor, lengths: Tensor | None) -> Tensor:
        """Mean 0 and deviation 1 of every band over the real frames of `(B, T, mels)`."""
        real = torch.ones_like(x[..., :1]) if lengths is None else real_places(x, lengths)[..., None].to(x.dtype)
        count = real.sum(1, keepdim=True)
        x = (x - (x * real).sum(1, keepdim=True) / count) * real
        return x / (x.square().sum(1, keepdim=True) / count + 1e-5).sqrt()


def real_places(x: Tensor, lengths: Tensor) -> Tensor:
    """`(B, N)`, True for the first `lengths` (B,) places of `x` (B, N, ...)."""
    return torch.arange(x.shape[1], device=x.device) < lengths[:, None]


class Recognizer(EncoderDecoder):
    """Sound in, symbols out: what Samba-ASR and the Transformer beside it share.

    Log-mels, two convolutions of stride 2 with GELU (25 tokens a second), an encoder and a decoder of a subclass, a table
    of symbols (row 0 is the separator between sound and text) and a linear head. Symbol 0 ends the answer.

    Args:
        vocab_size: symbols, the end included. dim: channels. mels, sample_rate: of `LogMel`.
    """

    def __init__(self, vocab_size: int, dim: int, mels: int, sample_rate: int) -> None:
        super().__init__()
        for name, number in (("vocab_size", vocab_size), ("dim", dim), ("mels", mels), ("sample_rate", sample_rate)):
            checks.positive(name, number)
        self.vocab_size, self.dim, self.mels = vocab_size, dim, mels
        self.log_mel = LogMel(mels, sample_rate)
        self.subsample = nn.ModuleList(Conv1d(width, dim, 3, stride=2, padding=1) for width in (mels, dim))
        self.embed = nn.Embedding(1 + vocab_size, dim)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size)
        nn.init.normal_(self.embed.weight, std=dim**-0.5)

    def listen(self, inputs: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Tokens of a sound, `(B, N, dim)`, and which of them are real, `(B, N)` (None: all).

        Args:
            inputs: waveforms `(B, S)`, or features `(B, T, mels)`, 100 a second.
            lengths: `(B,)` real samples, or real frames; None for all.
        """
        features = inputs.dim() == 3 and inputs.shape[-1] == self.mels
        if not (features or inputs.dim() == 2) or 0 in inputs.shape[1:] or not inputs.is_floating_point():
            raise ValueError(
                f"inputs must be waveforms (batch, samples) or features (batch, frames, {self.mels}), not empty, "
                f"floating-point, got {inputs.dtype} {tuple(inputs.shape)}."
            )
        if lengths is not None and lengths.shape != inputs.shape[:1]:
            raise ValueError(
                f"lengths must be one number for each of {len(inputs)} inputs, got {tuple(lengths.shape)}."
            )
        x, lengths = (inputs, lengths) if features else self.log_mel(inputs, lengths)
        for layer in self.subsample:
            if lengths is not None:  # what a convolution sees behind the end is zero, as without padding
                x, lengths = x * real_places(x, lengths)[..., None], (lengths + 1) // 2
            x = F.gelu(layer(x))
        mask = None if lengths is None else real_places(x, lengths)
        return self.mix_audio(x, mask), mask

    def mix_audio(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The encoder: `(B, N, dim)` -> the same shape."""
        raise NotImplementedError

    def say(self, symbols: Tensor) -> Tensor:
        """Symbols `(B, M)` -> `(B, M, dim)`; START and padding give the separator."""
        return self.embed(symbols + 1)

    def decode(self, inputs: Tensor, lengths: Tensor | None = None, max_length: int = 200, beam: int = 1) -> Tensor:
        """The most probable answer (greedy for a beam of 1): symbols `(B, M)`, read up to the first 0."""
        return self.search(inputs, lengths, max_length=max_length, beam=beam)[0][:, 0]


class StateCross(nn.Module):
    r"""A reading of the sound by a Mamba of its own, added to the text through a gate: $x + \sigma(W n(x)) \odot s$.

    s is the output of a causal `Mamba` at the last token of the sound: all that text can know of it is `dim` numbers.
    """

    def __init__(self, dim: int, d_state: int) -> None:
        super().__init__()
        self.mixer = Mamba(dim, causal=True, d_state=d_state)
        self.norm = nn.LayerNorm(dim)
        self.gate = nn.Linear(dim, dim)

    def read(self, audio: Tensor, mask: Tensor | None) -> Tensor:
        """s `(B, dim)` of tokens `(B, N, dim)`, padded at the beginning."""
        return self.mixer(audio, mask)[:, -1]

    def forward(self, x: Tensor, reading: Tensor) -> Tensor:
        """Text `(B, M, dim)` -> the same shape."""
        return x + self.gate(self.norm(x)).sigmoid() * reading[:, None]


class SambaASR(Recognizer):
    """Mamba blocks that read the sound both ways, then causal Mamba blocks that say the text: no attention anywhere.

    Two readings of the paper's cross-connection, both ours:

    * "concat": the decoder reads one sequence, [sound, separator, text]. The sound reaches the text in the blocks' states.
    * "state": the decoder reads the text alone; after each block the last output of another Mamba, over the sound, is
      added (`StateCross`).

    Either way all that is kept of a sound while text is said has a constant size (`state_size`), however long it was.

    Args:
        vocab_size: symbols; 0 ends the answer. dim: channels. encoder_depth, decoder_depth: blocks.
        cross: "concat" or "state". d_state: numbers in the state of each channel.
        mels, sample_rate: of the features. drop_rate: dropout at the end of every block.
    """

    def __init__(
        self,
        vocab_size: int = 257,
        dim: int = 192,
        encoder_depth: int = 8,
        decoder_depth: int = 8,
        cross: Cross = "concat",
        d_state: int = 16,
        mels: int = 80,
        sample_rate: int = 16000,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(vocab_size, dim, mels, sample_rate)
        self.cross = checks.one_of("cross", cross, CROSSES)
        self.encoder = nn.ModuleList(MambaBlock(dim, drop=drop_rate, d_state=d_state) for _ in range(encoder_depth))
        self.bridge = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim))
        self.decoder = nn.ModuleList(
            MambaBlock(dim, drop=drop_rate, d_state=d_state, causal=True) for _ in range(decoder_depth)
        )
        self.crosses = nn.ModuleList(StateCross(dim, d_state) for _ in range(decoder_depth if cross == "state" else 0))

    def no_weight_decay(self) -> set[str]:
        """A of every Mamba."""
        return {name for name, _ in self.named_parameters() if name.endswith("_log")}

    def state_size(self) -> int:
        """Numbers kept for one sound while its text is said."""
        return sum(block.mixer.state_size(0) for block in self.decoder) + self.dim * len(self.crosses)

    def mix_audio(self, x: Tensor, mask: Tensor | None) -> Tensor:
        for block in self.encoder:
            x = block(x, mask)
        return self.bridge(x)

    def encode(self, inputs: Tensor, lengths: Tensor | None) -> tuple[tuple[Tensor, ...], tuple[MambaState, ...]]:
        """The readings of the sound ("state"), and the state of every block of the decoder before the separator."""
        audio, mask = self.listen(inputs, lengths)
        if mask is not None:
            audio, mask = align_right(audio, mask)
        if self.cross == "state":
            readings = tuple(cross.read(audio, mask) for cross in self.crosses)
            return readings, tuple(block.mixer.empty_state(audio) for block in self.decoder)
        states = []
        for block in self.decoder:
            audio, state = block.prefill(audio, None, mask)
            states.append(state)
        return (), tuple(states)

    def forward(self, inputs: Tensor, lengths: Tensor | None, targets: Tensor) -> Tensor:
        """Teacher forcing, all steps at once: logits `(B, M, vocab_size)`; targets `(B, M)`, padded with -1."""
        memory, state = self.encode(inputs, lengths)
        return self._text(self.say(self.shifted(targets)), memory, state)[0]

    def advance(
        self, symbols: Tensor, memory: tuple[Tensor, ...], state: tuple[MambaState, ...]
    ) -> tuple[Tensor, tuple[MambaState, ...]]:
        """One step: symbols `(B,)` -> logits `(B, vocab_size)` and the new states."""
        logits, state = self._text(self.say(symbols[:, None]), memory, state)
        return logits.squeeze(1), state

    def _text(self, x: Tensor, memory: tuple[Tensor, ...], state: tuple[MambaState, ...]) -> tuple[Tensor, Any]:
        states = []
        for index, (block, before) in enumerate(zip(self.decoder, state, strict=True)):
            x, after = block.prefill(x, before)
            if self.crosses:
                x = self.crosses[index](x, memory[index])
            states.append(after)
        return self.head(self.norm(x)), tuple(states)


def align_right(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move padding from the end of `(B, N, dim)` to its beginning, and the mask with it: text then follows the sound."""
    place = torch.arange(x.shape[1], device=x.device) - (~mask).sum(1, keepdim=True)
    return x.gather(1, place.clamp(min=0)[..., None].expand_as(x)), place >= 0


class MaskedAttention(SoftmaxAttention):
    """Softmax attention to x, or to a context, whose padding is left out."""

    def forward(self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """`(B, M, dim)` -> the same shape; mask `(B, N)` of what is read: x, or context `(B, N, dim)`."""
        self.check(x)
        q = self.q(x).unflatten(-1, (self.num_heads, self.head_dim))
        k, v = self.kv(x if context is None else context).unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(-3)
        seen = None if mask is None else mask[:, None, None]
        return self.proj(ops.attention(q, k, v, mask=seen).flatten(-2))  # type: ignore[union-attr]


class SpeechTransformer(Recognizer):
    """The recogniser to compare with: the same outside, Transformer blocks of Whisper's kind inside (pre-norm, sine code).

    Args:
        num_heads: of all attention. mlp_ratio: hidden channels of the MLPs over `dim`. Others as in `SambaASR`.
    """

    def __init__(
        self,
        vocab_size: int = 257,
        dim: int = 192,
        encoder_depth: int = 4,
        decoder_depth: int = 4,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        mels: int = 80,
        sample_rate: int = 16000,
    ) -> None:
        super().__init__(vocab_size, dim, mels, sample_rate)

        def block() -> ContextBlock:
            return ContextBlock(dim, MaskedAttention(dim, num_heads), mlp_ratio=mlp_ratio)

        self.encoder = nn.ModuleList(block() for _ in range(encoder_depth))
        self.bridge = nn.LayerNorm(dim)
        self.past_norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(decoder_depth))
        self.past = nn.ModuleList(SoftmaxAttention(dim, num_heads, causal=True) for _ in range(decoder_depth))
        self.decoder = nn.ModuleList(block() for _ in range(decoder_depth))

    def mix_audio(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self._placed(x)
        for block in self.encoder:
            x = block(x, mask)
        return self.bridge(x)

    def encode(self, inputs: Tensor, lengths: Tensor | None) -> tuple[Any, Tensor]:
        """The sound and which of it is real; and the symbols said so far, none."""
        audio, mask = self.listen(inputs, lengths)
        mask = torch.ones_like(audio[..., 0], dtype=torch.bool) if mask is None else mask
        return (audio, mask), torch.empty(len(audio), 0, dtype=torch.int64, device=audio.device)

    def forward(self, inputs: Tensor, lengths: Tensor | None, targets: Tensor) -> Tensor:
        """Teacher forcing, all steps at once: logits `(B, M, vocab_size)`."""
        return self._text(self.shifted(targets), *self.encode(inputs, lengths)[0])

    def advance(self, symbols: Tensor, memory: Any, state: Tensor) -> tuple[Tensor, Tensor]:
        """One step, which reads the whole text again."""
        said = torch.cat([state, symbols[:, None]], 1)
        return self._text(said, *memory)[:, -1], said

    def _text(self, symbols: Tensor, audio: Tensor, mask: Tensor) -> Tensor:
        x = self._placed(self.say(symbols))
        for norm, past, block in zip(self.past_norms, self.past, self.decoder, strict=True):
            x = x + past(norm(x))
            x = block(x, mask, audio)
        return self.head(self.norm(x))

    def _placed(self, x: Tensor) -> Tensor:
        return x + sincos(torch.arange(x.shape[1], device=x.device), self.dim).to(x.dtype)


_OURS = "sizes of ours, with the bytes of UTF-8 and an end as symbols; the paper's are not public"
_SHAPES = ((1, 16000), (1,), (1, 20))


def _variant(name: str, **options: Any) -> Variant:
    return Variant(name, SambaASR, inputs=_SHAPES, source=_OURS, options=options)


SYSTEM = register_system(
    System(
        slug="samba_asr",
        title="Samba-ASR: State-Of-The-Art Speech Recognition Leveraging Structured State-Space Models",
        year=2025,
        arxiv="2501.02832",
        evidence="abstract_only",
        idea="A reconstruction: Whisper's encoder-decoder with Mamba in place of all attention, so that the cost is linear in "
        "the length of the sound and the text reads it from a state of constant size.",
        mixers=("mamba",),
        variants=(
            _variant("samba_asr_tiny"),
            _variant("samba_asr_tiny_state", cross="state", decoder_depth=4),
            _variant("samba_asr_base", dim=384, encoder_depth=16, decoder_depth=12),
        ),
        reports=(
            "Word error rate: LibriSpeech test-clean 1.17 %, GigaSpeech 9.12 %, SPGISpeech 1.84 %, mean 3.65 % (abstract)",
            "Claimed without figures: cost linear in the length of the audio, robustness to noise",
        ),
    )
)
