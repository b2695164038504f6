"""The optimizers of `pytorch_optimizer <https://github.com/kozistr/pytorch_optimizer>`_ over a crash and a resume.

``pip install pytorch_optimizer schedulefree``, then ``pytest -m ecosystem tests/ecosystem``. `NOT_TRIED` has those that
cannot be built from the parameters alone, or that step only with a closure.
"""

import pytest
import torch
from exactness import assert_exact, train
from torch import nn

from mmtrain.errors import ConfigError
from mmtrain.registry import MODELS

library = pytest.importorskip("pytorch_optimizer", reason="pip install pytorch_optimizer to try its optimizers")
pytestmark = [pytest.mark.ecosystem, pytest.mark.filterwarnings("ignore")]  # the library's own warnings

_MODEL = "its first argument is the model"
_MUON = "its groups must say which of them use Muon"
NOT_TRIED = {
    "adahessian": "needs backward(create_graph=True)",
    "sophiah": "needs backward(create_graph=True)",
    "alig": "steps only with a closure",
    "lbfgs": "steps only with a closure",
    "bsam": "needs num_data",
    "ranger21": "needs num_iterations",
    "demo": "needs a process group",
    "magma": "wraps another optimizer",
    "adammini": _MODEL,
    "adalomo": _MODEL,
    "lomo": _MODEL,
    **dict.fromkeys(("adamuon", "adago", "distributedmuon", "muon", "muonclip", "normuon"), _MUON),
}
NOT_SAVED = {"scalableshampoo", "conda"}  # they keep objects of their own classes


@MODELS.register_module()
class Matrices(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.first = nn.Linear(6, 5, bias=bias)
        self.last = nn.Linear(5, 2, bias=bias)

    def forward(self, x, y):
        out = self.last(torch.tanh(self.first(x)))
        return {"loss": nn.functional.cross_entropy(out, y), "accuracy": (out.argmax(1) == y).float().mean()}


def options(kind):
    return {
        "model": {"type": "Matrices", "bias": kind not in ("spectralsphere",)},
        "optim_wrapper": {"optimizer": {"type": library.load_optimizer(kind)}},
        "param_scheduler": [],
        "val_dataloader": None,
        "val_evaluator": None,
        "val_cfg": None,
    }


SUPPORTED = set(library.get_supported_optimizers())


@pytest.mark.parametrize("kind", sorted(SUPPORTED - set(NOT_TRIED) - NOT_SAVED))
def test_exact_over_a_crash(tmp_path, kind):
    assert_exact(tmp_path, crashes=[("iteration", 8)], **options(kind))


@pytest.mark.parametrize("kind", sorted(NOT_SAVED))
def test_refused_after_the_first_update(tmp_path, kind):
    with pytest.raises(ConfigError, match=r"cannot be saved.*save_optimizer=False"):
        train(tmp_path, **options(kind))


class EvaluationMode:
    """What schedule-free optimizers ask for: their weights of evaluation in validation and in checkpoints' exports."""

    def before_val(self, runner):
        runner.optim_wrapper.optimizer.eval()

    def after_val(self, runner):
        runner.optim_wrapper.optimizer.train()

    before_train = after_val


def test_schedule_free_with_its_hook(tmp_path):
    schedulefree = pytest.importorskip("schedulefree", reason="pip install schedulefree to try it")
    assert_exact(
        tmp_path,
        crashes=[("iteration", 8), ("iteration", 16)],
        custom_hooks=[EvaluationMode()],
        optim_wrapper={"optimizer": {"type": schedulefree.AdamWScheduleFree, "lr": 0.05, "warmup_steps": 4}},
        param_scheduler=[],
    )
