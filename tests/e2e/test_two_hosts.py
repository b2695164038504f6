"""Two hosts on one machine: network namespaces joined by a cable, and mount namespaces in which the same absolute path
is another disk on each. torchrun starts one process on each."""

import os
import secrets
import shutil
import signal
import subprocess
import sys

import parts
import pytest
import strategy_parts
from exactness import assert_same, left_behind
from ranks import PATHS, ROOT, free_port

from mmtrain.checkpoint import open_checkpoint

pytestmark = pytest.mark.slow
ADDRESSES = ("10.213.7.1", "10.213.7.2")


def shell(*command):
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")


class Hosts:
    """Two hosts; on host ``k`` the directory ``folder/disk`` is ``folder/disk_k``."""

    def __init__(self, folder):
        self.folder = folder
        self.names = [f"mmtrain-{secrets.token_hex(3)}-{k}" for k in range(2)]
        for k in range(2):
            (folder / f"disk_{k}").mkdir()
        (folder / "disk").mkdir()

    def set_up(self):
        for name in self.names:
            shell("ip", "netns", "add", name)
        ends = [("name", "cable", "netns", name) for name in self.names]
        shell("ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for name, address in zip(self.names, ADDRESSES, strict=True):
            shell("ip", "-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for device in ("cable", "lo"):
                shell("ip", "-n", name, "link", "set", device, "up")
        shell(*self._inside(0, "exec ip netns exec $0 true"))

    def take_down(self):
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def _inside(self, k, line):
        mounts = f"mount --bind {self.folder}/disk_{k} {self.folder}/disk && hostname node{k} && "
        return ["unshare", "--mount", "--uts", "sh", "-c", mounts + line, self.names[k]]

    def start(self, k, config, port):
        """torchrun on host ``k``, as its user would type it."""
        line = "exec ip netns exec $0 " + " ".join(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={k}", "--nproc-per-node=1",
             f"--master-addr={ADDRESSES[0]}", f"--master-port={port}", f"--local-addr={ADDRESSES[k]}",
             str(ROOT / "tools" / "train.py"), str(config)]
        )  # fmt: skip
        variables = {"PYTHONPATH": ":".join(PATHS), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"}
        return subprocess.Popen(
            self._inside(k, line), env={**os.environ, **variables}, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    def run(self, config):
        """Exit status and standard error of both hosts' torchrun."""
        port = free_port()
        started = [self.start(k, config, port) for k in range(2)]
        try:
            errors = [process.communicate(timeout=300)[1] for process in started]
        finally:
            for process in started:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        return [process.returncode for process in started], errors


@pytest.fixture
def hosts(tmp_path):
    found = Hosts(tmp_path)
    try:
        found.set_up()
    except OSError as error:
        found.take_down()
        pytest.skip(f"this system does not allow namespaces for two hosts: {error}")
    yield found
    found.take_down()


def write_config(path, work_dir, **changes):
    # A save in the background may be in flight when a host is killed: then the checkpoint before it is the newest.
    saves = {"type": "CheckpointHook", "interval": 10, "async_save": False}
    hooks = {"logger": {"type": "LoggerHook", "interval": 1}, "checkpoint": saves}
    cfg = parts.config(
        work_dir, resume=True, log_level="INFO",
        **strategy_parts.changes(2, iterations=40, default_hooks=hooks, strategy={"type": "FSDPStrategy"}, **changes),
    )  # fmt: skip
    lines = [f"{key} = {value!r}\n" for key, value in cfg.items()]
    path.write_text("custom_imports = dict(imports=['dist_parts', 'strategy_parts'])\n" + "".join(lines))
    return path


def test_a_run_on_two_hosts_continues_after_one_was_killed(hosts, tmp_path):
    uninterrupted = write_config(tmp_path / "uninterrupted.py", tmp_path / "uninterrupted")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    environment = {**os.environ, "PYTHONPATH": ":".join(PATHS), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, str(ROOT / "tools" / "train.py"), str(uninterrupted)], env=environment, check=True, timeout=300
    )

    trouble = {"type": "FailOrHang", "kind": "SIGKILL", "rank": 1, "iteration": 36, "marker": str(tmp_path / "marker")}
    config = write_config(tmp_path / "run.py", tmp_path / "disk" / "work", custom_hooks=[trouble])
    statuses, errors = hosts.run(config)
    assert (tmp_path / "marker").exists(), errors
    assert 0 not in statuses
    assert "Ranks do not share" in errors[0]
    assert "rank 0 on node0; rank 1 on node1" in errors[0]
    works = [tmp_path / f"disk_{k}" / "work" for k in range(2)]
    assert list((tmp_path / "disk").iterdir()) == []
    (works[1] / "iter_30.pth" / "rng" / "rank_00001.json").unlink()

    statuses, errors = hosts.run(config)
    assert statuses == [0, 0], errors
    assert "iter_30.pth/rng/rank_00001.json: missing (on the disk of rank 1 (node1))" in errors[0]
    assert "Auto resumed from the latest checkpoint" in errors[0]
    assert open_checkpoint(works[1] / "iter_40.pth").manifest.parts[1].ranks == (1,)
    for work in works:
        shutil.copytree(work, tmp_path / "together", dirs_exist_ok=True)
    assert_same(left_behind(tmp_path / "uninterrupted"), left_behind(tmp_path / "together"))
