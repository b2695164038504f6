"""The main example in miniature, which runs for a few seconds: for tests and experiments."""

from mmengine.config import read_base

with read_base():
    from ._base_gpt import *

work_dir = 'work_dirs/gpt_tiny'
context = 32

model.update(layers=2, heads=2, width=32, context=context, positions='rotary')

train_dataloader.update(batch_size=8)
train_dataloader.dataset.update(context=context, cache_dir=work_dir + '/data')
val_dataloader.update(batch_size=8)
val_dataloader.dataset.update(context=context, cache_dir=work_dir + '/data', limit=32)

param_scheduler[0].update(end=5)
param_scheduler[1].update(begin=5)
train_cfg = dict(by_epoch=False, max_iters=40, val_interval=20)
default_hooks.logger.update(interval=5)
default_hooks.checkpoint.update(interval=20)
