"""The one owner of a run's checkpoints: store, policy, best records, generation and retention.

Hooks ask for checkpoints (`StepRequests.request_save`), and the train loop lets the checkpointer `act` at the end of
each step. One checkpoint serves all requests of a step.
"""

import logging
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mmtrain import dist
from mmtrain.checkpoint import CheckpointStore, PendingSave, RetirePolicy
from mmtrain.checkpoint.foreign.export import publish, write_pretrained
from mmtrain.checkpoint.write.plain_files import write_json, write_weights
from mmtrain.errors import CheckpointError, ConfigError, RunError
from mmtrain.runner.checkpoint_fields import manifest_fields
from mmtrain.runner.choose import StartPoint
from mmtrain.runner.gather import gather_weights
from mmtrain.runner.requests import SaveRequest
from mmtrain.runner.run import Run
from mmtrain.runner.save_policy import SavePolicy
from mmtrain.runner.state import capture_model, capture_rank_state, capture_small_state


class Checkpointer:
    """Saves checkpoints, knows the best ones, and decides which old ones are deleted.

    ``failure`` is the sentence about the last save that failed, until a later one succeeds.
    """

    def __init__(self, store: CheckpointStore, policy: SavePolicy, *, logger: logging.Logger) -> None:
        self.store = store
        self.policy = policy
        self.best = policy.best_records()
        self.failure: str | None = None
        self._logger = logger
        self._pending: PendingSave | None = None
        self._failed: set[str] = set()  # names whose save failed, until a save of the same name succeeds
        self._named: set[str] = set()  # the checkpoint that a user named to start from: retention keeps it
        self._generation = 0  # of the checkpoints of this start: docs/checkpoint_format.md
        self._run_generation = 0  # of the first start of this run
        self._run = ""  # the name by which retention knows this run's checkpoints
        self._first_log_dir = ""  # of the first start of this run

    # ---- the start of a run -------------------------------------------------------------------------------------
    def name_run(self, start: StartPoint) -> str:
        """The `Manifest.run` of what is saved: that of the checkpoint in this directory, or a new one. A collective."""
        own = start.checkpoint if start.is_in(self.store.root) else None
        self._run = own.manifest.run if own is not None else dist.broadcast_object(secrets.token_hex(8))
        return self._run

    def begin(self, run: Run, start: StartPoint) -> list[str]:
        """Continue in the generation of the newest checkpoint, or begin the next one; returns lines for the log.

        What this run saves must count as newer than whatever is in the directory. A collective.
        """
        newest = self.store.newest_entry()
        following = 0 if newest is None else newest.generation + 1
        own = start.checkpoint if start.is_in(self.store.root) else None
        if own is None:
            self._generation = self._run_generation = following
            self._first_log_dir = "" if start.checkpoint is not None else run.timestamp
            if newest is None:
                return []
            return [
                f"{self.store.root} holds checkpoints of an earlier run (newest: {newest.name}). Existing checkpoints "
                "are kept unless overwritten by name; checkpoints from this run now take precedence for --resume."
            ]
        manifest = own.manifest
        if start.is_named:
            self._named.add(own.name)
        continues = newest is None or (
            (newest.name, newest.created) == (own.name, manifest.created) and run.progress.iteration >= newest.iteration
        )
        self._generation = manifest.generation if continues else following
        self._run_generation = int(manifest.meta.get("since", 0))
        self._first_log_dir = str(manifest.meta.get("began", ""))
        return []

    def begin_training(self, metric_names: Callable[[], list[str]] | None, *, resumed_from: str | None) -> None:
        """Check ``save_best``, and finish what a kill just after a checkpoint interrupted.

        ``metric_names`` gives the names that validation reports, None without validation. Raises ConfigError.
        """
        if self.best.metrics:
            if metric_names is None:
                raise ConfigError("default_hooks.checkpoint.save_best needs a val_dataloader")
            self.best.check_metrics(metric_names())
        changed = self.best.forget_other_rules(self._logger)
        self._finish_interrupted(resumed_from)
        if changed:
            self._write_best()

    def _finish_interrupted(self, resumed_from: str | None) -> None:
        """Write the best record and apply retention; the checkpoint that was resumed stays for now."""
        self.best.restore_saved(dist.on_main(self.store.names))
        if self.best.saved:
            self._write_best()
        try:
            self.store.prune(self._retire_policy({resumed_from} if resumed_from else set()))
        except OSError as error:
            self._logger.warning("Could not delete an old checkpoint: %s", error)

    # ---- during training ----------------------------------------------------------------------------------------
    def observe(self, run: Run, metrics: dict[str, float]) -> None:
        """Take the metrics of a validation; ask for a checkpoint where one is the best so far."""
        if self.best.metrics:
            self.best.drop_failed(self._failed)
            for metric in self.best.observe(metrics, iteration=run.progress.iteration):
                run.requests.request_save(f"best {metric}", best=metric)

    def act(self, run: Run, *, at_window_end: bool) -> None:
        """The end of a step: notice a background save that ended and, at a window's end, save what was asked for.

        All ranks notice that at the same step, when it has ended on all of them: hooks may communicate then.
        """
        if self._pending is not None and run.requests.are_saved:
            self.finish(run)
        if at_window_end:
            if run.requests.stop_reason and self.policy.save_last:
                run.requests.request_save("stop")  # a stop is saved where the run's last step would be
            if run.requests.saves:
                self.save(run, run.requests.take_saves())

    def prepare(self, run: Run) -> None:
        """Get ready for the first save, after the first update: only then does the optimizer have its state.

        An asynchronous save is planned, and its buffer made, before it is due. A collective. Raises ConfigError for
        state of the optimizer that could not be saved or restored.
        """
        policy = self.policy
        if self._native(run) is not None:  # the engine keeps and writes the state
            return
        tensors: dict[str, Mapping[str, Tensor]] = {}
        if policy.save_optimizer:
            state = run.strategy.optimizer_state()
            run.strategy.check_optimizer_state(state)
            tensors["optimizer"] = state.tensors
        if policy.async_save and any(hasattr(hook, "save_policy") for hook in run.hooks):
            left_out = frozenset[str]() if policy.save_frozen else run.frozen.names()
            self.store.prepare({"model": capture_model(run, left_out=left_out), **tensors})

    @property
    def is_saving(self) -> bool:
        """Whether a save is in progress in the background of this process."""
        return self._pending is not None and not self._pending.done

    def wait_staged(self) -> None:
        """Return once the parameters may change: called just before the optimizer steps."""
        if self._pending is not None:
            self._pending.wait_staged()

    def save(self, run: Run, requests: list[SaveRequest]) -> None:
        """Serve requests with one checkpoint."""
        if any(request.weights_only for request in requests):
            self._save_weights(run)
            requests = [request for request in requests if not request.weights_only]
        if not requests:
            return
        self.finish(run)  # one save at a time
        progress = run.progress
        name = self.policy.checkpoint_name(
            epoch=progress.epoch,
            iteration=progress.iteration,
            at_epoch_end=progress.epoch > 0
            and progress.epoch_iteration == 0
            and any(request.reason != "time" for request in requests),
        )
        message: dict[str, Any] = {"name": name}
        run.hooks.call("before_save_checkpoint", run, checkpoint=message)
        self.best.drop_failed(self._failed)
        self.best.assign(name)
        blocking = not self.policy.async_save or any(request.blocking for request in requests)
        try:
            self._check_place(run)
            self._pending = self._start(run, name, requests, message, blocking=blocking)
        except CheckpointError as error:
            self._report_unsaved(name, error)
            return
        if blocking:
            self.finish(run)

    def finish(self, run: Run) -> None:
        """Wait until the save in flight is complete and call the hooks."""
        pending = self._pending
        self._pending = None
        if pending is None:
            return
        try:
            pending.wait()
        except CheckpointError as error:
            self._report_unsaved(pending.name, error)
            return
        self.failure = None
        self._failed.discard(pending.name)
        run.scalars.record("save_time", pending.total_seconds)
        run.scalars.record("save_stall", pending.stall_seconds)
        run.scalars.record("save_bytes", pending.bytes)
        for notice in pending.notices:
            self._logger.warning("checkpoint %s: %s", pending.name, notice)
        self._logger.info("Saved checkpoint %s (%.1f MB)", self.store.root / pending.name, pending.bytes / 1e6)
        if self.best.confirm(pending.name):
            self._write_best()
        run.hooks.call("after_save_checkpoint", run, entry=pending.name)

    # ---- the end of a run ---------------------------------------------------------------------------------------
    def publish(self) -> None:
        """Write the last and the best checkpoint for MMEngine, where ``published_keys`` asks for it."""
        if not self.policy.published_keys or not dist.is_main():
            return
        try:
            existing = self.store.names()
        except CheckpointError as error:
            self._report_failure("the published models", error)
            return
        last = existing[-1:] if self.policy.save_last else []
        best = {record["checkpoint"] for record in self.best.saved.values()}
        for name in sorted({*best, *last} & {*existing}):
            try:
                path = publish(self.store.open(name, verify="size"), self.policy.published_keys)
                self._logger.info("Published %s as %s", name, path)
            except CheckpointError as error:
                self._report_failure(f"the published form of {name}", error)

    def newest(self) -> Path | None:
        """The path of the newest checkpoint, None if there is none."""
        name = self.store.pointer()
        return None if name is None else self.store.root / name

    def check_complete(self) -> None:
        """Raise RunError at the end of a run whose last save failed: the latest training is not on disk."""
        if self.failure is not None:
            raise RunError(f"the run ended without its last checkpoint: {self.failure}; then start again with --resume")

    def close(self) -> None:
        """Wait for the writer and release what the store holds. Raises CheckpointError if a save failed."""
        self.store.close()

    # ---- one save -----------------------------------------------------------------------------------------------
    def _check_place(self, run: Run) -> None:
        """Look whether the directory was deleted: the open log files are gone with it then, and are opened again."""
        for notice in self.store.check_place():
            self._logger.warning("%s", notice)
            for writer in run.writers:
                writer.close()

    def _native(self, run: Run) -> Any:
        return run.strategy.native(frozen=self.policy.save_frozen) if self.policy.save_optimizer else None

    def _start(
        self, run: Run, name: str, requests: list[SaveRequest], message: dict[str, Any], *, blocking: bool
    ) -> PendingSave:
        policy = self.policy
        run.strategy.check_in_step()
        run.strategy.share_buffers()
        state = capture_small_state(run, self.best)
        if not policy.save_param_scheduler:
            state.pop("schedules", None)
        extra = {key: value for key, value in message.items() if key != "name"}
        if extra:
            state["extra"] = extra
        fields = self._fields(run, temporary=all(request.temporary for request in requests))
        native = self._native(run)
        if native is not None:
            fields["meta"]["native"] = native.description
        left_out = frozenset[str]()
        if not (policy.save_frozen and (native is None or native.description["frozen"])):
            left_out = run.frozen.names()
            fields["meta"]["frozen"] = run.frozen.fingerprint(run.strategy)
        tensors: dict[str, Mapping[str, Tensor]] = {}
        if native is None:
            tensors["model"] = capture_model(run, left_out=left_out)
        if policy.save_optimizer:
            state |= _optimizer_values(run, tensors, by_name=native is None)
        return self.store.save(
            name,
            tensors=tensors,
            state=state,
            rng=capture_rank_state(run),
            manifest_fields=fields,
            extra_writers=[native.write] if native is not None else (),
            blocking=blocking,
            retire=self._retire_policy(),
        )

    def _fields(self, run: Run, *, temporary: bool) -> dict[str, Any]:
        fields = manifest_fields(run)
        fields["temporary"] = temporary
        fields["meta"] |= {
            "has_optimizer": self.policy.save_optimizer,
            "has_frozen": self.policy.save_frozen,
            "generation": self._generation,
            "since": self._run_generation,
            "run": self._run,
            "began": self._first_log_dir,
        }
        return fields

    def _retire_policy(self, also_protected: set[str] | frozenset[str] = frozenset()) -> RetirePolicy:
        keep = self.policy.retention(since=self._run_generation, run=self._run)
        return RetirePolicy(keep, frozenset(self.best.checkpoints | self._named | also_protected))

    def _save_weights(self, run: Run) -> None:
        """The weights alone: a safetensors file, or the directory of a Hugging Face model."""
        path = self.store.root / "weights" / f"iter_{run.progress.iteration}"
        model = run.model
        try:
            self._check_place(run)
            weights = gather_weights(run.strategy)
            if hasattr(model, "save_pretrained") and hasattr(model, "config"):
                dist.on_main(lambda: write_pretrained(path, model, weights))
            else:
                dist.on_main(lambda: write_weights(path.with_suffix(".safetensors"), weights))
        except CheckpointError as error:
            self._report_failure(f"weights/{path.name}", error)

    def _write_best(self) -> None:
        """Write ``best.json``: metric, value, checkpoint. Where it cannot be written the old one stays."""
        if dist.is_main():
            try:
                write_json(Path(self.store.root) / "best.json", self.best.saved)
            except CheckpointError as error:
                self._report_failure("best.json", error)

    def _report_unsaved(self, name: str, error: CheckpointError) -> None:
        self._failed.add(name)
        self._report_failure(f"checkpoint {name}", error)

    def _report_failure(self, what: str, error: CheckpointError) -> None:
        self.failure = f"{what} could not be written: {error.__cause__ or error}; older checkpoints are intact"
        self._logger.error("%s", self.failure)
        if self.policy.on_save_error == "stop":
            raise RunError(f"{self.failure} (on_save_error='stop')") from error


def _optimizer_values(run: Run, tensors: dict[str, Mapping[str, Tensor]], *, by_name: bool) -> dict[str, Any]:
    """Put the optimizer's tensors among ``tensors``, unless the engine writes them; returns its plain values."""
    values: dict[str, Any] = {}
    if run.group_values is not None:
        values["param_groups"] = run.group_values.state_dict()
    if by_name:
        state = run.strategy.optimizer_state()
        tensors["optimizer"] = state.tensors
        if state.values is not None:
            values["optimizer"] = state.values
    return values
