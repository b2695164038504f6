"""The machine: config to objects, the train loop, resuming."""

from mmtrain.runner.flexible_runner import FlexibleRunner as FlexibleRunner
from mmtrain.runner.flexible_runner import Parts as Parts
from mmtrain.runner.flexible_runner import Randomness as Randomness
from mmtrain.runner.loops import TrainLoop as TrainLoop
from mmtrain.runner.loops import TrainPlan as TrainPlan
