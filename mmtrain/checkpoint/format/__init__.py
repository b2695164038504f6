"""What the files of a checkpoint contain: docs/checkpoint_format.md as code."""
