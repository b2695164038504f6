"""The main example: a small GPT learns to write Python in two or three minutes on two CPU cores.

    python tools/train.py configs/gpt/stdlib.py
"""

from mmengine.config import read_base

with read_base():
    from ._base_gpt import *

work_dir = 'work_dirs/gpt_stdlib'
context = 128  # in bytes

# 0.8 million parameters. In such a short run, rotary positions learn faster than a table of positions.
model.update(layers=4, heads=4, width=128, context=context, positions='rotary')

# The first start tokenises the text into this directory; later starts map the file into memory.
train_dataloader.dataset.update(context=context, cache_dir=work_dir + '/data')
val_dataloader.dataset.update(context=context, cache_dir=work_dir + '/data')

# 16 windows x 128 bytes x 1,000 iterations = 2 million bytes, a fifth of the text.
train_cfg = dict(by_epoch=False, max_iters=1000, val_interval=200)

custom_hooks = [
    dict(
        type='TextSampleHook',
        prompts=['def read(self, ', 'import '],
        interval=500,
        max_new_tokens=200,
        temperature=0.8,
        top_k=40,
        seed=0,
    )
]
