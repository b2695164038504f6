"""Windows of text for a language model, read from one memory-mapped file of tokens."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mmtrain.datasets.token_file import TokenFile, prepare_tokens
from mmtrain.datasets.tokenizers import ByteTokenizer
from mmtrain.errors import ConfigError
from mmtrain.registry import DATASETS, TRANSFORMS, build


class TokenDataset(Dataset[dict[str, Tensor]]):
    """Windows of ``context`` tokens, every ``stride`` tokens (default: ``context``, so that they do not overlap).

    Item i is ``input_ids`` (context,) and ``labels`` (context,), both int64; ``labels[t]`` is the token that follows
    ``input_ids[t]``. Tokens at the end that do not fill a window are left out.

    * ``jitter``: start every window up to one stride later, by a draw of torch's generator. The framework seeds it by
      (seed, epoch, index), so every epoch cuts the text at other places, and a restart at the same ones;
    * ``limit``: keep only so many windows, evenly spaced over the text.

    The file is mapped when a process first reads an item, so the dataset can be sent to workers at no cost. Raises
    ConfigError when the text is shorter than one window.
    """

    def __init__(
        self,
        tokens: TokenFile,
        context: int,
        *,
        stride: int | None = None,
        jitter: bool = False,
        limit: int | None = None,
    ) -> None:
        self.tokens, self.context, self.stride, self.jitter = tokens, context, stride or context, jitter
        if context < 1 or self.stride < 1 or (limit is not None and limit < 1):
            raise ConfigError(
                f"dataset: context={context}, stride={stride} and limit={limit} must be positive, or None"
            )
        self._last_start = tokens.count - context - 1
        if self._last_start < 0:
            raise ConfigError(
                f"dataset.context: the text has {tokens.count} tokens, one window of {context} needs {context + 1}; "
                "shorten the context or add text"
            )
        self._windows = self._last_start // self.stride + 1
        self._length = self._windows if limit is None else min(limit, self._windows)
        self._array: np.ndarray | None = None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -self._length <= index < self._length:
            raise IndexError(f"index {index} of a data set of {self._length} windows")
        start = index % self._length * self._windows // self._length * self.stride
        if self.jitter:
            start = min(start + int(torch.randint(self.stride, ())), self._last_start)
        if self._array is None:
            self._array = self.tokens.open()
        window = torch.from_numpy(self._array[start : start + self.context + 1].astype(np.int64))
        return {"input_ids": window[:-1], "labels": window[1:]}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_array": None}

    def fingerprint(self) -> str:
        """Identify what the items are made of: the tokens themselves and how windows are cut from them."""
        cut = f"{self.context}-{self.stride}-{self._length}{'-jitter' if self.jitter else ''}"
        return f"{self.tokens.digest}-{self.tokens.dtype}-{self.tokens.count}-{cut}"


@DATASETS.register_module()
class TextDataset(TokenDataset):
    """One split of a folder of text files, tokenised on the first start (see `TokenDataset` for the windows).

    * ``source``: the files, ``dict(type=StdlibSource)`` or ``dict(type=TextFiles, root=..., patterns=[...])``;
    * ``split``: "train", "val" or "all";
    * ``cache_dir``: where the tokens are kept, usually ``<work_dir>/data``;
    * ``tokenizer``: an object or its config; bytes when None.
    """

    def __init__(
        self,
        source: Any,
        split: str = "train",
        *,
        context: int,
        cache_dir: str = "work_dirs/data",
        tokenizer: Any = None,
        stride: int | None = None,
        jitter: bool = False,
        limit: int | None = None,
    ) -> None:
        if tokenizer is None:
            tokenizer = ByteTokenizer()
        elif isinstance(tokenizer, Mapping):
            tokenizer = build(TRANSFORMS, tokenizer, path="dataset.tokenizer")
        if isinstance(source, Mapping):
            source = build(DATASETS, source, path="dataset.source")
        tokens = prepare_tokens(source, tokenizer, split=split, cache_dir=cache_dir)
        super().__init__(tokens, context, stride=stride, jitter=jitter, limit=limit)
