"""Whether a greater or a smaller value of a metric is better, inferred from its name."""

from collections.abc import Sequence

# MMEngine's: a metric whose name contains one of these, in any case, is better when greater, or when less.
GREATER_KEYS = ("acc", "top", "AR@", "auc", "precision", "mAP", "mDice", "mIoU", "mAcc", "aAcc")
LESS_KEYS = ("loss", "perplexity", "error")


def infer_rule(metric: str, *, greater: Sequence[str] = GREATER_KEYS, less: Sequence[str] = LESS_KEYS) -> str | None:
    """Return "greater", "less", or None when the name does not say.

    The last part of the name is looked at first: whether it is a key, then whether it contains one (``books/loss`` is a
    loss). Then the full name is (``accuracy/mean``). Case makes no difference; greater is tried before less.
    """
    full = metric.lower()
    last = full.rsplit("/", 1)[-1]
    rules = [("greater", [key.lower() for key in greater]), ("less", [key.lower() for key in less])]
    for rule, keys in rules:
        if last in keys:
            return rule
    for name in (last, full):
        for rule, keys in rules:
            if any(key in name for key in keys):
                return rule
    return None
