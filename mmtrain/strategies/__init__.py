"""Engines behind one contract: single device now; DDP, FSDP2 and DeepSpeed take their places beside it."""

from mmtrain.strategies.base import Strategy as Strategy
from mmtrain.strategies.ddp import DDPStrategy as DDPStrategy
from mmtrain.strategies.fsdp import FSDPStrategy as FSDPStrategy
from mmtrain.strategies.single_device import SingleDeviceStrategy as SingleDeviceStrategy
