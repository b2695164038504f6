"""``mmtrain checkpoint VERB``: one module a verb."""

from mmtrain.cli.checkpoint.command import main as main
