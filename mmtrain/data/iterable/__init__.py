"""Iterable-style datasets, and loaders that the user built."""
