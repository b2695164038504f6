"""Every call of a save that changes the disk is a fault point: after a fault at any a good checkpoint is found."""

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from disturbed_saves import RETIRE, SCENES, play
from faulty_files import Crash, FaultyFiles
from saved_state import assert_holds, hidden, save

from mmtrain.checkpoint import CheckpointStore
from mmtrain.errors import CheckpointError


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    root = tmp_path_factory.mktemp("faults") / "template"
    store = CheckpointStore(root, fs=FaultyFiles())
    save(store, 10), save(store, 20)
    store.close()
    return root


def copies(template: Path, tmp_path: Path, scene: str):
    """A fresh work directory for every call of the scene, with the call's number."""
    shutil.copytree(template, tmp_path / f"count-{scene}")
    counting = FaultyFiles()
    play(scene, tmp_path / f"count-{scene}", counting)
    assert set(counting.calls) >= {"mkdir", "open", "write", "fsync", "close", "fsync_path", "rename"}
    for k in range(1, len(counting.calls) + 1):
        shutil.copytree(template, tmp_path / "work", copy_function=os.link)  # no save changes an existing file
        yield k, tmp_path / "work"
        shutil.rmtree(tmp_path / "work")


def check_after(root: Path, scene: str, *, saved: bool | None) -> None:
    """What holds after any fault. ``saved``: whether the save reported success; None if the process ended."""
    iteration, name = SCENES[scene][:2]
    visible = sorted(path.name for path in root.iterdir() if not path.name.startswith("."))
    assert set(visible) <= {"iter_10.pth", "iter_20.pth", name, "last_checkpoint"}
    store = CheckpointStore(root, fs=FaultyFiles())
    checkpoint, problems = store.newest_good()
    assert problems == []
    assert checkpoint is not None
    found = checkpoint.manifest.iteration
    assert found == iteration if saved else found in (20, iteration)
    assert_holds(checkpoint, found)
    for entry in store.entries(verify="full"):
        assert_holds(store.open(entry.name), entry.iteration)
    assert hidden(root) == []
    save(store, 40)
    assert_holds(store.newest_good()[0], 40)
    assert store.pointer() == "iter_40.pth"
    store.close()


@pytest.mark.parametrize(("scene", "mode"), [("new", "crash"), ("replace", "crash"), ("new", "power")])
def test_the_process_ends_in_any_call(template, tmp_path, scene, mode):
    for k, root in copies(template, tmp_path, scene):
        with pytest.raises(Crash):
            play(scene, root, FaultyFiles(mode, k))
        check_after(root, scene, saved=None)


def attempt(scene: str, root: Path, files: FaultyFiles, *, blocking: bool = True) -> str | None:
    """The save's error, None if it succeeded."""
    try:
        play(scene, root, files, blocking=blocking)
    except CheckpointError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("scene", "mode", "error", "blocking"),
    [
        ("new", "once", errno.ENOSPC, True),
        ("new", "once", errno.EIO, False),
        ("new", "from", errno.ENOSPC, True),
        ("replace", "once", errno.EIO, True),
        ("replace", "from", errno.ENOSPC, False),
    ],
)
def test_any_call_fails(template, tmp_path, scene, mode, error, blocking):
    for k, root in copies(template, tmp_path, scene):
        message = attempt(scene, root, FaultyFiles(mode, k, error), blocking=blocking)
        assert message is None or (os.strerror(error) in message and "\n" not in message)
        if mode == "once" and message:
            assert not [name for name in hidden(root) if ".tmp-" in name], "a failed save removes its own directory"
        check_after(root, scene, saved=message is None)


def test_a_fault_after_a_finished_save_gives_a_notice(template, tmp_path):
    """The pointer and retention: the checkpoint is complete, so the save succeeded."""
    notices = 0
    for k, root in copies(template, tmp_path, "new"):
        store = CheckpointStore(root, fs=FaultyFiles("once", k, errno.EIO), threads=1)
        try:
            pending = save(store, 30, retire=RETIRE)
        except CheckpointError:
            continue
        if pending.notices:
            notices += 1
            assert os.strerror(errno.EIO) in pending.notices[0]
        assert_holds(store.open("iter_30.pth"), 30)
    assert notices > 10


def test_the_same_store_continues_after_any_fault(template, tmp_path):
    for k, root in copies(template, tmp_path, "replace"):
        files = FaultyFiles("once", k, errno.ENOSPC)
        store = CheckpointStore(root, fs=files, threads=1)
        with contextlib.suppress(CheckpointError):
            save(store, 21, name="iter_20.pth")
        files.mode = "count"
        save(store, 40)
        assert store.names() == ["iter_10.pth", "iter_20.pth", "iter_40.pth"]
        assert_holds(store.newest_good()[0], 40)
        assert hidden(root) == []


def test_sigkill_in_any_call(template, tmp_path):
    """Real processes, killed during the call; every third call of each scene."""
    roots = []
    for scene in SCENES:
        for k, root in copies(template, tmp_path, scene):
            if k % 3 == 0:
                kept = tmp_path / f"{scene}-{k}"
                shutil.copytree(root, kept, copy_function=os.link)
                roots.append((scene, k, kept))
    orders = "\n".join(f"{scene} {k} {root}" for scene, k, root in roots)
    here = Path(__file__).resolve().parent
    paths = os.pathsep.join([str(here), str(here.parent / "checkpoint"), str(here.parents[1])])
    result = subprocess.run(
        [sys.executable, str(here / "killed_saves_program.py")],
        input=orders,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["-9"] * len(roots)
    for scene, _, root in roots:
        check_after(root, scene, saved=None)
