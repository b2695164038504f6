"""The check of a config: keys, sections, types and arguments, each fault with path, file, line and near name."""

from datetime import timedelta

import pytest
import torch

from mmtrain.config import KEYS, check_config, load_config
from mmtrain.config.keys import misspelled_key
from mmtrain.errors import ConfigError
from mmtrain.registry import (
    DATA_SAMPLERS,
    DATASETS,
    EVALUATOR,
    FUNCTIONS,
    HOOKS,
    LOOPS,
    METRICS,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    PARAM_SCHEDULERS,
    STRATEGIES,
    TRANSFORMS,
    VISBACKENDS,
    VISUALIZERS,
)

# mmtrain.hooks imports MMEngine's base class, and with it a module that torch finds old.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


def made(name, text):
    """A class whose constructor has the arguments of ``text``."""
    return type(name, (), {"__init__": eval(f"lambda self, {text}: None")})


@pytest.fixture(scope="module", autouse=True)
def parts():
    """One class of each kind, so that this file depends on no other part of mmtrain."""
    held = [
        (HOOKS, made("TestHook", "interval=1, by_epoch=True")),
        (MODELS, made("TestNet", "width, data_preprocessor=None")),
        (MODELS, made("TestPreprocessor", "mean=0")),
        (DATASETS, made("TestSet", "root, pipeline=()")),
        (DATASETS, made("TestRepeat", "dataset, times=1")),
        (DATA_SAMPLERS, made("TestSampler", "dataset, shuffle=True")),
        (FUNCTIONS, made("TestCollate", "batch, pad=0")),
        (TRANSFORMS, made("TestResize", "size")),
        (METRICS, made("TestMetric", "topk=1")),
        (EVALUATOR, made("TestEvaluator", "metrics")),
        (OPTIM_WRAPPERS, made("TestWrapper", "optimizer, accumulative_counts=1, clip_grad=None")),
        (OPTIM_WRAPPER_CONSTRUCTORS, made("TestConstructor", "optim_wrapper_cfg")),
        (PARAM_SCHEDULERS, made("TestLR", "optimizer, T_max=None, by_epoch=True")),
        (STRATEGIES, made("TestStrategy", "where='cpu'")),
        (LOOPS, made("LoopOfAUser", "runner, dataloader, max_iters=1, own_option=2")),
        (VISUALIZERS, made("TestVisualizer", "vis_backends=None")),
        (VISBACKENDS, made("TestBackend", "save_dir, fast=False")),
    ]
    for registry, cls in held:
        registry.register_module(module=cls)
    yield
    for registry, cls in held:
        registry.module_dict.pop(cls.__name__)


def good():
    inner = dict(type="TestSet", root="x", pipeline=[dict(type="TestResize", size=1)])
    loader = dict(
        dataset=dict(type="TestRepeat", dataset=inner),
        batch_size=2, num_workers=0, sampler=dict(type="TestSampler", shuffle=True), drop_last=True,
        collate_fn=dict(type="TestCollate", pad=1),
    )  # fmt: skip
    return dict(
        model=dict(type="TestNet", width=3, data_preprocessor=dict(type="TestPreprocessor")),
        train_dataloader=loader,
        val_dataloader=dict(first=dict(loader), second=dict(loader, batch_size=1)),
        test_dataloader=None,
        train_cfg=dict(by_epoch=False, max_iters=10, val_interval=5, nonfinite="stop"),
        val_cfg=dict(type="LoopOfAUser", fp16=True),
        test_cfg=dict(),
        val_evaluator=dict(first=dict(type="TestMetric", topk=1), second=[dict(type="TestMetric")]),
        test_evaluator=dict(type="TestEvaluator", metrics=[dict(type="TestMetric")]),
        optim_wrapper=dict(
            type="TestWrapper", optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.95)), clip_grad=dict(max_norm=1),
            paramwise_cfg=dict(bias_lr_mult=2.0), constructor="TestConstructor",
        ),
        param_scheduler=[
            dict(type="TestLR", T_max=5, by_epoch=True, convert_to_iter_based=True), dict(type="TestLR"),
        ],
        default_hooks=dict(mine=dict(type="TestHook", interval=2, priority="LOW"), logger=None),
        custom_hooks=[dict(type="TestHook")],
        env_cfg=dict(cudnn_benchmark=False, mp_cfg=dict(mp_start_method="fork"), dist_cfg=dict(backend="nccl")),
        randomness=dict(seed=None, deterministic=False, diff_rank_seed=False, per_sample=True),
        launcher="none", log_level="INFO", log_processor=dict(window_size=10, by_epoch=False),
        visualizer=dict(type="TestVisualizer", name="x", vis_backends=[dict(type="TestBackend", fast=True)]),
        load_from=None, resume=False, resume_data="continue", load_options=dict(verify="size"), work_dir="w", experiment_name="e", default_scope="mmtrain",
        custom_imports=dict(imports=["os"], allow_failed_imports=False), strategy=dict(type="TestStrategy", where="x"),
        compile=dict(mode="default"), runner_type="FlexibleRunner",
        auto_scale_lr=dict(enable=True, base_batch_size=8, rule="linear"),
    )  # fmt: skip


def changed(path, value, *, remove=False):
    cfg = good()
    *parents, last = path.split(".")
    here = cfg
    for name in parents:
        here = here[int(name)] if isinstance(here, list) else here[name]
    if remove:
        del here[last]
    else:
        here[int(last) if isinstance(here, list) else last] = value
    return cfg


def error(cfg):
    with pytest.raises(ConfigError) as caught:
        check_config(cfg)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_schedules_of_several_optimizers_are_checked_by_name():
    good = dict(gen=[dict(type="TestLR")], disc=dict(type="TestLR", T_max=5))
    check_config(dict(param_scheduler=good))
    with pytest.raises(ConfigError, match=r"param_scheduler\.disc\.T_mix"):
        check_config(dict(param_scheduler={**good, "disc": dict(type="TestLR", T_mix=5)}))


def test_a_config_with_every_key_passes():
    assert set(good()) == set(KEYS)
    check_config(good())
    check_config({})


# -- names at the top

MISSPELT = {
    "loadfrom": "load_from", "load_form": "load_from", "LoadFrom": "load_from", "resum": "resume", "reusme": "resume",
    "paramscheduler": "param_scheduler", "param_schedulers": "param_scheduler", "parm_scheduler": "param_scheduler",
    "train_dataloder": "train_dataloader", "trian_dataloader": "train_dataloader", "val_datalaoder": "val_dataloader",
    "optim_wraper": "optim_wrapper", "optimwrapper": "optim_wrapper", "custom_hook": "custom_hooks",
    "default_hook": "default_hooks", "defualt_hooks": "default_hooks", "workdir": "work_dir", "mdoel": "model",
    "traincfg": "train_cfg", "tset_cfg": "test_cfg", "visualiser": "visualizer", "custom_import": "custom_imports",
    "val_evaluater": "val_evaluator", "randomnes": "randomness", "loglevel": "log_level", "launchr": "launcher",
    "stratgy": "strategy", "compil": "compile", "autoscale_lr": "auto_scale_lr", "experiment_nam": "experiment_name",
}  # fmt: skip

# A value that the key could hold, so that only the name shows that it is a variable.
SAMPLE = {key: value for key, value in good().items()}

VARIABLES = """
accumulative_counts dataloader_num_workers weight_decay max_norm warmup_ratio save_total_limit evaluation_freq
SYSTEM evaluation_inputs evaluation_images train_dataset val_dataset test_dataset tokenizer image_processor
llm_name_or_path pack_to_max_length sampler optim_type lr env seed work resume_from batch_size save_steps
prompt_template max_epochs betas dataset model_path max_length use_varlen_attn data_path max_iters num_workers
log_interval interval models text_cfg vision_cfg vae_cfg enc_cfg vl_cfg MODEL RESUME WORK_DIR my_visualizer
val_dataloader_2 train_dataloader_a optimizer scheduler param_groups hooks metrics evaluator train_pipeline
test_pipeline backend_args num_classes compiled strategies data_root norm_cfg image_size launch_time experiment
scope default_dtype loss_cfg base_lr _model model_ random_state train_ann_file val_ann_file load log log_cfg
visual_encoder llm projector text
"""


@pytest.mark.parametrize("name", MISSPELT)
def test_a_name_that_looks_like_a_key_is_reported(name):
    key = MISSPELT[name]
    assert misspelled_key(name, SAMPLE[key]) == key
    assert error({name: SAMPLE[key]}).startswith(f"`{name}`: unknown key; did you mean '{key}'?")


@pytest.mark.parametrize("name", VARIABLES.split())
def test_a_users_variable_is_accepted(name):
    for value in (*SAMPLE.values(), 1, "x", [1], None, True):
        assert misspelled_key(name, value) is None


def test_a_plural_is_a_misspelled_key_only_if_the_value_fits_the_key():
    assert misspelled_key("work_dirs", ["a", "b"]) is None
    assert misspelled_key("work_dirs", "a") == "work_dir"
    assert misspelled_key("test_cfgs", dict()) is None


def test_a_name_that_the_config_reads_is_a_variable(tmp_path):
    file = tmp_path / "c.py"
    file.write_text("custom_hook = dict(type='TestHook')\ncustom_hooks = [custom_hook]\n")
    check_config(load_config(file))
    file.write_text("custom_hook = dict(type='TestHook')\ncustom_hooks = []\n")
    assert "did you mean 'custom_hooks'" in error(load_config(file))


# -- sections

UNKNOWN_KEYS = {
    "train_cfg.max_epoch": "max_epochs", "val_cfg.fp_16": "fp16", "randomness.sed": "seed", "compile.mod": "mode",
    "env_cfg.cudnn_benchmrk": "cudnn_benchmark", "auto_scale_lr.enabled": "enable",
    "log_processor.windowsize": "window_size",
    "train_dataloader.batchsize": "batch_size", "val_dataloader.second.num_worker": "num_workers",
    "custom_imports.import": "imports", "val_cfg.own_optoin": "own_option",
    "optim_wrapper.acumulative_counts": "accumulative_counts", "optim_wrapper.paramwise": "paramwise_cfg",
    "optim_wrapper.optimizer.weight_deca": "weight_decay", "default_hooks.mine.intervl": "interval",
    "custom_hooks.0.intervl": "interval", "model.widht": "width", "model.data_preprocessor.maen": "mean",
    "train_dataloader.dataset.time": "times", "train_dataloader.dataset.dataset.rot": "root",
    "train_dataloader.dataset.dataset.pipeline.0.siz": "size", "train_dataloader.sampler.shufle": "shuffle",
    "train_dataloader.collate_fn.pads": "pad", "val_evaluator.first.top_k": "topk",
    "val_evaluator.second.0.topkk": "topk",
    "test_evaluator.metric": "metrics", "test_evaluator.metrics.0.top": "topk", "param_scheduler.0.TMax": "T_max",
    "visualizer.vis_backend": "vis_backends", "visualizer.vis_backends.0.fats": "fast", "strategy.were": "where",
}  # fmt: skip


@pytest.mark.parametrize("path", UNKNOWN_KEYS)
def test_an_unknown_key_is_reported_with_the_nearest(path):
    message = error(changed(path, 1))
    shown = ".".join(path.split("."))
    for index in "01":
        shown = shown.replace(f".{index}", f"[{index}]")
    assert message.startswith(f"`{shown}`: ")
    assert f"did you mean '{UNKNOWN_KEYS[path]}'?" in message


WRONG_VALUES = {
    "model": "gpt", "train_dataloader": [], "train_cfg": 3, "train_cfg.max_iters": 0, "optim_wrapper": "AdamW",
    "param_scheduler": "cosine", "default_hooks": [], "custom_hooks": dict(type="TestHook"),
    "resume": 1, "load_from": True,
    "work_dir": 5, "launcher": "torch", "log_level": [], "strategy": "ddp", "compile": "yes", "randomness": 42,
    "train_cfg.val_interval": 0, "train_cfg.by_epoch": "no", "train_cfg.nonfinite": "ignore", "randomness.seed": -1,
    "randomness.deterministic": 1, "train_dataloader.batch_size": 0, "train_dataloader.num_workers": -1,
    "train_dataloader.drop_last": "True", "train_dataloader.dataset": "set", "optim_wrapper.optimizer": "AdamW",
    "custom_hooks.0": "TestHook", "default_hooks.mine": "TestHook", "default_hooks.mine.type": 3, "val_cfg.fp16": "x",
    "val_evaluator": "TestMetric", "val_evaluator.second.0": "TestMetric", "param_scheduler.0": None, "env_cfg": True,
    "custom_imports.imports": 3, "runner_type": 3, "experiment_name": 3, "visualizer": [],
    "auto_scale_lr.enable": "yes", "env_cfg.timeout": -1, "env_cfg.dist_cfg.timeout": "1h", "load_options.revise_keys": ["^module.", ""], "resume_data": dict(skip_iters=-1),
}  # fmt: skip


@pytest.mark.parametrize("path", WRONG_VALUES)
def test_a_wrong_value_is_reported(path):
    message = error(changed(path, WRONG_VALUES[path]))
    assert "expected" in message
    assert f"found {WRONG_VALUES[path]!r}" in message


@pytest.mark.parametrize("value", [0, -3, 2.5, "10", True])
def test_the_end_of_a_run_is_a_positive_integer(value):
    assert "expected a positive integer" in error(changed("train_cfg.max_iters", value))
    cfg = changed("train_cfg", dict(max_epochs=value))
    assert error(cfg).startswith("`train_cfg.max_epochs`: expected a positive integer")
    assert "remove one of them" in error(changed("train_cfg.max_epochs", 3))


def test_a_missing_argument_is_reported_unless_the_run_fills_it_in():
    assert error(changed("model.width", 0, remove=True)) == "`model`: TestNet requires the argument 'width'"
    assert "TestSet requires the argument 'root'" in error(changed("train_dataloader.dataset", dict(type="TestSet")))
    check_config(changed("optim_wrapper.optimizer", 0, remove=True))


def test_a_name_that_is_not_found_is_reported_at_its_type():
    for path in ("model.type", "custom_hooks.0.type", "optim_wrapper.optimizer.type", "param_scheduler.1.type"):
        message = error(changed(path, "Tset_NoSuch"))
        assert "named 'Tset_NoSuch'" in message
        assert message.split("`")[1].endswith(".type")
    assert "did you mean 'Adam'" in error(changed("optim_wrapper.optimizer.type", "adam"))
    assert "collate_fn`: there is no function named 'nosuch'" in error(changed("train_dataloader.collate_fn", "nosuch"))
    assert "`type` is missing" in error(changed("model.type", 0, remove=True))


def test_a_default_hook_without_type_changes_the_default_ones_arguments():
    check_config({"default_hooks": dict(logger=dict(interval=5))})
    assert "LoggerHook has no argument 'intervl'" in error({"default_hooks": dict(logger=dict(intervl=5))})
    message = error({"default_hooks": dict(loger=dict(interval=5))})
    assert (
        message
        == "`default_hooks.loger`: 'loger' is not a default hook; did you mean 'logger'? A hook of your own needs `type`"
    )


def test_inner_parts_with_an_unknown_registry_are_left_to_their_owner():
    check_config(changed("model.width", dict(type="SomethingOfTheModelsOwn", any=1)))
    check_config(changed("train_dataloader.dataset.dataset", dict(type="LookedUpElsewhere", any=1)))
    check_config(changed("train_dataloader.dataset.dataset.pipeline", [dict(type="LookedUpElsewhere"), len]))


def test_objects_and_classes_pass():
    cfg = changed("model", torch.nn.Linear(1, 1))
    cfg["optim_wrapper"]["optimizer"]["type"] = torch.optim.SGD
    cfg["optim_wrapper"]["optimizer"].pop("betas")
    cfg["train_dataloader"]["collate_fn"] = len
    cfg["custom_hooks"] = [object()]
    check_config(cfg)
    cfg["optim_wrapper"]["optimizer"]["nesterv"] = True
    assert "SGD has no argument 'nesterv'; did you mean 'nesterov'" in error(cfg)


def test_the_two_names_of_the_timeout_exclude_each_other():
    check_config({"env_cfg": dict(dist_cfg=dict(timeout=timedelta(minutes=3)))})
    message = error({"env_cfg": dict(timeout=5, dist_cfg=dict(timeout=5))})
    assert message == "`env_cfg.dist_cfg.timeout`: is the same setting as env_cfg.timeout; remove one of them"


def test_one_wrapper_for_each_part_of_a_model_is_left_to_its_constructor():
    own = dict(constructor="TestConstructor", generator=dict(type="TestWrapper"), critic=dict(type="TestWrapper"))
    check_config({"optim_wrapper": own})
    assert "named 'TestConstructr'" in error({"optim_wrapper": dict(own, constructor="TestConstructr")})


def test_the_names_of_the_train_loop_are_accepted_without_their_package():
    from mmengine.config.lazy import LazyObject

    theirs = LazyObject("xtuner.engine.runner", "TrainLoop")
    for type_ in ("EpochBasedTrainLoop", "mmengine.runner.IterBasedTrainLoop", theirs):
        check_config(changed("train_cfg.type", type_))
    assert "there is no loop named 'EpochTrainLop'" in error(changed("train_cfg.type", "EpochTrainLop"))
