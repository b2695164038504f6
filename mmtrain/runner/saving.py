"""Saves what was asked for, at a save point, through the store; tells hooks when a checkpoint is complete."""

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

import mmtrain
from mmtrain import dist
from mmtrain.checkpoint import CheckpointStore, Retention
from mmtrain.checkpoint.foreign.export import publish, write_pretrained
from mmtrain.checkpoint.write.plain_files import write_json, write_weights
from mmtrain.errors import CheckpointError, RunError
from mmtrain.runner.compare import flatten
from mmtrain.runner.frozen import Frozen
from mmtrain.runner.state import capture_rank_state, capture_small_state, capture_tensors, gather_weights

if TYPE_CHECKING:
    from mmtrain.runner.flexible_runner import FlexibleRunner


@dataclass(frozen=True, slots=True)
class SaveRequest:
    """Why a checkpoint was asked for.

    ``temporary`` ones go when a newer one exists; ``best`` names the metric whose best value this is; ``weights_only``
    asks for the weights under ``weights/`` and no checkpoint; ``blocking`` waits until it is complete.
    """

    reason: str
    temporary: bool = False
    best: str | None = None
    weights_only: bool = False
    blocking: bool = False


@dataclass(frozen=True, slots=True)
class SavePolicy:
    """How checkpoints are saved: `CheckpointHook`'s arguments that are not about when."""

    max_keep: int = -1
    keep_every: int | None = None
    optimizer: bool = True
    schedules: bool = True
    frozen: bool = True
    asynchronous: bool = True
    on_error: str = "continue"
    filename_tmpl: str | None = None
    at_stop: bool = False
    by_epoch: bool = False


class SaveService:
    """Collects requests and serves all of one step with one checkpoint."""

    def __init__(self, store: CheckpointStore, *, logger: logging.Logger) -> None:
        self.store = store
        self.requests: list[SaveRequest] = []
        self.failure: str | None = None
        self.failed: set[str] = set()  # names whose save failed, until it succeeds under the same name
        self._logger = logger
        self._policy = SavePolicy()
        self._pending: Any = None
        self._protected: set[str] = set()
        self.named: set[str] = set()  # the checkpoint that a user named to begin at
        self.frozen = Frozen()  # what save_frozen=False leaves out
        self.began = ""
        self.generation = self.since = 0  # of this start, and the one in which its run began: Manifest.generation

    def configure(self, policy: Mapping[str, Any], *, by_epoch: bool) -> None:
        """Take the policy of the hook that asks for checkpoints."""
        self._policy = SavePolicy(**policy, by_epoch=by_epoch)
        self.store.keep = Retention(
            max_keep_ckpts=self._policy.max_keep,
            keep_every=self._policy.keep_every or 0,
            unit="epoch" if by_epoch else "iteration",
            since=self.since,
        )

    def begin(self, generation: int, *, since: int, began: str = "") -> None:
        """Say which generation of checkpoints this start saves, in which its run began, and in which log directory."""
        self.generation, self.since, self.began = generation, since, began
        self.store.keep = replace(self.store.keep, since=since)

    def protect(self, names: Iterable[str | None]) -> None:
        """Keep these checkpoints (the best ones), and the one that was named, from retention."""
        self._protected = {name for name in names if name} | self.named
        self.store.protected = self._protected

    def request_at_stop(self) -> None:
        """A stop is a last step like any other: it is saved where the run's last step would be."""
        if self._policy.at_stop:
            self.requests.append(SaveRequest("stop"))

    def request_by_clock(self) -> None:
        """Ask for the checkpoint that a rank's clock says is due, on every rank."""
        self.requests.append(SaveRequest("time", temporary=True))

    def save(self, runner: "FlexibleRunner") -> None:
        """Serve the requests of this save point with one checkpoint and forget them."""
        requests, self.requests = self.requests, []
        if any(request.weights_only for request in requests):
            self._save_weights(runner)
            requests = [request for request in requests if not request.weights_only]
        if not requests:
            return
        self.finish(runner)  # one save at a time
        name = self._name(runner, requests)
        message: dict[str, Any] = {"name": name}
        runner.hooks.call("before_save_checkpoint", runner, checkpoint=message)
        try:
            self._pending = self._start(runner, name, requests, message)
        except CheckpointError as error:
            self._unsaved(name, error)
            return
        runner.optim_wrapper.before_step = self._pending.wait_staged
        if not self._policy.asynchronous or any(request.blocking for request in requests):
            self.finish(runner)

    def poll(self, runner: "FlexibleRunner") -> None:
        """Notice that a save in the background is complete, or that it failed; called at the end of steps."""
        if self._pending is not None and self._pending.done:
            self.finish(runner)

    def finish(self, runner: "FlexibleRunner") -> None:
        """Wait until the save in flight is complete and tell the hooks."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if runner.optim_wrapper is not None:
            runner.optim_wrapper.before_step = None
        try:
            pending.wait()
        except CheckpointError as error:
            self._unsaved(pending.name, error)
            return
        self.failure = None
        self.failed.discard(pending.name)
        runner.scalars.record("save_time", pending.total_seconds)
        runner.scalars.record("save_stall", pending.stall_seconds)
        runner.scalars.record("save_bytes", pending.bytes)
        for notice in pending.notices:
            self._logger.warning("checkpoint %s: %s", pending.name, notice)
        self._logger.info("Saved checkpoint %s (%.1f MB)", self.store.root / pending.name, pending.bytes / 1e6)
        runner.hooks.call("after_save_checkpoint", runner, entry=pending.name)

    def catch_up(self, best: Mapping[str, Any], *, resumed: str | None) -> dict[str, Any]:
        """Do what a kill just after a checkpoint was complete left undone: the record of the best, and retention.

        The checkpoint that was resumed stays, whatever the policy says. Returns the records whose checkpoints stand.
        """
        names = dist.on_main(self.store.names)
        known = {metric: record for metric, record in best.items() if record["checkpoint"] in names}
        if known:
            self.write_best(known)
        if not (dist.is_main() or self.store.divided):
            return known
        self.store.protected = self._protected | ({resumed} if resumed else set())
        try:
            self.store.prune()
        except OSError as error:
            self._logger.warning("an old checkpoint could not be deleted: %s", error)
        self.store.protected = self._protected
        return known

    def write_best(self, record: Mapping[str, Any]) -> None:
        """Write ``best.json``: metric, value, checkpoint. Where it cannot be written the old one stays."""
        if dist.is_main():
            try:
                write_json(self.store.root / "best.json", dict(record))
            except CheckpointError as error:
                self._failed("best.json", error)

    def publish(self, names: Iterable[str], keys: Collection[str], *, last: bool) -> None:
        """Write these checkpoints, and the newest where ``last``, for MMEngine with its ``keys`` alone."""
        if not dist.is_main():
            return
        there = self.store.names()
        for name in sorted({*names, *(there[-1:] if last else [])} & {*there}):
            try:
                self._logger.info("Published %s as %s", name, publish(self.store.open(name, verify="size"), keys))
            except CheckpointError as error:
                self._failed(f"the published form of {name}", error)

    def check_complete(self) -> None:
        """Raise RunError at the end of a run whose last save failed: what it has learnt since is not on the disk."""
        if self.failure is not None:
            raise RunError(f"the run ended without its last save: {self.failure}; then start again with --resume")

    def close(self) -> None:
        """Wait for the writer and give back what the store holds."""
        self.store.close()

    # ---- one save -----------------------------------------------------------------------------------------------
    def _start(self, runner: "FlexibleRunner", name: str, requests: list[SaveRequest], message: dict[str, Any]) -> Any:
        policy = self._policy
        runner.strategy.share_buffers()
        state = capture_small_state(runner)
        if not policy.schedules:
            state.pop("schedules", None)
        extra = {key: value for key, value in message.items() if key != "name"}
        if extra:
            state["extra"] = extra
        blocking = not policy.asynchronous or any(request.blocking for request in requests)
        fields = manifest_fields(runner, policy, temporary=all(request.temporary for request in requests))
        native = runner.strategy.native(frozen=policy.frozen) if policy.optimizer else None
        if native is not None:
            fields["meta"]["native"] = native.description
        left_out = frozenset[str]()
        if not (policy.frozen and (native is None or native.description["frozen"])):
            left_out = self.frozen.names()
            fields["meta"]["frozen"] = self.frozen.fingerprint(runner.strategy)
        return self.store.save(
            name,
            tensors=capture_tensors(runner, optimizer=policy.optimizer, left_out=left_out) if native is None else {},
            state=state,
            rng=capture_rank_state(runner),
            manifest_fields=fields,
            extra_writers=[native.write] if native is not None else (),
            blocking=blocking,
        )

    def _name(self, runner: "FlexibleRunner", requests: list[SaveRequest]) -> str:
        progress = runner.progress
        at_epoch_edge = progress.epoch_iteration == 0 and progress.epoch > 0
        by_epoch = self._policy.by_epoch and at_epoch_edge and any(r.reason != "time" for r in requests)
        own = self._policy.filename_tmpl if by_epoch == self._policy.by_epoch else None  # it counts in one unit alone
        template = own or ("epoch_{}.pth" if by_epoch else "iter_{}.pth")
        return template.format(progress.epoch if by_epoch else progress.iteration)

    def _save_weights(self, runner: "FlexibleRunner") -> None:
        """The weights alone: a safetensors file, or the directory of a Hugging Face model."""
        path = self.store.root / "weights" / f"iter_{runner.progress.iteration}"
        weights, model = gather_weights(runner.strategy), runner.model
        try:
            if hasattr(model, "save_pretrained") and hasattr(model, "config"):
                dist.on_main(lambda: write_pretrained(path, model, weights))
            else:
                dist.on_main(lambda: write_weights(path.with_suffix(".safetensors"), weights))
        except CheckpointError as error:
            self._failed(f"weights/{path.name}", error)

    def _unsaved(self, name: str, error: CheckpointError) -> None:
        self.failed.add(name)
        self._failed(f"checkpoint {name}", error)

    def _failed(self, what: str, error: CheckpointError) -> None:
        self.failure = f"{what} could not be written: {error.__cause__ or error}; older checkpoints are intact"
        self._logger.error("%s", self.failure)
        if self._policy.on_error == "stop":
            raise RunError(f"{self.failure} (on_save_error='stop')") from error


def manifest_fields(runner: "FlexibleRunner", policy: SavePolicy, *, temporary: bool) -> dict[str, Any]:
    """What a manifest says of the run besides its files."""
    import numpy

    optim, stream = runner.optim_wrapper, runner.train_dataloader
    return {
        "position": runner.progress.state_dict(),
        "world_size": runner.world_size,
        "strategy": type(runner.strategy).__name__,
        "seed": runner.seed,
        "config": runner.config_text,
        "data_fingerprint": runner.data_fingerprint,
        "versions": {"mmtrain": mmtrain.__version__, "torch": torch.__version__, "numpy": numpy.__version__},
        "temporary": temporary,
        "meta": {
            "batch_size": stream.batch_size,
            "data_size": dist.data_size(),
            "accumulative_counts": optim.accumulative_counts,
            "samples_per_epoch": stream.samples,
            "iterations_per_epoch": stream.iterations_per_epoch,
            "max_iters": runner.max_iters,
            "max_epochs": runner.max_epochs,
            "optimizer": runner.optimizer_name,
            "has_optimizer": policy.optimizer,
            "has_frozen": policy.frozen,
            "experiment_name": runner.experiment_name,
            "timestamp": runner.timestamp,
            "config_values": flatten(runner.cfg),
            "generation": runner.saving.generation,
            "since": runner.saving.since,
            "began": runner.saving.began,
        },
    }
