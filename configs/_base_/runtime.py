"""What every run shares; a config takes it over with read_base() and changes what it likes."""

# The hooks every run has. Intervals count iterations (or epochs, in a run with by_epoch=True).
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=20),  # console and <work_dir>/<timestamp>/vis_data/scalars.json
    progress=dict(type='ProgressBarHook'),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', interval=500, max_keep_ckpts=3),
)

# The seed decides the initial weights, the order of the data, augmentation and dropout: the whole run.
randomness = dict(seed=0, deterministic=False)

env_cfg = dict(cudnn_benchmark=False)
log_level = 'INFO'
launcher = 'none'  # under torchrun this is noticed without being said

load_from = None  # start from these weights (a checkpoint), at iteration 0
resume = False  # True: go on from the newest good checkpoint in work_dir, exactly
