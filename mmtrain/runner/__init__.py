"""The runner: from a config to objects, the train loop, checkpoints and resuming."""

from mmtrain.runner.flexible_runner import FlexibleRunner as FlexibleRunner
from mmtrain.runner.interface import Runner as Runner
from mmtrain.runner.loops import TrainLoop as TrainLoop
from mmtrain.runner.run import Randomness as Randomness
from mmtrain.runner.run import Run as Run
from mmtrain.runner.train_schedule import TrainSchedule as TrainSchedule
