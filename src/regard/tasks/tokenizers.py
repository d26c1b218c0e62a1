"""A real tokenizer, trained on the task's own text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class BytePairs:
    """A byte-level byte-pair tokenizer of Hugging Face's `tokenizers`, trained on the texts given; digits are never merged.

    Any text can be encoded and comes back unchanged.

    Args:
        texts: to train on. vocab_size: at most so many tokens; 256 stand for the bytes.
        special: tokens of their own, which come first.

    Attributes:
        tokenizer: the tokenizer itself, as `transformers.PreTrainedTokenizerFast(tokenizer_object=...)` takes it.

    Raises:
        ValueError: where the package is not installed; says how to install it.
    """

    def __init__(self, texts: Iterable[str], vocab_size: int, special: Sequence[str] = ()) -> None:
        try:
            from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        except ImportError as error:
            raise ValueError('byte pairs need the package tokenizers: pip install "regard[language]".') from error
        if vocab_size < 256 + len(special):
            raise ValueError(
                f"vocab_size must be at least {256 + len(special)}, the bytes and special tokens; got {vocab_size}."
            )
        self.tokenizer = Tokenizer(models.BPE())
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        self.tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(special),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        self.tokenizer.train_from_iterator(texts, trainer)
        self.vocab_size = self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Text -> tokens."""
        return self.tokenizer.encode(text).ids

    def decode(self, tokens: Iterable[int]) -> str:
        """Tokens -> text; special tokens are left out."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

    def byte_lengths(self) -> list[int]:
        """Bytes of text that each token stands for; its name has one character for each."""
        names = sorted(self.tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        return [len(name) for name, _ in names]
