"""Samples text from a language model during training."""

from collections.abc import Sequence
from typing import Any

import torch

from mmtrain.errors import ConfigError
from mmtrain.hooks.base import Hook
from mmtrain.modes import evaluation_mode
from mmtrain.registry import HOOKS
from mmtrain.runner.interface import Runner


@HOOKS.register_module()
class TextSampleHook(Hook):
    """Logs what the model writes after each of ``prompts``, every ``interval`` iterations and at the end of training.

    The model has ``generate(prompt: str, max_new_tokens=, temperature=, top_k=, generator=) -> str``. Each time the
    generator starts from ``seed``, so samples differ only by what the model has learned, and the random numbers of
    training do not change. ``interval=0`` samples at the end only. All ranks generate, as a sharded model needs them
    all; rank 0 logs. Raises ConfigError before training when the model does not have this method.
    """

    priority = "LOW"

    def __init__(
        self,
        prompts: str | Sequence[str] = "\n",
        interval: int = 1000,
        *,
        max_new_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int | None = None,
        seed: int = 0,
    ) -> None:
        if interval < 0:
            raise ConfigError(f"TextSampleHook: interval is {interval}; expected iterations, or 0 for the end only")
        self.prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        self.interval = interval
        self.seed = seed
        self._options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k}
        self._sampled_at = -1

    def before_train(self, runner: Runner) -> None:
        if not callable(getattr(runner.model, "generate", None)):
            raise ConfigError(
                f"TextSampleHook: the model {type(runner.model).__name__} has no method "
                "generate(prompt, max_new_tokens=, temperature=, top_k=, generator=); add one, or drop the hook"
            )

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self.interval and runner.progress.iteration % self.interval == 0:
            self._sample(runner)

    def after_train(self, runner: Runner) -> None:
        if self._sampled_at != runner.progress.iteration:
            self._sample(runner)

    def _sample(self, runner: Runner) -> None:
        self._sampled_at = runner.progress.iteration
        generator = torch.Generator(device=runner.device).manual_seed(self.seed)
        devices = [runner.device] if runner.device.type == "cuda" else []
        generate: Any = runner.model.generate
        with evaluation_mode(runner.model), torch.random.fork_rng(devices), torch.no_grad():
            texts = [generate(prompt, generator=generator, **self._options) for prompt in self.prompts]
        if runner.rank == 0:
            for text in texts:
                runner.logger.info("Sample at iteration %d:\n%s", runner.progress.iteration, text)
