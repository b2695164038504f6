"""The main example on two processes with DeepSpeed, gradients and moments sharded (ZeRO-2): same losses as on one.

    torchrun --nproc-per-node=2 tools/train.py configs/gpt/stdlib_zero2.py
"""

from mmengine.config import read_base

with read_base():
    from .stdlib import *

work_dir = 'work_dirs/gpt_stdlib_zero2'
train_dataloader.dataset.update(cache_dir=work_dir + '/data')
val_dataloader.dataset.update(cache_dir=work_dir + '/data')

train_dataloader.update(batch_size=8)  # on each of two processes

# Clipping, accumulation and multipliers stay in optim_wrapper; DeepSpeed's config may only repeat them.
strategy = dict(type='DeepSpeedStrategy', zero_optimization=dict(stage=2))
