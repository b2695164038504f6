"""Checkpoints whose ranks do not share a disk, as far as one process can test it; tests/dist/test_separate_disks.py uses
processes."""

from dataclasses import replace

import pytest

from mmtrain.checkpoint import FileRecord, Manifest, SharedDisk, find_topology
from mmtrain.checkpoint.format.manifest import DiskPart, decode, encode
from mmtrain.checkpoint.format.verify import files_here, find_problems
from mmtrain.checkpoint.topology.disk_parts import divide, markers
from mmtrain.checkpoint.topology.disks import Disks
from mmtrain.checkpoint.topology.find import leaders_by_rank
from mmtrain.errors import CheckpointError, RunError

DISKS = Disks((0, 0, 2, 2), ("a", "a", "b", "b"))
SAME = FileRecord(3, "0" * 32)


def record(letter):
    return FileRecord(3, letter * 32)


def test_one_process_has_one_disk_and_makes_no_directory(tmp_path):
    topology = find_topology(tmp_path / "work")
    assert isinstance(topology, SharedDisk)
    assert (topology.is_leader, topology.disk_ranks) == (True, [0])
    assert not (tmp_path / "work").exists()


def test_disks_are_described():
    assert DISKS.groups() == [[0, 1], [2, 3]]
    assert str(DISKS) == "rank 0, 1 on a; rank 2, 3 on b"
    assert DISKS.describe(3) == "the disk of rank 2 (b)"
    assert not DISKS.is_shared
    assert Disks.shared(4).is_shared
    named = DISKS.with_rank(2, RunError("is full"))
    assert (type(named), str(named)) == (RunError, "rank 2 (b): is full")
    assert isinstance(DISKS.with_rank(2, OSError(5, "no")), CheckpointError)


@pytest.mark.parametrize(
    ("seen", "leaders"),
    [
        ({0: [0, 2], 1: [0, 2], 2: [0, 2], 3: [0, 2]}, {0: 0, 1: 0, 2: 0, 3: 0}),
        ({0: [0], 1: [0], 2: [2], 3: [2]}, {0: 0, 1: 0, 2: 2, 3: 2}),
        ({0: [0], 1: [0, 2], 2: [2], 3: [2]}, {0: 0, 1: 0, 2: 0, 3: 0}),  # one rank that sees both files is enough
        ({0: [0, 2], 2: [2, 4], 4: [4], 5: [5]}, {0: 0, 2: 0, 4: 0, 5: 5}),
    ],
)
def test_ranks_are_grouped_by_the_files_that_they_see(seen, leaders):
    assert leaders_by_rank(seen) == leaders


def test_files_are_divided_by_the_rank_that_wrote_them():
    written = [{"a": SAME, "state.json": SAME}, {"b": SAME}, {"c": SAME, "state.json": SAME}, {}]
    adopted = [{}, {"native_1": SAME}, {}, {"native_3": SAME}]
    files, parts = divide([*written, *adopted], DISKS, {"tensors.json": SAME})
    assert [(part.marker, part.ranks) for part in parts] == [("part_00000.json", (0, 1)), ("part_00001.json", (2, 3))]
    assert parts[0].files == ("a", "b", "native_1", "part_00000.json", "state.json", "tensors.json")
    assert parts[1].files == ("c", "native_3", "part_00001.json", "state.json", "tensors.json")
    assert files.keys() == {*parts[0].files, *parts[1].files}


def test_different_files_of_one_name_are_refused():
    with pytest.raises(CheckpointError, match=r"state\.json: ranks 0 and 2 wrote different files of this name"):
        divide([{"state.json": SAME}, {}, {"state.json": record("1")}, {}], DISKS, {})


@pytest.fixture
def parted():
    files, parts = divide([{"a": SAME}, {}, {"c": SAME}, {}], DISKS, {"tensors.json": SAME})
    return Manifest(name="iter_1.pth", files=files, parts=parts, world_size=4)


def test_a_manifest_keeps_its_parts(parted):
    assert decode(encode(parted)) == parted
    assert b"parts" not in encode(replace(parted, parts=[]))


def test_a_part_must_list_files_of_the_checkpoint(parted):
    parted.parts = [DiskPart("part_00000.json", (0,), ("unknown",))]
    with pytest.raises(CheckpointError, match="unknown"):
        decode(encode(parted))


def test_a_directory_is_verified_for_the_parts_that_it_has(parted, tmp_path):
    def faults():
        return {problem.file for problem in find_problems(tmp_path, parted, verify="size")}

    (tmp_path / "tensors.json").write_bytes(b"abc")
    assert faults() == parted.files.keys() - {"tensors.json"}, "with no part here everything is missing"
    contents = {marker: data for marker, _, data in markers(DISKS)}
    (tmp_path / "part_00001.json").write_bytes(contents["part_00001.json"])
    assert faults() == {"c"}
    (tmp_path / "c").write_bytes(b"abc")
    assert faults() == set()
    assert files_here(tmp_path, parted) == ["c", "part_00001.json", "tensors.json"]
    (tmp_path / "part_00000.json").write_bytes(contents["part_00000.json"])
    assert faults() == {"a"}, "both parts together are complete"
