"""Where a run starts: the table of docs/resume.md, and damaged checkpoints."""

import json
import shutil

import pytest
import torch
from parts import logged, make_runner
from safetensors.torch import save_file
from starts import EVERY_7, delete_checkpoints, printed, start

from mmtrain.errors import CheckpointError, ConfigError


def test_a_missing_checkpoint_is_reported(tmp_path, capfd):
    runner = start(tmp_path / "new", resume=True)
    assert runner.progress.iteration == 20
    assert "starting from scratch" in printed(capfd)


def test_the_newest_good_one(work, capfd):
    delete_checkpoints(work, "iter_20.pth")
    start(work, resume=True)
    assert f"Auto resumed from the latest checkpoint {work}/iter_14.pth." in printed(capfd)
    assert list(logged(work, "loss")) == list(range(1, 21))


def test_exactly_the_one_that_is_named(work, trained, tmp_path, capfd):
    start(tmp_path / "elsewhere", resume=True, load_from=str(trained / "iter_7.pth"))
    assert "Resuming at iteration 7/20" in printed(capfd)
    assert logged(tmp_path / "elsewhere", "loss") == {s: v for s, v in logged(trained, "loss").items() if s > 7}


def test_the_named_checkpoint_of_the_work_dir(work, capfd):
    start(work, resume="iter_7.pth")
    assert "Resuming at iteration 7/20" in printed(capfd)


def test_the_newest_good_one_of_another_work_dir(work, tmp_path, capfd):
    (work / "iter_20.pth" / "state.json").unlink()
    start(tmp_path / "elsewhere", resume=True, load_from=str(work))
    text = printed(capfd)
    assert "Skipped a damaged checkpoint: iter_20.pth/state.json: missing" in text
    assert f"Auto resumed from the latest checkpoint {work}/iter_14.pth." in text
    for name in ("iter_7.pth", "iter_14.pth"):
        (work / name / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"all checkpoints in .* are damaged: iter_20.*; iter_14.*; iter_7"):
        start(tmp_path / "elsewhere", resume=True, load_from=str(work))


def test_a_name_is_looked_for_in_the_work_dir_that_load_from_names(work, tmp_path, capfd):
    start(tmp_path / "elsewhere", resume="iter_7.pth", load_from=str(work))
    assert f"Resumed from the checkpoint {work}/iter_7.pth." in printed(capfd)
    start(tmp_path / "third", resume="iter_7.pth", load_from=str(work / "iter_14.pth"))
    text = printed(capfd)
    assert f"Resumed from the checkpoint {work}/iter_14.pth." in text
    assert "resume='iter_7.pth' is ignored" in text


def test_an_empty_directory_cannot_be_resumed(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is not a checkpoint and contains none"):
        start(tmp_path / "work", resume=True, load_from=str(tmp_path / "empty"))


def test_auto_continues_or_starts_from_the_weights(trained, tmp_path, capfd):
    new = tmp_path / "new"
    start(new, resume="auto", load_from=str(trained / "iter_20.pth"))
    text = printed(capfd)
    assert "starting from the weights of" in text
    assert "Loaded the weights of" in text
    shutil.rmtree(new / "iter_20.pth")
    start(new, resume="auto", load_from=str(trained / "iter_20.pth"))
    assert f"Auto resumed from the latest checkpoint {new}/iter_14.pth." in printed(capfd)


def test_only_the_weights_are_loaded_and_the_rest_starts_fresh(trained, tmp_path):
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
    assert "9 matched" in printed(capfd)


def test_weights_that_do_not_fit_are_refused_unless_allowed(trained, tmp_path):
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
def test_every_damaged_file_is_found_and_the_older_checkpoint_used(trained, tmp_path, kind, capfd):
    files = sorted(p.relative_to(trained / "iter_20.pth") for p in (trained / "iter_20.pth").rglob("*") if p.is_file())
    assert len(files) >= 6
    work = shutil.copytree(trained, tmp_path / "work")
    for file in files:
        shutil.rmtree(work / "iter_20.pth")
        shutil.copytree(trained / "iter_20.pth", work / "iter_20.pth")
        damage(work / "iter_20.pth" / file, kind)
        runner = make_runner(work, resume=True, log_level="INFO")
        assert runner.start.checkpoint.name == "iter_14.pth"
        runner.release()
        assert str(file) in printed(capfd)


def test_the_run_stops_when_none_is_good(work):
    for name in ("iter_7.pth", "iter_14.pth", "iter_20.pth"):
        damage(work / name / "state.json", "flipped")
    with pytest.raises(CheckpointError, match=r"iter_20\.pth.*state\.json.*iter_7\.pth"):
        make_runner(work, resume=True)
    make_runner(work, resume=False).release()  # the lock was released


@pytest.mark.parametrize("pointer", ["nowhere.pth", "", None, "../../etc"])
def test_a_wrong_pointer_does_not_matter(work, pointer):
    if pointer is None:
        (work / "last_checkpoint").unlink()
    else:
        (work / "last_checkpoint").write_text(pointer)
    runner = make_runner(work, resume=True)
    assert runner.start.checkpoint.name == "iter_20.pth"
    runner.release()


def test_another_seed_is_reported(work, capfd):
    start(work, resume="iter_7.pth", randomness={"seed": 6}, train_cfg={"max_iters": 8})
    assert "WARNING - THE SEED CHANGED from 5 to 6" in printed(capfd)


def test_a_finished_run_does_nothing_more(work, capfd):
    runner = start(work, resume=True)
    assert runner.progress.iteration == 20
    assert "Training is already complete (20/20 iterations). To continue, increase max_epochs" in printed(capfd)
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


def test_added_and_removed_hooks_are_reported(work, capfd):
    delete_checkpoints(work, "iter_20.pth")
    start(work, resume=True, custom_hooks=[{"type": "Counter"}], default_hooks={**EVERY_7["default_hooks"]})
    assert "not in the checkpoint: hooks.Counter" in printed(capfd)


def test_the_drawn_seed_is_the_checkpoints(tmp_path):
    first = make_runner(tmp_path, randomness={"seed": None}, **EVERY_7)
    first.train()
    delete_checkpoints(tmp_path, "iter_20.pth")
    second = make_runner(tmp_path, randomness={"seed": None}, resume=True)
    assert second.seed == first.seed
    second.release()


def test_without_positional_seeding_the_saved_generators_are_restored(tmp_path):
    off = {"randomness": {"seed": 3, "positional": False}, "train_dataloader": {"num_workers": 1}}
    uninterrupted = make_runner(tmp_path / "uninterrupted", **off, **EVERY_7)
    uninterrupted.train()
    shutil.copytree(tmp_path / "uninterrupted", tmp_path / "cut")
    delete_checkpoints(tmp_path / "cut", "iter_20.pth")
    make_runner(tmp_path / "cut", resume=True, **off).train()
    assert logged(tmp_path / "cut", "loss") == logged(tmp_path / "uninterrupted", "loss")


def test_a_start_before_the_first_checkpoint_leaves_no_log_lines(tmp_path):
    make_runner(tmp_path, default_hooks={"checkpoint": None}, train_cfg={"max_iters": 3}).train()
    make_runner(tmp_path, resume=True, **EVERY_7).train()
    assert list(logged(tmp_path, "loss")) == list(range(1, 21))
