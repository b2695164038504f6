"""Datasets that come with mmtrain; importing this registers them."""

from mmtrain.datasets.sources import StdlibSource, TextFiles
from mmtrain.datasets.text import TextDataset, TokenDataset
from mmtrain.datasets.token_file import TokenFile, prepare_tokens
from mmtrain.datasets.tokenizers import ByteTokenizer, Tokenizer

__all__ = [
    "ByteTokenizer",
    "StdlibSource",
    "TextDataset",
    "TextFiles",
    "TokenDataset",
    "TokenFile",
    "Tokenizer",
    "prepare_tokens",
]
