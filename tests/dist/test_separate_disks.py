"""Nodes that do not share a disk: processes with their own directories under the same relative name."""

import shutil
from pathlib import Path

import pytest
from exactness import assert_same, left_behind
from ranks import Group, RankError

from mmtrain.checkpoint import CheckpointStore, open_checkpoint
from mmtrain.errors import CheckpointError

SEPARATE, SHARED = [0, 1], [0, 0]
STRATEGIES = {"ddp": {"type": "DDPStrategy"}, "fsdp": {"type": "FSDPStrategy", "wrap": ["TinyBlock"]}}
HOOKS = {
    "logger": {"type": "LoggerHook", "interval": 1},
    "checkpoint": {"type": "CheckpointHook", "interval": 10, "max_keep_ckpts": 2},
}


def options(kind):
    return {"strategy": STRATEGIES[kind], "iterations": 40, "dropout": 0.1, "default_hooks": HOOKS}


def checkpoints(folder, node):
    return sorted(path.name for path in (folder / f"node{node}" / "work").glob("iter_*"))


def together(folder, nodes=2):
    """The directories of all nodes, copied into one."""
    for node in range(nodes):
        shutil.copytree(folder / f"node{node}" / "work", folder / "all", dirs_exist_ok=True)
    return folder / "all"


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def warnings(folder):
    return "".join(path.read_text() for path in sorted((folder / "node0" / "work").glob("*/run.log")))


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def runs(request, pair, tmp_path_factory):
    """An uninterrupted run in a shared directory, and one on separate disks that was stopped at iteration 34."""
    folder, kind = tmp_path_factory.mktemp(request.param), request.param
    pair.run("separate_disk_jobs", "train", folder=str(folder / "uninterrupted"), nodes=SHARED, **options(kind))
    crash = ["iteration", 34]
    pair.run("separate_disk_jobs", "train", folder=str(folder / "broken"), nodes=SEPARATE, crash=crash, **options(kind))
    return kind, left_behind(folder / "uninterrupted" / "node0" / "work"), folder / "broken"


@pytest.fixture
def broken(runs, tmp_path):
    shutil.copytree(runs[2], tmp_path / "run")
    return tmp_path / "run"


def resume(pair, kind, folder, nodes=SEPARATE):
    return pair.run("separate_disk_jobs", "train", folder=str(folder), nodes=nodes, **options(kind))


def test_every_node_keeps_its_part_and_resumes_exactly(pair, runs, broken):
    kind, uninterrupted, _ = runs
    assert checkpoints(broken, 0) == checkpoints(broken, 1) == ["iter_20.pth", "iter_30.pth"]
    resume(pair, kind, broken)
    assert checkpoints(broken, 0) == checkpoints(broken, 1) == ["iter_30.pth", "iter_40.pth"]
    found = [broken / f"node{node}" / "work" / "iter_40.pth" for node in range(2)]
    assert found[0].joinpath("manifest.json").read_bytes() == found[1].joinpath("manifest.json").read_bytes()
    assert [part.ranks for part in open_checkpoint(found[0]).manifest.parts] == [(0,), (1,)]
    assert not list((broken / "node1" / "work").glob("*/run.log")), "logs are rank 0's"
    assert not list((broken / "node1" / "work").glob(".*tmp*"))
    assert_same(uninterrupted, left_behind(together(broken)))


def test_a_shared_directory_is_one_part(pair, tmp_path):
    assert pair.run("separate_disk_jobs", "disks", folder=str(tmp_path), nodes=SHARED) == [[[0, 0], []]] * 2
    assert pair.run("separate_disk_jobs", "disks", folder=str(tmp_path / "b"), nodes=SEPARATE) == [[[0, 1], []]] * 2
    pair.run("separate_disk_jobs", "save", folder=str(tmp_path), nodes=SHARED, iterations=[1])
    assert "parts" not in (tmp_path / "node0" / "work" / "iter_1.pth" / "manifest.json").read_text()


def test_a_directory_that_one_rank_cannot_create_is_reported_on_all(pair, tmp_path):
    messages = pair.run("separate_disk_jobs", "refused", folder=str(tmp_path), nodes=SEPARATE)
    assert messages[0] == messages[1]
    assert "rank 1" in messages[0]


@pytest.mark.parametrize("damage", ["changed", "gone", "marker", "manifest"])
def test_the_newest_step_that_is_good_on_every_node_is_taken(pair, runs, broken, damage):
    kind, uninterrupted, _ = runs
    step = broken / "node1" / "work" / "iter_30.pth"
    if damage == "changed":
        flip(step / "model" / "rank_00001_part_00000.safetensors")
    elif damage == "gone":
        shutil.rmtree(step)
    else:
        (step / {"marker": "part_00001.json", "manifest": "manifest.json"}[damage]).unlink()
    resume(pair, kind, broken)
    skipped = [line for line in warnings(broken).splitlines() if "Skipped" in line]
    assert skipped, "nothing was reported"
    assert all("iter_30.pth" in line for line in skipped)
    assert all("the disk of rank 1" in line for line in skipped)
    if damage != "marker":  # without it the expected files are unknown
        assert len(skipped) == 1
    assert_same(uninterrupted, left_behind(together(broken)))


def test_a_node_with_an_empty_disk_is_reported(pair, runs, broken):
    kind = runs[0]
    shutil.rmtree(broken / "node1")
    messages = resume(pair, kind, broken)
    assert messages[0].startswith("CheckpointError: all checkpoints in ")
    assert "are damaged: iter_30.pth/manifest.json: missing on" in messages[0]
    assert "the disk of rank 1" in messages[0]
    assert checkpoints(broken, 0) == ["iter_20.pth", "iter_30.pth"], "nothing was lost"


def test_nodes_in_another_order(pair, runs, broken):
    """Replicated weights are on every disk, and generators are fetched; shards are not moved."""
    kind, uninterrupted, _ = runs
    messages = resume(pair, kind, broken, nodes=[1, 0])
    if kind == "fsdp":
        assert "is needed here but is on the disk of another node" in messages[0]
        assert "(of rank 1)" in messages[1], messages
        return
    assert_same(uninterrupted, left_behind(together(broken)))


def test_one_process_continues_from_copied_parts(runs, broken):
    kind, _, _ = runs
    step = broken / "node0" / "work" / "iter_30.pth"
    alone = open_checkpoint(step)
    if kind == "ddp":
        assert alone.read("model", "blocks.0.up.weight").shape == (21, 7)
    else:
        with pytest.raises(CheckpointError, match="copy the directories iter_30.pth of all nodes into one"):
            alone.read("model", "blocks.0.up.weight")
    everything = open_checkpoint(together(broken) / "iter_30.pth")
    for section in ("model", "optimizer"):
        for name in everything.tensor_names(section):
            everything.read(section, name)
    flip(broken / "all" / "iter_30.pth" / "optimizer" / "rank_00001_part_00000.safetensors")
    with pytest.raises(CheckpointError, match="rank_00001_part_00000"):
        open_checkpoint(broken / "all" / "iter_30.pth")


# ---- the store ------------------------------------------------------------------------------------------------------
@pytest.fixture
def store(pair, tmp_path):
    def run(function, nodes=SEPARATE, **kwargs):
        return pair.run("separate_disk_jobs", function, folder=str(tmp_path), nodes=nodes, **kwargs)

    return run


@pytest.mark.parametrize("blocking", [True, False])
def test_a_part_has_everything_that_its_ranks_need(store, blocking):
    assert store("save", iterations=[1, 2], blocking=blocking) == [["", ""]] * 2
    assert store("load") == [["iter_2.pth", [], [rank]] for rank in range(2)]


def test_files_of_an_engine_are_in_the_part_of_the_rank_that_wrote_them(store, tmp_path):
    assert store("save", iterations=[1], extra=["native_{}.pt"]) == [[""]] * 2
    for node in range(2):
        step = tmp_path / f"node{node}" / "work" / "iter_1.pth"
        assert [path.name for path in step.glob("native_*")] == [f"native_{node}.pt"]
        (step / f"native_{node}.pt").write_text("rank x")
        with pytest.raises(CheckpointError, match=f"native_{node}.pt"):
            open_checkpoint(step)


def test_different_files_of_one_name_are_refused(store, tmp_path):
    messages = store("save", iterations=[1], extra=["native.pt"])
    assert "ranks 0 and 1 wrote different files of this name" in messages[0][0]
    assert list((tmp_path / "node0" / "work").iterdir()) == list((tmp_path / "node1" / "work").iterdir()) == []


@pytest.mark.parametrize(
    ("call", "text"), [("mkdir", ".iter_2.pth.tmp"), ("open", "manifest.json"), ("open", "rank_00001_part")]
)
def test_a_failure_on_one_disk_fails_on_all_before_any_rename(store, tmp_path, call, text):
    store("save", iterations=[1])
    messages = store("save", iterations=[2, 3], call=call, text=text)
    assert all("rank 1" in one and "Input/output error" in one and after == "" for one, after in messages)
    for node in range(2):
        assert sorted(path.name for path in (tmp_path / f"node{node}" / "work").iterdir()) == [
            "iter_1.pth", "iter_3.pth", "last_checkpoint",
        ]  # fmt: skip
    assert store("load")[0][0] == "iter_3.pth"


def test_a_rename_that_fails_leaves_a_step_that_is_not_taken(store, tmp_path):
    messages = store("save", iterations=[1, 2], call="rename", text="iter_2.pth")
    assert messages[0][0] == ""
    assert "rank 1" in messages[0][1]
    assert (tmp_path / "node0" / "work" / "iter_2.pth").exists()
    name, problems, _ = store("load")[0]
    assert name == "iter_1.pth"
    assert len(problems) == 1
    assert "iter_2.pth/manifest.json: missing on the disk of rank 1" in problems[0]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_fault_in_every_call_of_one_disk(store, tmp_path, rank):
    """A save is on both disks or reported as failed on both; the newest good one is never lost.

    A save whose fsync failed after the rename is reported as failed, although it is there.
    """
    found = store("sweep", faulty_rank=rank)
    assert found[0] == found[1]
    assert len(found[0]) > 30
    newest = None
    for at, message, good, problems in found[0]:
        own = f"iter_{at + 1}.pth"
        assert good in ((newest, own) if message else (own,)), (at, message, good, problems)
        assert all(own in problem for problem in problems), problems
        assert at == 0 or not message or "No space left on device" in message
        newest = good
    left = [{path.name for path in (tmp_path / f"node{node}" / "work").iterdir()} for node in range(2)]
    assert {newest, "last_checkpoint"} <= left[0] & left[1]
    assert not any(name.startswith(".") for name in left[0] | left[1])


def test_parts_of_different_saves_do_not_match(store, tmp_path):
    store("save", iterations=[1, 2])
    kept = tmp_path / "kept"
    shutil.copytree(tmp_path / "node1" / "work" / "iter_2.pth", kept)
    store("save", iterations=[2])
    shutil.rmtree(tmp_path / "node1" / "work" / "iter_2.pth")
    kept.rename(tmp_path / "node1" / "work" / "iter_2.pth")
    name, problems, _ = store("load")[0]
    assert name == "iter_1.pth"
    assert "have different saves of it" in problems[0]
    assert "another save of this name" in store("open_exactly", name="iter_2.pth")[0]
    assert store("open_exactly", name="iter_1.pth") == ["iter_1.pth"] * 2


def test_an_exact_step_that_is_damaged_on_one_node_is_refused_on_all(store, tmp_path):
    store("save", iterations=[1])
    flip(tmp_path / "node1" / "work" / "iter_1.pth" / "rng" / "rank_00001.json")
    messages = store("open_exactly", name="iter_1.pth")
    assert messages[0] == messages[1]
    assert messages[0].startswith("rank 1 (")
    assert "rng/rank_00001.json" in messages[0]


def test_other_data_on_a_rank_is_refused(pair):
    messages = pair.run("separate_disk_jobs", "facts", values=["Tokens:43", "Tokens:44"])
    expected = "data set in train_dataloader (fingerprint) differs between ranks: rank 1 has Tokens:44, rank 0 has"
    assert messages[0] == messages[1] == f"{expected} Tokens:43; do so"
    assert pair.run("separate_disk_jobs", "facts", values=["Tokens:43"] * 2) == ["", ""]


@pytest.mark.parametrize("runs", ["ddp"], indirect=True)
@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_kill_between_two_renames_loses_only_that_step(pair, runs, tmp_path, rank):
    kind, uninterrupted, _ = runs
    first = Group(2)
    try:
        with pytest.raises(RankError):
            first.run(
                "separate_disk_jobs", "train_until_killed", folder=str(tmp_path), nodes=SEPARATE, name="iter_20.pth", rank=rank,
                **options(kind),
            )  # fmt: skip
    finally:
        first.close()
    assert checkpoints(tmp_path, 1 - rank) == ["iter_10.pth", "iter_20.pth"]
    assert checkpoints(tmp_path, rank) == ["iter_10.pth"]
    resume(pair, kind, tmp_path)
    assert f"iter_20.pth/manifest.json: missing on the disk of rank {rank}" in warnings(tmp_path)
    assert CheckpointStore(tmp_path / "node1" / "work").names() == ["iter_30.pth", "iter_40.pth"]
    assert_same(uninterrupted, left_behind(together(tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_nodes_with_two_ranks_each(tmp_path, kind):
    nodes, group = [0, 0, 1, 1], Group(4)
    try:
        for name, run_nodes, crash in (("uninterrupted", [0] * 4, None), ("broken", nodes, ["iteration", 34])):
            group.run(
                "separate_disk_jobs", "train", folder=str(tmp_path / name), nodes=run_nodes, crash=crash, **options(kind)
            )
        broken = tmp_path / "broken"
        flip(broken / "node1" / "work" / "iter_30.pth" / "rng" / "rank_00003.safetensors")
        resume(group, kind, broken, nodes)
    finally:
        group.close()
    assert "the disk of rank 2" in warnings(broken)
    parts = open_checkpoint(broken / "node1" / "work" / "iter_40.pth").manifest.parts
    assert [part.ranks for part in parts] == [(0, 1), (2, 3)]
    files = {path.name for path in Path(broken / "node0" / "work" / "iter_40.pth" / "model").iterdir()}
    assert not any(name.startswith(("rank_00002", "rank_00003")) for name in files)
    assert_same(left_behind(tmp_path / "uninterrupted" / "node0" / "work"), left_behind(together(broken)))


@pytest.mark.slow
def test_zero_3_keeps_parts_and_lower_stages_are_refused(tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is optional")
    group = Group(2)

    def train(name, nodes, stage=3, **more):
        strategy = {"type": "DeepSpeedStrategy", "zero_optimization": {"stage": stage}}
        arguments = {**options("ddp"), "strategy": strategy, **more}
        return group.run("separate_disk_jobs", "train", folder=str(tmp_path / name), nodes=nodes, **arguments)

    try:
        uninterrupted = train("uninterrupted", SHARED)
        train("broken", SEPARATE, crash=["iteration", 34])
        assert train("broken", SEPARATE) == uninterrupted
        messages = train("refused", SEPARATE, stage=1)
        assert messages[0].replace("node0", "node1") == messages[1]
        assert "with ZeRO stage 1 only DeepSpeed's rank 0 writes the weights" in messages[0]
    finally:
        group.close()
