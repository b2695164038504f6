"""The main job on two processes that share one copy of the model between them: the same losses as on one.

    torchrun --nproc-per-node=2 tools/train.py configs/gpt/stdlib_fsdp.py
"""

from mmengine.config import read_base

with read_base():
    from .stdlib import *

work_dir = 'work_dirs/gpt_stdlib_fsdp'
train_dataloader.dataset.update(cache_dir=work_dir + '/data')
val_dataloader.dataset.update(cache_dir=work_dir + '/data')

train_dataloader.update(batch_size=8)  # on each of two processes

# Each block of the model is gathered for its forward and backward; embedding and head belong to the root.
strategy = dict(type='FSDPStrategy', wrap=['Block'])
