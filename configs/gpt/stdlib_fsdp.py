"""The main example on two processes that hold half of the model each: the same losses as on one.

    torchrun --nproc-per-node=2 tools/train.py configs/gpt/stdlib_fsdp.py
"""

from mmengine.config import read_base

with read_base():
    from .stdlib import *

work_dir = 'work_dirs/gpt_stdlib_fsdp'
train_dataloader.dataset.update(cache_dir=work_dir + '/data')
val_dataloader.dataset.update(cache_dir=work_dir + '/data')

train_dataloader.update(batch_size=8)  # on each of two processes

# Each block is gathered for its forward and backward; embedding and head belong to the root.
strategy = dict(type='FSDPStrategy', wrap=['Block'])
