"""DeepSpeed's ZeRO, stages 0 to 3: the engine steps the optimizer; window, schedule and clipping are the run's."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmtrain import dist, model_state
from mmtrain.errors import ConfigError
from mmtrain.optim import OptimWrapper
from mmtrain.registry import STRATEGIES
from mmtrain.strategies.base import Native, OptimizerState, SavedTensor, Strategy, TrainedTensor
from mmtrain.strategies.divisible import refuse_flat_partitions
from mmtrain.strategies.lockstep import Lockstep
from mmtrain.strategies.wrapping import lay_out_contiguously, refuse_empty
from mmtrain.strategies.zero import library, native, shards
from mmtrain.strategies.zero.announce import announce_end, announce_exchanges
from mmtrain.strategies.zero.config_check import settled
from mmtrain.strategies.zero.inputs import cast_inputs
from mmtrain.strategies.zero.options import check_models, joined
from mmtrain.types import MicroBatch, StepResult

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@STRATEGIES.register_module()
class DeepSpeedStrategy(Strategy):
    """Trains in DeepSpeed's engine, with MMEngine's argument names.

    * ``config``: DeepSpeed's config as a dict, or the path of its JSON file;
    * ``zero_optimization``, ``bf16``, ``fp16``, ``gradient_clipping``, ``activation_checkpointing``, ``aio``,
      ``train_micro_batch_size_per_gpu``, ``gradient_accumulation_steps``, ``steps_per_print``: keys of that config;
    * ``inputs_to_half``: names, or positions, of inputs of the model that become bfloat16 or float16 with it;
    * ``exclude_frozen_parameters``: leave parameters that do not train out of checkpoints.

    Optimizer, multipliers, clipping, accumulation and schedules are those of the run's config; a contradiction with
    DeepSpeed's raises ConfigError that names both places, and so does a key that DeepSpeed does not know.
    """

    takes_own_train_step = False  # it calls the model past the engine

    def __init__(  # noqa: PLR0913 (MMEngine's arguments)
        self,
        *,
        config: str | Mapping[str, Any] | None = None,
        zero_optimization: Mapping[str, Any] | None = None,
        gradient_clipping: float | str | None = None,
        fp16: Mapping[str, Any] | None = None,
        inputs_to_half: Sequence[int | str] | None = None,
        bf16: Mapping[str, Any] | None = None,
        amp: Mapping[str, Any] | None = None,
        activation_checkpointing: Mapping[str, Any] | None = None,
        aio: Mapping[str, Any] | None = None,
        train_micro_batch_size_per_gpu: int | str | None = None,
        gradient_accumulation_steps: int | str | None = None,
        steps_per_print: int | None = None,
        exclude_frozen_parameters: bool | None = None,
    ) -> None:
        arguments = {
            "zero_optimization": zero_optimization, "gradient_clipping": gradient_clipping, "fp16": fp16, "bf16": bf16,
            "amp": amp, "activation_checkpointing": activation_checkpointing, "aio": aio,
            "train_micro_batch_size_per_gpu": train_micro_batch_size_per_gpu,
            "gradient_accumulation_steps": gradient_accumulation_steps, "steps_per_print": steps_per_print,
        }  # fmt: skip
        self._options = joined(config, arguments)
        self._inputs_to_half = list(inputs_to_half or [])
        self._exclude_frozen = bool(exclude_frozen_parameters)
        self._config: dict[str, Any] = {}
        self._own_group = False
        self.engine: Any = None
        self._lockstep: Lockstep | None = None

    # ---- building -----------------------------------------------------------------------------------------------
    def setup(self) -> None:
        library.load()
        check_models(self._options)
        self.device = dist.default_device()
        if not dist.is_distributed():  # DeepSpeed wants a group, also of one
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
            self._own_group = True
        os.environ.setdefault("LOCAL_RANK", "0")

    def check_config(self, cfg: Any) -> None:
        self._config = settled(self._options, cfg, world=dist.world_size(), device=self.device)

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return self._options.stage

    @property
    def dtype(self) -> torch.dtype:
        """The type of the model's parameters in the engine; its masters are float32."""
        return next((dtype for key, dtype in _HALF.items() if self._config.get(key, {}).get("enabled")), torch.float32)

    def prepare(
        self,
        model: nn.Module,
        make_optim: Callable[[nn.Module], OptimWrapper] | None,
        compile_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = self.module = model.to(self.device)
        if self._inputs_to_half and self.dtype is not torch.float32:
            cast_inputs(model, self._inputs_to_half, self.dtype)
        self.optim = make_optim(model) if make_optim is not None else None
        if compile_options is not None:
            self.model.compile(**compile_options)
        if self.optim is None:  # evaluation alone needs no engine
            return
        self.notices = lay_out_contiguously(model, type(self).__name__)
        if type(self.optim).step is not OptimWrapper.step:
            raise ConfigError(
                f"optim_wrapper.type: {type(self.optim).__name__} has its own step(), but under DeepSpeedStrategy "
                "the engine steps; use OptimWrapper or AmpOptimWrapper"
            )
        self._initialise(self.optim)
        self.forward_is_collective = self.stage == 3
        if self.stage > 0 and dist.world_size() > 1:
            name = f"{type(self).__name__} (ZeRO stage {self.stage})"
            parameters = dict(model.named_parameters())
            self._lockstep = Lockstep(name, parameters, compiled=compile_options is not None)
            announce_exchanges(model, self._lockstep, self.stage)

    def _initialise(self, optim: OptimWrapper) -> None:
        deepspeed = library.load()
        config = {**self._config, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        _refuse_what_deepspeed_changes(optim, self.stage, self.dtype)
        if self.stage > 0 or self.dtype is not torch.float32:
            refuse_flat_partitions(optim, f"ZeRO stage {self.stage}")
        _refuse_scalars(self.model)
        if self.stage == 3:
            refuse_empty(self.model, "ZeRO stage 3")
        if self.stage > 0:
            _refuse_types(self.model, self.dtype)
        rates = [group["lr"] for group in optim.param_groups]
        if self.stage == 0 and self.dtype is not torch.float32:
            for group in optim.param_groups:  # the engine takes a step to make the moments; it must move nothing
                group["lr"] = 0.0
        try:
            with library.quiet():
                self.engine, *_ = deepspeed.initialize(
                    model=self.model, optimizer=optim.optimizer, config=config, dist_init_required=False
                )
        except (ValueError, AssertionError, NotImplementedError) as error:
            raise ConfigError(f"strategy: DeepSpeed refuses this run: {' '.join(str(error).split())}") from error
        self.module = self.engine
        # Stage 0 in float32 is plain data parallelism, whose norm DeepSpeed does not track: it is computed on demand.
        self._plain = self.engine.optimizer is optim.optimizer
        if self.stage == 0 and not self._plain:
            optim.optimizer.state.clear()
            for group, rate in zip(optim.param_groups, rates, strict=True):
                group["lr"] = rate
        if self.stage == 3:
            shards.clear_padding(self.model, self.engine)

    @property
    def rescales_gradients(self) -> bool:  # type: ignore[override]
        """Only while gradients are the parameters' own: the engine's partitions of them cannot be reached."""
        return self.engine is None or self._plain

    @property
    def evaluation_module(self) -> nn.Module:
        """The model itself: the engine's own call prepares a backward. In stage 3 its hooks gather what it needs."""
        return self.model

    # ---- training -----------------------------------------------------------------------------------------------
    def forward_context(self, mb: MicroBatch) -> AbstractContextManager[Any]:
        if self.engine is not None:
            self.engine.set_gradient_accumulation_boundary(mb.is_last)
        return nullcontext()

    def backward(self, loss: Tensor, mb: MicroBatch) -> None:
        # The loop has divided the loss by the true length of the window. In stage 0 DeepSpeed takes a loss that is the
        # model's own output (a window of one) for a backward that was called past it, and divides it by its own length.
        if self._lockstep is not None:
            announce_end(loss, self._lockstep, self.stage, is_last=mb.is_last)
        self.engine.backward(loss.view_as(loss) if self.stage == 0 else loss, scale_wrt_gas=False)

    def step(self) -> StepResult:
        optim, engine = self.optim, self.engine
        assert optim is not None
        norm = None
        if self._plain:
            optim.rescale_gradients()
        if self._plain and (optim.want_grad_norm or optim.skip_nonfinite):
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
            if optim.skip_nonfinite and not bool(torch.isfinite(norm)):  # alike on all ranks: gradients are averaged
                engine.zero_grad()
                return StepResult(norm, applied=False)
        if self._lockstep is not None:
            self._lockstep.end_update(look=False)
        engine.step()
        if not self._plain and (optim.want_grad_norm or optim.clip_grad is not None):
            found = engine.get_global_grad_norm()  # None with zero_optimization.compute_grad_norm=False
            norm = None if found is None else torch.as_tensor(found, dtype=torch.float32)
        return StepResult(norm, applied=engine.was_step_applied())

    def check_in_step(self) -> None:
        if self._lockstep is not None:
            self._lockstep.check()

    def share_buffers(self) -> None:
        model_state.broadcast_buffers(self.model)

    def forget_gathered(self) -> None:
        if self.engine is not None and self.stage == 3:
            shards.gather_persistent(self.engine)

    # ---- state by name ------------------------------------------------------------------------------------------
    def trained_tensors(self) -> dict[str, TrainedTensor]:
        if self.engine is None or self.stage < 3:
            return super().trained_tensors()
        return shards.local_views(self.model, self.device)

    def model_state(self) -> dict[str, Tensor]:
        if self.engine is None:
            return model_state.tensors_of(self.model)
        return shards.whole_model(self.model, self.engine)

    def model_targets(self, saved: Mapping[str, SavedTensor]) -> dict[str, Tensor]:
        if self.engine is None:
            return super().model_targets(saved)
        return shards.model_targets(self.model, self.engine, saved)

    def load_model_state(self, state: Mapping[str, Any]) -> None:
        if self.engine is None:
            super().load_model_state(state)
        else:
            shards.load_model(self.model, self.engine, state)

    def optimizer_state(self) -> OptimizerState:
        if self.optim is None or self.engine is None:
            return OptimizerState({})
        return OptimizerState(shards.whole_optimizer(self.model, self.engine, self.optim))

    def full_size(self, parameter: Tensor) -> int:
        # Stage 3 partitions a parameter; between uses it is empty.
        return int(getattr(parameter, "ds_numel", parameter.numel()))

    def load_optimizer_state(self, state: OptimizerState) -> None:
        if self.optim is not None:
            shards.load_optimizer(self.model, self.engine, self.optim, state)

    # ---- the engine's own files ---------------------------------------------------------------------------------
    def native(self, *, frozen: bool = True) -> Native | None:
        if self.engine is None or self.stage == 0:
            return None  # every rank holds everything: the tensors by name are the better file
        return native.writer(self.engine, exclude_frozen=self._exclude_frozen or not frozen, dtype=self.dtype)

    def takes_native(self, description: Mapping[str, Any]) -> bool:
        return self.engine is not None and self.stage > 0 and native.fits(description, self.engine, self.dtype)

    def load_native(self, directory: Path, description: Mapping[str, Any]) -> None:
        assert self.optim is not None
        native.load(self.engine, self.optim, directory, description)

    def check_separate_disks(self, root: Path) -> None:
        if self.engine is not None and 0 < self.stage < 3:
            raise ConfigError(
                f"the ranks do not share {root}, and with ZeRO stage {self.stage} only DeepSpeed's rank 0 writes the "
                "weights that all ranks read back; use stage 3, or a work_dir that all nodes share"
            )

    def teardown(self) -> None:
        """Leave a group of one; a group that others share outlives the strategy, and so does the engine in it."""
        if not self._own_group:
            return
        self._own_group = False
        engine, self.engine = self.engine, None
        if engine is not None:
            with library.quiet():
                engine.destroy()
            shards.make_whole(self.model)
        library.leave_group()


def _refuse_what_deepspeed_changes(optim: OptimWrapper, stage: int, dtype: torch.dtype) -> None:
    """Raise ConfigError for what would not be trained, or not be resumed, as the config says."""
    if isinstance(optim.optimizer, torch.optim.Adagrad) and (stage > 0 or dtype is not torch.float32):
        raise ConfigError(
            "optim_wrapper.optimizer is Adagrad, which DeepSpeed replaces by one without the groups and their "
            "multipliers; use another optimizer, or FSDPStrategy"
        )
    if stage == 0 and dtype is torch.float16:
        raise ConfigError(
            "strategy.fp16 with ZeRO stage 0: DeepSpeed's loss scale is then in no checkpoint; set "
            "zero_optimization=dict(stage=1), or use bf16"
        )


def _refuse_types(model: nn.Module, dtype: torch.dtype) -> None:
    """Raise ConfigError for a type that DeepSpeed would change, or fail at, when it joins parameters."""
    taken = {torch.float32, dtype}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype not in taken:
            raise ConfigError(
                f"model: {name} is {parameter.dtype}, and DeepSpeed joins it with the others as {dtype}; convert it "
                "(model.float()), or use DDPStrategy"
            )


def _refuse_scalars(model: nn.Module) -> None:
    scalar = next((name for name, parameter in model.named_parameters() if parameter.dim() == 0), None)
    if scalar is not None:
        raise ConfigError(
            f"model: {scalar} is a parameter without dimensions, which DeepSpeed cannot take; give it one element, "
            "nn.Parameter(torch.ones(1)), or use DDPStrategy"
        )
