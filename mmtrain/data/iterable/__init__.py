"""Data sets that can only be iterated over, and ready-made loaders."""
