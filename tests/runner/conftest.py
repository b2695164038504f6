"""Registers the small parts."""

import parts  # noqa: F401
