"""Worker processes that read the data."""
