"""The main example on two processes, each with a copy of the model and half of every batch: same losses as on one.

    torchrun --nproc-per-node=2 tools/train.py configs/gpt/stdlib_ddp.py
"""

from mmengine.config import read_base

with read_base():
    from .stdlib import *

work_dir = 'work_dirs/gpt_stdlib_ddp'
train_dataloader.dataset.update(cache_dir=work_dir + '/data')
val_dataloader.dataset.update(cache_dir=work_dir + '/data')

train_dataloader.update(batch_size=8)  # on each of two processes

# This is also the default with several processes.
strategy = dict(type='DDPStrategy')
