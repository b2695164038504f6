"""GPT-2's smallest model (Radford et al., 2019), 124,439,808 parameters, in bfloat16, for a GPU.

The vocabulary has GPT-2's size, but the text is read as bytes, which use its first 256 entries, so that nothing has to
be downloaded. For GPT-2's tokens, give model and datasets a `tokenizer` with encode, decode and vocab_size.
"""

from mmengine.config import read_base

with read_base():
    from ._base_gpt import *

work_dir = 'work_dirs/gpt2_124m'
context = 1024
accumulative_counts = 8  # iterations per update of the weights: 8 x 16 x 1,024 = 131,072 tokens

model.update(
    vocab_size=50257, layers=12, heads=12, width=768, context=context, positions='learned', bias=True, dropout=0.1
)
compile = True

train_dataloader.update(batch_size=16, num_workers=2)
train_dataloader.dataset.update(context=context, cache_dir=work_dir + '/data')
val_dataloader.update(batch_size=16)
val_dataloader.dataset.update(context=context, cache_dir=work_dir + '/data', limit=128)

# Computes in bfloat16, keeps weights and optimizer in float32; bfloat16 needs no loss scaler.
optim_wrapper.update(type='AmpOptimWrapper', dtype='bfloat16', accumulative_counts=accumulative_counts)
optim_wrapper.optimizer.update(lr=6e-4)

# All of these count iterations, not updates.
train_cfg = dict(by_epoch=False, max_iters=accumulative_counts * 1000, val_interval=accumulative_counts * 50)
param_scheduler[0].update(end=accumulative_counts * 50)
param_scheduler[1].update(begin=accumulative_counts * 50)
default_hooks.checkpoint.update(interval=accumulative_counts * 100)
