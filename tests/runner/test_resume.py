"""Where a run begins: the table of docs/resume.md, damaged checkpoints, and changed configs."""

import json
import shutil

import pytest
import torch
from parts import logged, make_runner
from safetensors.torch import save_file

from mmtrain.errors import CheckpointError, ConfigError

EVERY_7 = {"default_hooks": {"checkpoint": {"type": "CheckpointHook", "interval": 7, "async_save": False}}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A work dir with the checkpoints of iterations 7, 14 and 20."""
    folder = tmp_path_factory.mktemp("trained") / "work"
    make_runner(folder, **EVERY_7).train()
    return folder


@pytest.fixture
def work(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "work")


def said(capfd):
    return capfd.readouterr().err


def start(work, **changes):
    runner = make_runner(work, log_level="INFO", **{**EVERY_7, **changes})
    runner.train()
    return runner


def forget(work, *names):
    for name in names:
        shutil.rmtree(work / name)


def test_nothing_to_resume_says_so(tmp_path, capfd):
    runner = start(tmp_path / "new", resume=True)
    assert runner.progress.iteration == 20
    assert "starting from scratch" in said(capfd)


def test_the_newest_good_one(work, capfd):
    forget(work, "iter_20.pth")
    start(work, resume=True)
    assert f"Auto resumed from the latest checkpoint {work}/iter_14.pth." in said(capfd)
    assert list(logged(work, "loss")) == list(range(1, 21))


def test_exactly_the_one_that_is_named(work, trained, tmp_path, capfd):
    start(tmp_path / "elsewhere", resume=True, load_from=str(trained / "iter_7.pth"))
    assert "stands at iteration 7 of 20" in said(capfd)
    assert logged(tmp_path / "elsewhere", "loss") == {s: v for s, v in logged(trained, "loss").items() if s > 7}


def test_the_one_of_that_name_in_the_work_dir(work, capfd):
    start(work, resume="iter_7.pth")
    assert "stands at iteration 7 of 20" in said(capfd)


def test_auto_continues_or_begins_with_the_weights(trained, tmp_path, capfd):
    new = tmp_path / "new"
    start(new, resume="auto", load_from=str(trained / "iter_20.pth"))
    text = said(capfd)
    assert "starting from the weights of" in text
    assert "Loaded the weights of" in text
    shutil.rmtree(new / "iter_20.pth")
    start(new, resume="auto", load_from=str(trained / "iter_20.pth"))
    assert f"Auto resumed from the latest checkpoint {new}/iter_14.pth." in said(capfd)


def test_weights_alone_start_everything_else_anew(trained, tmp_path):
    runner = make_runner(tmp_path, load_from=str(trained / "iter_20.pth"), train_cfg={"max_iters": 1})
    seen = {}

    def note(runner):
        seen.update(weights=runner.model.last.weight.clone(), state=len(runner.optim_wrapper.optimizer.state))

    runner.hooks.points["before_train"].append(note)
    runner.train()
    trained_weights = make_runner(tmp_path / "b", resume=True, load_from=str(trained / "iter_20.pth"))
    trained_weights.train()
    assert torch.equal(seen["weights"], trained_weights.model.last.weight)
    assert seen["state"] == 0
    assert runner.progress.iteration == 1


@pytest.mark.parametrize("kind", ["state dict", "mmengine", "safetensors", "hugging face", "file address"])
def test_weights_of_other_programs(kind, trained, tmp_path, capfd):
    source = make_runner(tmp_path / "source", resume=True, load_from=str(trained / "iter_20.pth"))
    source.train()
    state = source.model.state_dict()
    path = tmp_path / "weights.pth"
    if kind == "mmengine":
        torch.save({"meta": {"epoch": 3}, "state_dict": state, "message_hub": {}}, path)
    elif kind == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(state, path)
    elif kind == "hugging face":
        path = tmp_path / "folder"
        path.mkdir()
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(state, path)
    address = path.as_uri() if kind == "file address" else str(path)
    runner = make_runner(tmp_path / "run", load_from=address, train_cfg={"max_iters": 1}, log_level="INFO")
    first = {}
    runner.hooks.points["before_train"].append(
        lambda r: first.update({k: v.clone() for k, v in r.model.state_dict().items()})
    )
    runner.train()
    assert all(torch.equal(first[name], value) for name, value in state.items())
    assert "9 matched" in said(capfd)


def test_weights_that_do_not_fit_are_refused_unless_told_otherwise(trained, tmp_path):
    wrong = {"model": {"hidden": 5}, "load_from": str(trained / "iter_20.pth"), "train_cfg": {"max_iters": 1}}
    with pytest.raises(CheckpointError, match="a shape is wrong"):
        start(tmp_path / "a", **wrong)
    start(tmp_path / "b", load_options={"allow_mismatch": True}, **wrong)


def test_names_can_be_revised(trained, tmp_path, capfd):
    renamed = tmp_path / "renamed.pth"
    model = make_runner(tmp_path / "m").model
    torch.save({f"backbone.{name}": value for name, value in model.state_dict().items()}, renamed)
    with pytest.raises(CheckpointError, match="no name matches"):
        start(tmp_path / "a", load_from=str(renamed), train_cfg={"max_iters": 1})
    start(
        tmp_path / "b", load_from=str(renamed), load_options={"revise_keys": [("^backbone.", "")]}, train_cfg={"max_iters": 1}
    )  # fmt: skip


def test_a_file_of_weights_cannot_be_resumed(tmp_path):
    torch.save({}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"w\.pth.*resume=False, load_from"):
        make_runner(tmp_path / "work", resume=True, load_from=str(tmp_path / "w.pth"))


def damage(path, kind):
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(bytes(data))


@pytest.mark.parametrize("kind", ["missing", "truncated", "flipped"])
def test_every_damaged_file_is_found_and_the_older_one_taken(trained, tmp_path, kind, capfd):
    files = sorted(p.relative_to(trained / "iter_20.pth") for p in (trained / "iter_20.pth").rglob("*") if p.is_file())
    assert len(files) >= 6
    work = shutil.copytree(trained, tmp_path / "work")
    for file in files:
        shutil.rmtree(work / "iter_20.pth")
        shutil.copytree(trained / "iter_20.pth", work / "iter_20.pth")
        damage(work / "iter_20.pth" / file, kind)
        runner = make_runner(work, resume=True, log_level="INFO")
        assert runner._resume.checkpoint.name == "iter_14.pth"
        runner.release()
        assert str(file) in said(capfd)


def test_the_run_stops_when_none_is_good(work):
    for name in ("iter_7.pth", "iter_14.pth", "iter_20.pth"):
        damage(work / name / "state.json", "flipped")
    with pytest.raises(CheckpointError, match=r"iter_20\.pth.*state\.json.*iter_7\.pth"):
        make_runner(work, resume=True)
    make_runner(work, resume=False).release()  # the lock was given back


@pytest.mark.parametrize("pointer", ["nowhere.pth", "", None, "../../etc"])
def test_a_pointer_that_lies_does_not_matter(work, pointer):
    if pointer is None:
        (work / "last_checkpoint").unlink()
    else:
        (work / "last_checkpoint").write_text(pointer)
    runner = make_runner(work, resume=True)
    assert runner._resume.checkpoint.name == "iter_20.pth"
    runner.release()


def test_a_finished_run_does_nothing_more(work, capfd):
    runner = start(work, resume=True)
    assert runner.progress.iteration == 20
    assert list(logged(work, "loss")) == list(range(1, 21))


def test_best_is_kept_through_a_restart(tmp_path):
    hook = {"checkpoint": {"type": "CheckpointHook", "interval": 5, "save_best": "loss", "max_keep_ckpts": 1}}
    make_runner(tmp_path, default_hooks=hook, train_cfg={"max_iters": 20, "val_interval": 5}).train()
    first = json.loads((tmp_path / "best.json").read_text())
    assert (tmp_path / first["loss"]["checkpoint"]).is_dir()
    metrics = logged(tmp_path, "loss", mode="val")
    assert first["loss"]["value"] == min(value for (value,) in metrics.values())
    more = make_runner(tmp_path, default_hooks=hook, train_cfg={"max_iters": 40, "val_interval": 5}, resume=True)
    more.train()
    metrics = logged(tmp_path, "loss", mode="val")
    best = json.loads((tmp_path / "best.json").read_text())
    assert best["loss"]["value"] == min(value for (value,) in metrics.values())
    assert (tmp_path / best["loss"]["checkpoint"]).is_dir()
    kept = sorted(path.name for path in tmp_path.glob("*.pth"))
    assert set(kept) == {"iter_40.pth", best["loss"]["checkpoint"]}


# ---- changed configs ------------------------------------------------------------------------------------------------


def test_a_longer_run_follows_the_longer_curve(work, tmp_path):
    start(work, resume=True, train_cfg={"max_iters": 40})
    make_runner(tmp_path / "whole", train_cfg={"max_iters": 40}).train()
    extended, whole = logged(work, "lr"), logged(tmp_path / "whole", "lr")
    assert {step: extended[step] for step in range(21, 41)} == {step: whole[step] for step in range(21, 41)}


def test_todays_learning_rate_and_decay_rule(work, capfd):
    forget(work, "iter_20.pth")
    runner = start(work, resume=True, optim_wrapper={"optimizer": {"type": "AdamW", "lr": 0.5, "weight_decay": 0.3}})
    text = said(capfd)
    assert "optim_wrapper.optimizer.lr: 0.01 -> 0.5 (honoured)" in text
    assert runner.optim_wrapper.param_groups[0]["weight_decay"] == 0.3
    assert logged(work, "lr")[15][0] > 0.05


def test_half_the_batch_doubles_the_iterations(work, capfd):
    forget(work, "iter_20.pth")  # stands at iteration 14 at batch 8: 2 passes of 6, and 16 samples of the third
    runner = start(
        work, resume=True, train_dataloader={"batch_size": 4}, optim_wrapper={"accumulative_counts": 2}, train_cfg={"max_iters": 40}
    )  # fmt: skip
    text = said(capfd)
    assert "stands at iteration 26 of 40, epoch 3, sample 16 of the epoch" in text
    assert "equivalent" in text
    assert runner.progress.epoch == 3


def test_a_changed_effective_batch_is_warned_about_loudly(work, capfd):
    forget(work, "iter_20.pth")
    start(work, resume=True, train_dataloader={"batch_size": 16})
    text = said(capfd)
    assert "WARNING - THE EFFECTIVE BATCH CHANGED from 8 to 16" in text
    assert "0.02" in text
    assert "0.0141421" in text


def test_every_sample_of_a_pass_is_seen_once_over_a_change_of_batch(work):
    seen = []

    class Seen:
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if runner.progress.epoch == 2:
                seen.extend(map(tuple, data_batch["x"].tolist()))

    plain = {"dataset": {"type": "NoisyPoints", "augment": False}}
    fresh = work.parent / "fresh"
    make_runner(fresh, train_dataloader=plain, train_cfg={"max_iters": 14}, custom_hooks=[Seen()], **EVERY_7).train()
    make_runner(
        fresh, train_dataloader={**plain, "batch_size": 5}, train_cfg={"max_iters": 28}, custom_hooks=[Seen()], resume=True, **EVERY_7
    ).train()  # fmt: skip
    assert len(seen) == 44
    assert len(set(seen)) == 44


def test_what_cannot_go_on_is_refused(work):
    with pytest.raises(CheckpointError, match=r"SGD.*used AdamW"):
        start(work, resume=True, optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}}, train_cfg={"max_iters": 30})
    with pytest.raises(CheckpointError, match="training data differ"):
        start(
            work,
            resume=True,
            train_dataloader={"dataset": {"type": "NoisyPoints", "size": 45}},
            train_cfg={"max_iters": 30},
        )
    with pytest.raises(CheckpointError, match="does not fit this run"):
        start(work, resume=True, model={"hidden": 9}, train_cfg={"max_iters": 30})


def test_other_data_on_request(work):
    runner = start(
        work, resume=True, resume_data="restart", train_dataloader={"dataset": {"type": "NoisyPoints", "size": 80}},
        train_cfg={"max_iters": 22},
    )  # fmt: skip
    assert runner.progress.offset == 16
    assert runner.progress.iteration == 22


def test_hooks_that_came_and_went_are_reported(work, capfd):
    forget(work, "iter_20.pth")
    start(work, resume=True, custom_hooks=[{"type": "Counter"}], default_hooks={**EVERY_7["default_hooks"]})
    assert "not in the checkpoint: hooks.Counter" in said(capfd)


def test_the_drawn_seed_is_the_checkpoints(tmp_path):
    first = make_runner(tmp_path, randomness={"seed": None}, **EVERY_7)
    first.train()
    forget(tmp_path, "iter_20.pth")
    second = make_runner(tmp_path, randomness={"seed": None}, resume=True)
    assert second.seed == first.seed
    second.release()


def test_frozen_parameters_can_be_left_out(tmp_path):
    hook = {"checkpoint": {"type": "CheckpointHook", "interval": 7, "save_frozen": False, "async_save": False}}
    runner = make_runner(tmp_path, model={"frozen": True}, default_hooks=hook)
    runner.train()
    forget(tmp_path, "iter_20.pth")
    resumed = make_runner(tmp_path, model={"frozen": True}, default_hooks=hook, resume=True)
    names = resumed._resume.checkpoint.tensor_names("model")
    assert "first.weight" not in names
    assert "last.weight" in names
    resumed.train()
    assert torch.equal(resumed.model.last.weight, runner.model.last.weight)


def test_without_positional_seeding_the_saved_generators_rule(tmp_path):
    off = {"randomness": {"seed": 3, "positional": False}, "train_dataloader": {"num_workers": 1}}
    whole = make_runner(tmp_path / "whole", **off, **EVERY_7)
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    forget(tmp_path / "cut", "iter_20.pth")
    make_runner(tmp_path / "cut", resume=True, **off).train()
    assert logged(tmp_path / "cut", "loss") == logged(tmp_path / "whole", "loss")


def test_a_start_before_the_first_checkpoint_leaves_no_lines(tmp_path):
    make_runner(tmp_path, default_hooks={"checkpoint": None}, train_cfg={"max_iters": 3}).train()
    make_runner(tmp_path, resume=True, **EVERY_7).train()
    assert list(logged(tmp_path, "loss")) == list(range(1, 21))
