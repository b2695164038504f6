"""``mmtrain checkpoint COMMAND``: one module for each command."""

from mmtrain.cli.checkpoint.command import main as main
