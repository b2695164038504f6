"""MMEngine's own optim package is the reference of these tests; its import warns of what torch has deprecated."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import mmengine.optim  # noqa: F401
