"""What the GPT configs have in common: predict the next byte of the source of Python's standard library.

To train on your own text, replace `source` in both datasets (or set it with --cfg-options):
    source=dict(type=TextFiles, root='my/books', patterns=['*.txt'])
"""

from mmengine.config import read_base

with read_base():
    from .._base_.runtime import *

from mmtrain.datasets import ByteTokenizer, StdlibSource, TextDataset
from mmtrain.models import GPT

# The configs that build on this one set layers, heads, width and context.
model = dict(type=GPT, vocab_size=256, tokenizer=dict(type=ByteTokenizer))

train_dataloader = dict(
    batch_size=16,
    num_workers=0,  # reading a window takes microseconds; a worker process would only take a core from the model
    sampler=dict(type='DefaultSampler', shuffle=True),
    drop_last=True,
    # jitter: every epoch cuts the text into windows at different places.
    dataset=dict(type=TextDataset, source=dict(type=StdlibSource), split='train', jitter=True),
)
val_dataloader = dict(
    batch_size=32,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    # limit: the number of windows, evenly spaced over the validation files.
    dataset=dict(type=TextDataset, source=dict(type=StdlibSource), split='val', limit=512),
)
val_cfg = dict()  # no evaluator: validation reports the loss, here in nats per byte

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1),
    clip_grad=dict(max_norm=1.0),
    # Weight decay only for matrices, not for norms and biases.
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
# Linear warmup, then half a cosine down to a tenth. A schedule without `end` lasts as long as the run.
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, begin=0, end=50, by_epoch=False),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.1, begin=50, by_epoch=False),
]
