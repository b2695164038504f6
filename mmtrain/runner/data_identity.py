"""Which data a run reads: the fingerprint of a dataset, and whether two runs read the same data."""

import re
from collections.abc import Mapping
from typing import Any

import xxhash

from mmtrain.errors import CheckpointError


def data_fingerprint(dataset: Any) -> str:
    """What identifies a dataset: its own ``fingerprint()`` if it has one, else its class and length.

    A dataset that wraps others (``datasets`` or ``dataset``, as ConcatDataset and Subset call them) adds a hash of
    theirs, where they have a ``fingerprint()``.
    """
    own = getattr(dataset, "fingerprint", None)
    if callable(own):
        return str(own())
    parts = _wrapped(dataset)
    inside = [data_fingerprint(part) for part in parts]
    if inside == [_class_and_length(part) for part in parts]:
        return _class_and_length(dataset)
    return f"{_class_and_length(dataset)}/{xxhash.xxh3_128_hexdigest(repr(inside).encode())}"


def same_data(saved: str, today: str) -> bool:
    """Whether two fingerprints are of the same data.

    Older checkpoints have only class and length for a dataset that wraps others; these match when both agree.
    """
    plain = today.rpartition("/")[0]
    return saved == today or (saved == plain and re.fullmatch(r".+:(\d+|unknown)/[0-9a-f]{32}", today) is not None)


def check_same_data_as_checkpoint(saved: str, today: str) -> None:
    """Raise CheckpointError when the training data differ from the checkpoint's."""
    if saved and not same_data(saved, today):
        raise CheckpointError(
            f"The training dataset changed since this checkpoint (fingerprint {saved} -> {today}), so its data "
            "position cannot be used. Use the same data, or choose what to do with the new data: "
            "resume_data='restart' starts it from the beginning, resume_data=dict(skip_iters=k) skips k iterations"
        )


def moved_before(saved: Mapping[str, str], today: Mapping[str, str]) -> bool:
    """Whether the run that saved a checkpoint already applied today's ``resume_data``, to the same dataset config.

    Then its position is used, and the same command continues after a stop. Both are from `compare.flat_config`.
    """
    prefixes = ("resume_data", "train_dataloader.dataset")
    asked = [{path: value for path, value in values.items() if path.startswith(prefixes)} for values in (saved, today)]
    return asked[0] == asked[1]


def _wrapped(dataset: Any) -> list[Any]:
    several = getattr(dataset, "datasets", None)
    if isinstance(several, (list, tuple)):
        return list(several)
    one = getattr(dataset, "dataset", None)
    return [] if one is None else [one]


def _class_and_length(dataset: Any) -> str:
    try:
        length: int | str = len(dataset)
    except (TypeError, NotImplementedError):
        length = "unknown"
    return f"{type(dataset).__qualname__}:{length}"
