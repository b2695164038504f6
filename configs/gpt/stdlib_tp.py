"""The main example with tensor parallelism: one copy of the model on two processes, the same losses as on one.

    torchrun --nproc-per-node=2 tools/train.py configs/gpt/stdlib_tp.py

On four processes it trains two copies (dp 2 x tp 2); with `batch_size=8` the losses stay the same.
"""

from mmengine.config import read_base

with read_base():
    from .stdlib import *

work_dir = 'work_dirs/gpt_stdlib_tp'
train_dataloader.dataset.update(cache_dir=work_dir + '/data')
val_dataloader.dataset.update(cache_dir=work_dir + '/data')

# Attention heads and the inner dimension of each MLP are split in two; both processes hold embedding, norms and head.
strategy = dict(type='FSDPStrategy', wrap=['Block'], mesh=dict(tp=2))
