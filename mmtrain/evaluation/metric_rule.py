"""Whether a metric is better when it is greater or when it is less, told from its name."""

from collections.abc import Sequence

# MMEngine's: a metric whose name holds one of these, in any case, is better when greater, or when less.
GREATER_KEYS = ("acc", "top", "AR@", "auc", "precision", "mAP", "mDice", "mIoU", "mAcc", "aAcc")
LESS_KEYS = ("loss", "perplexity", "error")


def infer_rule(metric: str, *, greater: Sequence[str] = GREATER_KEYS, less: Sequence[str] = LESS_KEYS) -> str | None:
    """Return "greater", "less", or None when the name does not tell.

    The last part of the name decides first, as a whole and then in pieces (``books/loss`` is a loss); the whole name
    after it (``accuracy/mean``). Case makes no difference, and greater is looked for before less.
    """
    whole = metric.lower()
    last = whole.rsplit("/", 1)[-1]
    rules = [("greater", [key.lower() for key in greater]), ("less", [key.lower() for key in less])]
    for rule, keys in rules:
        if last in keys:
            return rule
    for name in (last, whole):
        for rule, keys in rules:
            if any(key in name for key in keys):
                return rule
    return None
