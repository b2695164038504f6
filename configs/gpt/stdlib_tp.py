"""The main job on two processes that hold one copy of the model between them: the same samples and losses as on one.

    torchrun --nproc-per-node=2 tools/train.py configs/gpt/stdlib_tp.py

On four processes it trains two such copies (dp 2 x tp 2); with `batch_size=8` the mathematics stays the same.
"""

from mmengine.config import read_base

with read_base():
    from .stdlib import *

work_dir = 'work_dirs/gpt_stdlib_tp'
train_dataloader.dataset.update(cache_dir=work_dir + '/data')
val_dataloader.dataset.update(cache_dir=work_dir + '/data')

# Attention heads and the inside of each MLP are cut in two; embedding, norms and head are on both processes.
strategy = dict(type='FSDPStrategy', wrap=['Block'], mesh=dict(tp=2))
