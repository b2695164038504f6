"""The many-tensors case of checkpoint_io.py: thousands of small tensors, where the cost is by tensor and not by byte.

A model of adapters or experts has thousands of small parameters, each with AdamW's two moments and its step. "plan
kept" saves the same names again, as a run does; "new plan" saves under one name that differs each time, which is
what every save cost before plans were kept, and what the first one costs.
"""

import shutil
import time

import torch

from mmtrain.checkpoint import CheckpointStore


class ManyTensors:
    """Contenders as in `checkpoint_io.Bench`: each returns seconds by name."""

    def __init__(self, parameters, folder):
        weights = {f"layers.{i // 10}.part_{i % 10}.weight": torch.randn(64) for i in range(parameters)}
        moments = {}
        for name in weights:
            moments[f"{name}/step"] = torch.tensor(1.0)
            moments |= {f"{name}/{slot}": torch.randn(64) for slot in ("exp_avg", "exp_avg_sq")}
        self.sections = {"model": weights, "optimizer": moments}
        self.tensors = len(weights) + len(moments)
        self.folder = folder / "many"
        self.store = CheckpointStore(self.folder, threads=2)
        self.store.save("kept.pth", self.sections, blocking=True)
        torch.save(self.sections, self.folder / "kept.file")
        self._saves = 0

    def run(self):
        """Seconds of one round, medians of three."""
        stalls = {"many: async stall, plan kept": self.sections, "many: async stall, new plan": None}
        seconds = {}
        for name, sections in stalls.items():
            self._stall(sections or self._renamed())  # so that "kept" has something to keep
            seconds[name] = sorted(self._stall(sections or self._renamed()) for _ in range(3))[1]
        return seconds | self._synchronous() | self._loads()

    def _renamed(self):
        self._saves += 1
        return {section: {**named, f"extra_{self._saves}": torch.zeros(1)} for section, named in self.sections.items()}

    def _stall(self, sections):
        begin = time.perf_counter()
        pending = self.store.save("a.pth", sections, blocking=False)
        pending.wait_staged()
        stall = time.perf_counter() - begin
        pending.wait()
        shutil.rmtree(self.folder / "a.pth")
        return stall

    def _synchronous(self):
        def own():
            self.store.save("s.pth", self.sections, blocking=True)

        def torch_save():
            torch.save(self.sections, self.folder / "one.file")

        self._stall(self.sections)  # the plan is that of these names again
        times = {"many: mmtrain sync save": [], "many: torch.save": []}
        for _ in range(3):
            for values, save in zip(times.values(), (own, torch_save), strict=True):
                values.append(_timed(save))
            shutil.rmtree(self.folder / "s.pth")
            (self.folder / "one.file").unlink()
        return {name: sorted(values)[1] for name, values in times.items()}

    def _loads(self):
        def own():
            checkpoint = self.store.open("kept.pth", verify="none")
            for section, into in self.sections.items():
                checkpoint.load(section, into)

        def torch_load():
            loaded = torch.load(self.folder / "kept.file", mmap=True, weights_only=True)
            for section, into in self.sections.items():
                for name, target in into.items():
                    target.copy_(loaded[section][name])

        return {"many: mmtrain load": _timed(own), "many: torch.load mmap + copy": _timed(torch_load)}

    def close(self):
        self.store.close()


def _timed(function):
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin
