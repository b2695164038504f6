import numpy as np
import pytest

from mmtrain.datasets.tokenizers import ByteTokenizer, Tokenizer, encode_file, token_dtype, tokenizer_fingerprint


class Words:
    """A tokenizer with only the three required attributes."""

    def __init__(self, words):
        self.words = words
        self.vocab_size = 1000 + len(words)

    def encode(self, text):
        return [1000 + self.words.index(word) if word in self.words else len(word) for word in text.split()]

    def decode(self, tokens):
        return " ".join(map(str, tokens))


def test_bytes_round_trip():
    tokenizer = ByteTokenizer()
    assert isinstance(tokenizer, Tokenizer)
    text = "naïve 你好\n\t🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([104, 105, 0xFF]) == "hi\ufffd"
    assert tokenizer.decode([104, 50_000, 105]) == "hi"


def test_a_file_ends_with_the_separator():
    assert encode_file(ByteTokenizer(), b"ab").tolist() == [97, 98, 0]
    assert encode_file(Words(["is"]), b"this is \xff").tolist() == [4, 1000, 1]


def test_fingerprints_of_tokenizers_differ():
    assert tokenizer_fingerprint(ByteTokenizer()) == "bytes"
    assert tokenizer_fingerprint(Words(["fox,"])) == tokenizer_fingerprint(Words(["fox,"]))
    assert tokenizer_fingerprint(Words(["fox,"])) != tokenizer_fingerprint(Words(["brown"]))


def test_smallest_type_that_holds_every_token():
    sizes = {256: np.uint8, 257: np.uint16, 65_536: np.uint16, 65_537: np.uint32}
    assert {size: token_dtype(size) for size in sizes} == {size: np.dtype(kind) for size, kind in sizes.items()}
    with pytest.raises(ValueError, match="32 bits"):
        token_dtype(2**32 + 1)
