"""Engines behind one contract: single device, DDP, FSDP2 and DeepSpeed."""

from mmtrain.strategies.base import Strategy as Strategy
from mmtrain.strategies.ddp import DDPStrategy as DDPStrategy
from mmtrain.strategies.fsdp import FSDPStrategy as FSDPStrategy
from mmtrain.strategies.single_device import SingleDeviceStrategy as SingleDeviceStrategy
from mmtrain.strategies.zero.strategy import DeepSpeedStrategy as DeepSpeedStrategy
