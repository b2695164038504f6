"""From text to token numbers and back.

A tokenizer is any object with ``encode(text) -> list of int``, ``decode(tokens) -> text`` and ``vocab_size``; most
libraries' tokenizers are. One may also have ``encode_bytes(data) -> array`` (a file's bytes, faster than through text),
``separator`` (the token put between documents) and ``fingerprint()`` (which text it makes of the same tokens).
"""

import hashlib
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mmtrain.registry import TRANSFORMS


@runtime_checkable
class Tokenizer(Protocol):
    """What datasets and models need of a tokenizer."""

    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Iterable[int]) -> str: ...


@TRANSFORMS.register_module()
class ByteTokenizer:
    """Every byte of the UTF-8 text is a token: 256 of them, nothing to learn, nothing to download.

    Documents are separated by byte 0, which text does not hold.
    """

    vocab_size = 256
    separator = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """Return the tokens of a file's content, uint8."""
        return np.frombuffer(data, dtype=np.uint8)

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text; bytes that are not valid UTF-8 become U+FFFD, and tokens that are not bytes are left out."""
        return bytes(token for token in tokens if 0 <= token < self.vocab_size).decode("utf-8", errors="replace")

    def fingerprint(self) -> str:
        return "bytes"


def encode_file(tokenizer: Any, data: bytes) -> np.ndarray:
    """Return the tokens of one file, with the separator after them if the tokenizer has one."""
    if hasattr(tokenizer, "encode_bytes"):
        tokens = tokenizer.encode_bytes(data)
    else:
        tokens = np.asarray(tokenizer.encode(data.decode("utf-8", errors="replace")), dtype=np.int64)
    separator = getattr(tokenizer, "separator", None)
    return tokens if separator is None else np.append(tokens, np.asarray(separator, dtype=tokens.dtype))


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a string that changes when the tokens of a text would.

    A tokenizer without ``fingerprint`` is known by its class, its size and what it makes of one line of text.
    """
    if hasattr(tokenizer, "fingerprint"):
        return str(tokenizer.fingerprint())
    sample = "The quick brown fox, 0123456789 = 你好 \n\tdef f(x): return x"
    kind = type(tokenizer)
    parts = (kind.__module__, kind.__qualname__, int(tokenizer.vocab_size), list(tokenizer.encode(sample)))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest unsigned type that holds every token."""
    for dtype in (np.uint8, np.uint16, np.uint32):
        if vocab_size - 1 <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    raise ValueError(f"a vocabulary of {vocab_size} tokens does not fit 32 bits")
