"""MMEngine's optim package is the reference of these tests; its import gives deprecation warnings of torch."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import mmengine.optim  # noqa: F401
