"""Settings that all runs share; a config inherits them with read_base() and changes what it needs."""

# The hooks of every run. Intervals count iterations (or epochs, with by_epoch=True).
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=20),  # console and <work_dir>/<timestamp>/vis_data/scalars.json
    progress=dict(type='ProgressBarHook'),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', interval=500, max_keep_ckpts=3),
)

# The seed determines the initial weights, the order of the data, augmentation and dropout.
randomness = dict(seed=0, deterministic=False)

env_cfg = dict(cudnn_benchmark=False)
log_level = 'INFO'
launcher = 'none'  # torchrun is detected without this

load_from = None  # a checkpoint whose weights a fresh run starts from
resume = False  # True: continue from the newest good checkpoint in work_dir
