"""When CheckpointHook asks for a save, which checkpoint is the best, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from parts import Journal, Net, config, make_runner
from safetensors.torch import load_file

from mmtrain.checkpoint.format.manifest import decode, encode
from mmtrain.errors import ConfigError, RunError
from mmtrain.hooks import CheckpointHook, EMAHook
from mmtrain.registry import MODELS
from mmtrain.runner import FlexibleRunner


class Runner:
    """A minimal runner that records the requests."""

    def __init__(self, by_epoch=False, end=20):
        self.asked, self.iter, self.epoch, self.end = [], 0, 0, end
        self.max_iters, self.logger, self.lines = end, self, []
        self.train_loop, self.by_epoch = self, by_epoch

    @property
    def finished(self):
        return self.iter + 1 == self.end

    def request_save(self, reason, **options):
        self.asked.append((self.iter + 1, reason, options))

    def info(self, form, *arguments):
        self.lines.append(form % arguments)


class Saved:
    """Notes which checkpoints were saved."""

    def __init__(self):
        self.names = []

    def after_save_checkpoint(self, runner, entry):
        self.names.append(entry)


def iterations(hook, end=20):
    runner = Runner(end=end)
    hook.before_train(runner)
    for runner.iter in range(end):
        hook.after_train_iter(runner, batch_idx=0)
    return runner.asked


def test_every_interval_and_the_last():
    assert [(at, why) for at, why, _ in iterations(CheckpointHook(interval=6))] == [
        (6, "interval"), (12, "interval"), (18, "interval"), (20, "last"),
    ]  # fmt: skip


def test_the_last_one_is_not_requested_twice():
    assert [at for at, _, _ in iterations(CheckpointHook(interval=10))] == [10, 20]
    assert [at for at, _, _ in iterations(CheckpointHook(interval=6, save_last=False))] == [6, 12, 18]


def test_save_begin():
    assert [at for at, _, _ in iterations(CheckpointHook(interval=4, save_begin=10, save_last=False))] == [10, 14, 18]


def test_weights_have_their_own_interval():
    asked = iterations(CheckpointHook(interval=-1, weights_interval=8, save_last=False))
    assert asked == [(8, "weights", {"weights_only": True}), (16, "weights", {"weights_only": True})]


def test_seconds_are_measured_by_a_clock_and_give_temporary_ones():
    times = iter(range(0, 1000, 3))
    asked = iterations(CheckpointHook(every_seconds=20, save_last=False, clock=lambda: next(times)))
    assert asked
    assert all((why, options) == ("time", {"temporary": True}) for _, why, options in asked)


def test_epochs():
    hook, runner = CheckpointHook(interval=2), Runner(by_epoch=True)
    hook.before_train(runner)
    asked_at = []
    for runner.epoch in range(5):
        runner.asked.clear()
        hook.after_train_epoch(runner)
        if runner.asked:
            asked_at.append(runner.epoch + 1)
    assert asked_at == [2, 4]


def epochs(hook, end):
    runner = Runner(by_epoch=True)
    hook.before_train(runner)
    for runner.epoch in range(end):
        hook.after_train_epoch(runner)
    return runner


@pytest.mark.parametrize("options", [{}, {"save_best": "loss"}, {"max_keep_ckpts": 5}, {"weights_interval": 4}])
def test_without_an_interval_every_epoch_or_ten_times_is_saved(options):
    assert len(epochs(CheckpointHook(**options), 4).asked) - 4 == ("weights_interval" in options)
    for end, every in [(20, 2), (5, 1), (100, 10), (10_000, 1000), (12_000, 1000)]:
        due = [at for at, why, _ in iterations(CheckpointHook(**options), end) if why == "interval"]
        assert due == list(range(every, end + 1, every))
    hook = CheckpointHook(**options)
    assert hook.every_seconds == 900
    assert hook.save_policy.max_keep_ckpts == options.get("max_keep_ckpts", 3)


@pytest.mark.parametrize("options", [{"interval": 7}, {"interval": -1}, {"every_seconds": 60}])
def test_what_says_when_replaces_all_defaults(options):
    hook = CheckpointHook(**options)
    assert (hook.every_seconds, hook.save_policy.max_keep_ckpts) == (options.get("every_seconds"), -1)
    due = [at for at, why, _ in iterations(hook) if why == "interval"]
    assert due == ([7, 14] if options.get("interval") == 7 else [])


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "every epoch, every 15 minutes, at the end; the newest 3 are kept"),
        ({"interval": 2, "save_last": False}, "every 2 epochs; all are kept"),
        ({"interval": 500, "by_epoch": False, "max_keep_ckpts": 3, "save_begin": 1000},
         "every 500 iterations from iteration 1,000, at the end; the newest 3 are kept"),
        ({"interval": 1, "every_seconds": 30, "save_best": "acc"},
         "every epoch, every 30 seconds, at the best acc, at the end; all are kept"),
        ({"interval": -1}, "at the end; all are kept. A run that is killed before starts over: set interval or every_seconds"),
        ({"interval": -1, "save_last": False}, "none; all are kept. A run that is killed before starts over: set interval or every_seconds"),
    ],
)  # fmt: skip
def test_one_line_at_the_start_says_when_checkpoints_are_saved(options, line):
    assert epochs(CheckpointHook(**options), 0).lines == [f"Checkpoints: {line}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interval": 0}, "interval is 0"),
        ({"interval": -2}, "interval is -2"),
        ({"save_begin": -1}, "save_begin is -1"),
        ({"every_seconds": 0}, "every_seconds is 0"),
        ({"keep_every": -3}, "keep_every is -3"),
        ({"published_keys": ["meta", "optimizer"]}, "expected some of meta, state_dict, ema_state_dict"),
        ({"on_save_error": "cry"}, "'continue' or 'stop'"),
        ({"save_best": ["a", "b"], "rule": ["less", "less", "less"]}, "3 entries for 2"),
        ({"save_best": "a", "rule": "more"}, "'greater' or 'less'"),
        ({"interval": 1.5}, r"interval is 1\.5; expected a positive integer"),
        ({"interval": True}, "interval is True"),
        ({"interval": "10"}, "interval is '10'"),
        ({"save_begin": "3"}, "save_begin is '3'"),
        ({"max_keep_ckpts": 2.5}, r"max_keep_ckpts is 2\.5; expected an integer"),
        ({"max_keep_ckpts": "3"}, "max_keep_ckpts is '3'"),
        ({"weights_interval": 0.5}, r"weights_interval is 0\.5"),
        ({"every_seconds": "900"}, "every_seconds is '900'; expected a positive number of seconds"),
        ({"every_seconds": float("nan")}, "every_seconds is nan"),
        ({"save_last": "no"}, "save_last is 'no'; expected True or False"),
        ({"by_epoch": "yes"}, "by_epoch is 'yes'"),
        ({"out_dir": 5}, "out_dir is 5; expected a directory"),
        ({"save_best": True}, "save_best is True; expected a name or a list of names"),
        ({"save_best": ["auto", "loss"]}, "each metric once, or 'auto' alone"),
        ({"save_best": ["loss", "loss"]}, "each metric once"),
        ({"greater_keys": 5}, "greater_keys is 5"),
        ({"filename_tmpl": "{}_{}.pth"}, "a name with one {} for the number"),
        ({"filename_tmpl": "{name}.pth"}, "a name with one {} for the number"),
        ({"filename_tmpl": "{"}, "a name with one {} for the number"),
        ({"filename_tmpl": "deep/{}.pth"}, "expected a name without /"),
        ({"filename_tmpl": ".iter_{}.pth"}, "expected a name without /"),
    ],
)
def test_arguments_are_checked_at_once(arguments, message):
    with pytest.raises(ConfigError, match=message):
        CheckpointHook(**arguments)


def test_a_template_without_a_number_is_refused(tmp_path):
    hook = {"checkpoint": {"type": "CheckpointHook", "filename_tmpl": "model.pth"}}
    with pytest.raises(ConfigError, match=r"filename_tmpl is 'model\.pth'"):
        make_runner(tmp_path, default_hooks=hook)


def test_a_template_counts_in_one_unit(tmp_path):
    """Epochs and iterations under one template would have the same names."""
    clock = iter(range(99)).__next__
    hook = {"type": "CheckpointHook", "filename_tmpl": "model_{}", "clock": clock, "every_seconds": 4}
    plan = {"train_cfg": {"by_epoch": True, "max_epochs": 2, "max_iters": None, "val_interval": 9}}
    journal = Journal()
    make_runner(tmp_path, default_hooks={"checkpoint": hook}, custom_hooks=[journal], **plan).train()
    names = [line.split()[1] for line in journal.lines if line.startswith("after_save_checkpoint")]
    assert names == [*(name for name in names if name.startswith("iter_")), "model_2"]
    assert len(names) > 1


def test_a_rule_without_a_metric_has_no_effect(tmp_path):
    hook = {"checkpoint": {"type": "CheckpointHook", "rule": "less"}}
    make_runner(tmp_path, default_hooks=hook, train_cfg={"max_iters": 4, "val_interval": 2}).train()
    assert not (tmp_path / "best.json").exists()


def best_run(tmp_path, **options):
    hook = {"checkpoint": {"type": "CheckpointHook", "interval": -1, "save_last": False, **options}}
    runner = make_runner(tmp_path, default_hooks=hook, train_cfg={"max_iters": 12, "val_interval": 3})
    runner.train()
    return json.loads((tmp_path / "best.json").read_text()), sorted(path.name for path in tmp_path.glob("*.pth"))


@pytest.mark.parametrize(("metric", "better"), [("loss", min), ("accuracy", max)])
def test_only_improvements_are_saved(tmp_path, metric, better):
    from parts import logged

    best, there = best_run(tmp_path, save_best=metric, max_keep_ckpts=1)
    values = {step: value for step, (value,) in logged(tmp_path, metric, mode="val").items()}
    assert best[metric]["value"] == better(values.values())
    assert best[metric]["checkpoint"] in there


def test_auto_takes_the_first_metric(tmp_path):
    assert list(best_run(tmp_path, save_best="auto")[0]) == ["loss"]


def test_the_best_by_another_rule_does_not_count_after_a_resume(tmp_path, capfd):
    def run(rule, end):
        hook = {"type": "CheckpointHook", "interval": 5, "save_best": ["loss", "accuracy"], "rule": rule}
        changes = {"default_hooks": {"checkpoint": hook}, "train_cfg": {"max_iters": end, "val_interval": 5}}
        make_runner(tmp_path, resume="auto", **changes).train()
        return json.loads((tmp_path / "best.json").read_text())

    before = run(["less", "greater"], 10)
    after = run(["greater", "greater"], 15)
    assert after["loss"]["iteration"] == 15
    assert after["accuracy"]["value"] >= before["accuracy"]["value"]
    errors = capfd.readouterr().err
    assert errors.count("was found with rule='less'; with rule='greater' the search starts over") == 1
    assert run(["greater", "greater"], 15) == after
    assert "starts over" not in capfd.readouterr().err


def test_a_metric_whose_rule_cannot_be_inferred(tmp_path):
    with pytest.raises(ConfigError, match="set rule='greater' or rule='less'"):
        best_run(tmp_path, save_best="accuracy", greater_keys=["qq"], less_keys=["zz"])


def test_a_validation_without_training_saves_nothing(tmp_path):
    hook = {"checkpoint": {"type": "CheckpointHook", "interval": 5, "save_best": "loss"}}
    make_runner(tmp_path / "trained").train()
    runner = make_runner(tmp_path / "alone", default_hooks=hook, load_from=str(tmp_path / "trained" / "iter_20.pth"))
    assert "loss" in runner.val()
    assert not list(tmp_path.glob("alone/*.pth"))


def test_weights_are_plain_safetensors(tmp_path):
    hook = {"checkpoint": {"type": "CheckpointHook", "weights_interval": 10}}
    runner = make_runner(tmp_path, default_hooks=hook)
    runner.train()
    weights = load_file(tmp_path / "weights" / "iter_20.safetensors")
    state = runner.model.state_dict()
    assert weights.keys() == state.keys()
    assert all((weights[name] == value).all() for name, value in state.items())
    assert (tmp_path / "weights" / "iter_10.safetensors").exists()


class _Settings:
    def save_pretrained(self, folder):
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "config.json").write_text("{}")


@MODELS.register_module()
class PretrainedNet(Net):
    """Has the attributes by which a Hugging Face model is recognised."""

    config = _Settings()
    save_pretrained = None


def test_weights_of_a_hugging_face_model_are_a_directory(tmp_path):
    hook = {"checkpoint": {"type": "CheckpointHook", "weights_interval": 20}}
    runner = make_runner(tmp_path, default_hooks=hook, model={"type": "PretrainedNet"})
    runner.train()
    there = tmp_path / "weights" / "iter_20"
    assert sorted(path.name for path in there.iterdir()) == ["config.json", "model.safetensors"]
    assert load_file(there / "model.safetensors").keys() == runner.model.state_dict().keys()


def test_retention_keeps_the_newest_and_the_multiples(tmp_path):
    hook = {"checkpoint": {"type": "CheckpointHook", "interval": 2, "max_keep_ckpts": 2, "keep_every": 8}}
    make_runner(tmp_path, default_hooks=hook).train()
    there = {path.name for path in tmp_path.glob("*.pth")}
    assert there == {"iter_8.pth", "iter_16.pth", "iter_18.pth", "iter_20.pth"}


def test_retention_deletes_only_what_this_run_saved(tmp_path):
    """Copies and what another run saved, under whatever name, stay; over a resume it is the same run."""
    make_runner(tmp_path / "other", train_cfg={"max_iters": 7}).train()
    work = tmp_path / "work"
    shutil.copytree(tmp_path / "other" / "iter_7.pth", work / "iter_7.pth")
    hook = {"checkpoint": {"type": "CheckpointHook", "interval": 2, "max_keep_ckpts": 1}}
    make_runner(work, default_hooks=hook, train_cfg={"max_iters": 6}, resume="iter_7.pth").release()
    make_runner(work, default_hooks=hook, train_cfg={"max_iters": 6}).train()
    shutil.copytree(work / "iter_6.pth", work / "before_lr_change")
    shutil.copytree(tmp_path / "other" / "iter_7.pth", work / "iter_70.pth")
    make_runner(work, default_hooks=hook, train_cfg={"max_iters": 12}, resume="iter_6.pth").train()
    make_runner(work, default_hooks=hook, train_cfg={"max_iters": 16}, resume="iter_12.pth").train()
    there = {path.name for path in work.iterdir() if path.is_dir() and path.name[:2] != "20"}
    assert there == {"iter_7.pth", "before_lr_change", "iter_70.pth", "iter_12.pth", "iter_16.pth"}


@pytest.mark.parametrize(("mode", "status"), [("continue", "continues"), ("stop", "stops")])
def test_a_save_that_fails(tmp_path, monkeypatch, mode, status, capfd):
    """A full disk at iteration 10: older checkpoints stay, the failure is repeated, and a later save ends it."""
    from mmtrain.files import LocalFiles

    real, full = LocalFiles.write, {"now": False}

    def write(self, handle, data):
        if full["now"]:
            raise OSError(28, "No space left on device")
        return real(self, handle, data)

    class Disk:
        def before_save_checkpoint(self, runner, checkpoint):
            full["now"] = checkpoint["name"] == "iter_10.pth"

    monkeypatch.setattr(LocalFiles, "write", write)
    hook = {"checkpoint": {"type": "CheckpointHook", "interval": 5, "async_save": False, "on_save_error": mode}}
    runner = make_runner(tmp_path, default_hooks=hook, custom_hooks=[Disk()])
    if mode == "stop":
        with pytest.raises(RunError, match=r"iter_10\.pth could not be written.*No space left"):
            runner.train()
    else:
        runner.train()
    there = {path.name for path in tmp_path.iterdir() if path.name.startswith((".iter", "iter"))}
    reports = capfd.readouterr().err.count("checkpoint iter_10.pth could not be written")
    if mode == "stop":
        assert there == {"iter_5.pth"}
    else:
        assert there == {"iter_5.pth", "iter_15.pth", "iter_20.pth"}
        assert reports == 1 + 5  # at once, and at the log lines until iteration 15 was saved


def test_a_failed_save_does_not_hide_why_the_run_ends(tmp_path, monkeypatch, capfd):
    from mmtrain.files import LocalFiles

    def write(self, handle, data):
        raise OSError(28, "No space left on device")

    class Broken:
        def after_save_checkpoint(self, runner, entry):
            raise AssertionError

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if runner.iter == 5:
                monkeypatch.setattr(runner.checkpointer, "finish", lambda _: None)  # the failure is not reported yet
            if runner.iter == 6:
                raise ValueError("a bug of the user's")

    monkeypatch.setattr(LocalFiles, "write", write)
    hook = {"checkpoint": {"type": "CheckpointHook", "interval": 6}}
    runner = make_runner(tmp_path, default_hooks=hook, custom_hooks=[Broken()])
    with pytest.raises(ValueError, match="a bug of the user's"):
        runner.train()
    assert "iter_6.pth was not saved: [Errno 28] No space left on device" in capfd.readouterr().err
    make_runner(tmp_path, default_hooks=hook).release()  # the lock was released


def test_what_a_kill_left_undone_is_done_at_the_next_start(tmp_path):
    """Killed after the rename of a checkpoint, before the record of the best and before retention."""
    hook = {"checkpoint": {"type": "CheckpointHook", "interval": 5, "max_keep_ckpts": 1, "save_best": "loss"}}
    options = {"default_hooks": hook, "train_cfg": {"max_iters": 20, "val_interval": 20}}
    make_runner(tmp_path, **options).train()
    recorded = (tmp_path / "best.json").read_text()
    (tmp_path / "best.json").unlink()
    shutil.copytree(tmp_path / "iter_20.pth", tmp_path / "iter_15.pth")
    manifest = tmp_path / "iter_15.pth" / "manifest.json"
    older = decode(manifest.read_bytes())
    older.position["iteration"] = 15
    older.name = "iter_15.pth"
    manifest.write_bytes(encode(older))
    make_runner(tmp_path, resume=True, **options).train()
    assert (tmp_path / "best.json").read_text() == recorded
    assert [path.name for path in tmp_path.glob("*.pth")] == ["iter_20.pth"]


def test_the_resumed_checkpoint_is_not_pruned_at_once(tmp_path):
    hook = {"checkpoint": {"type": "CheckpointHook", "interval": 5, "max_keep_ckpts": -1}}
    make_runner(tmp_path, default_hooks=hook).train()
    hook = {"checkpoint": {"type": "CheckpointHook", "interval": 50, "max_keep_ckpts": 1, "save_last": False}}
    make_runner(tmp_path, default_hooks=hook, resume="iter_10.pth", train_cfg={"max_iters": 11}).train()
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == ["iter_10.pth", "iter_20.pth"]


def test_the_published_models_are_read_by_mmengine(tmp_path):
    from mmengine.runner.checkpoint import load_state_dict

    hook = {"interval": 5, "save_best": "loss", "published_keys": ["meta", "state_dict", "ema_state_dict"]}
    changes = {
        "default_hooks": {"checkpoint": {"type": "CheckpointHook", **hook}},
        "custom_hooks": [EMAHook(momentum=0.3)],
    }
    runner = make_runner(tmp_path, **changes)
    runner.train()
    best = json.loads((tmp_path / "best.json").read_text())["loss"]["checkpoint"]
    written = {path.name.partition("-")[0]: path for path in tmp_path.glob("*-????????.pth")}
    assert set(written) == {"iter_20", best.removesuffix(".pth")}
    content = torch.load(written["iter_20"], weights_only=True)
    assert content["meta"]["iter"] == 20
    for name, value in runner.strategy.model_state().items():
        assert torch.equal(content["ema_state_dict"][name], value), name  # MMEngine's EMAHook swaps the two as well
    assert any(not torch.equal(content["state_dict"][name], value) for name, value in content["ema_state_dict"].items())
    fresh = make_runner(tmp_path / "other").model
    load_state_dict(fresh, content["state_dict"], strict=True)
    names = {path.name for path in tmp_path.glob("*.pth")}
    again = make_runner(tmp_path, resume=True, **changes)
    again.train()
    assert {path.name for path in tmp_path.glob("*.pth")} == names  # the same contents have the same name
    with pytest.raises(ConfigError, match="is a weights file, which has no position"):
        make_runner(tmp_path, resume=True, load_from=str(written["iter_20"])).train()


@pytest.mark.parametrize(
    ("train_cfg", "names", "line"),
    [
        ({"by_epoch": True, "max_epochs": 5}, ["epoch_3.pth", "epoch_4.pth", "epoch_5.pth"], "every epoch"),
        ({"max_iters": 40}, ["iter_32.pth", "iter_36.pth", "iter_40.pth"], "every 4 iterations"),
    ],
)
def test_a_config_without_a_checkpoint_entry_saves_regularly(tmp_path, capfd, train_cfg, names, line):
    saved = Saved()
    cfg = config(tmp_path, log_level="INFO", custom_hooks=[saved])
    cfg["train_cfg"] = train_cfg
    del cfg["default_hooks"]["checkpoint"]
    FlexibleRunner.from_cfg(cfg).train()
    assert f"Checkpoints: {line}, every 15 minutes, at the end; the newest 3 are kept" in capfd.readouterr().err
    assert len(saved.names) == {5: 5, 40: 10}[list(train_cfg.values())[-1]]
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == names


def test_checkpoint_none_switches_saving_off_and_says_so(tmp_path, capfd):
    make_runner(tmp_path, log_level="INFO", default_hooks={"checkpoint": None}).train()
    assert "Checkpoints: only on SIGTERM, SIGUSR1 and Ctrl-C, because" in capfd.readouterr().err
    assert not list(tmp_path.glob("*.pth"))


@pytest.mark.parametrize(
    "options", [{"interval": 15}, {"interval": 15, "save_optimizer": False}, {"async_save": False}, None]
)
def test_the_buffer_of_asynchronous_saves_is_made_before_the_first_is_due(tmp_path, options):
    class Sizes:
        priority = "LOWEST"

        def __init__(self):
            self.before, self.after = 0, 0

        def before_save_checkpoint(self, runner, checkpoint):
            self.before = self.before or runner.checkpointer.store.buffer_bytes

        def after_save_checkpoint(self, runner, entry):
            self.after = self.after or runner.checkpointer.store.buffer_bytes

    sizes = Sizes()
    hook = None if options is None else {"type": "CheckpointHook", **options}
    make_runner(tmp_path, default_hooks={"checkpoint": hook}, custom_hooks=[sizes]).train()
    is_made = options is not None and options.get("async_save", True)
    assert (sizes.before > 0) == is_made
    assert sizes.before == sizes.after
