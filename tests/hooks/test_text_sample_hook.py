import random

import numpy as np
import pytest
import torch
from torch import nn

from mmtrain.errors import ConfigError
from mmtrain.hooks import TextSampleHook


class Writer(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = nn.Dropout()
        self.calls = []

    def generate(self, prompt, *, max_new_tokens, temperature, top_k, generator):
        assert not self.training
        assert not torch.is_grad_enabled()
        torch.rand(3)  # a careless model
        number = torch.randint(1000, (1,), generator=generator).item()
        self.calls.append((prompt, max_new_tokens, temperature, top_k, number))
        return f"{prompt}-{number}"


def test_samples_come_at_intervals_and_at_the_end(make_runner):
    model = Writer()
    runner = make_runner(model=model, per_epoch=10)
    hook = TextSampleHook(["a", "b"], interval=4, max_new_tokens=5, temperature=0.5, top_k=3, seed=1)
    hook.before_train(runner)
    model.train()
    model.part.eval()  # frozen by the user
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    for _ in range(10):
        runner.step(hook)
    hook.after_train(runner)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    assert (model.training, model.part.training) == (True, False)
    assert [text.split(":")[0] for text in runner.recorder.infos] == [
        f"Sample at iteration {n}" for n in (4, 4, 8, 8, 10, 10)
    ]
    assert model.calls[0][:4] == ("a", 5, 0.5, 3)
    assert model.calls[0] == model.calls[2] == model.calls[4]  # the same draws every time
    assert model.calls[0][4] != model.calls[1][4]


def test_the_last_sample_is_not_taken_twice(make_runner):
    runner = make_runner(model=Writer())
    hook = TextSampleHook("x", interval=5)
    for _ in range(5):
        runner.step(hook)
    hook.after_train(runner)
    assert len(runner.recorder.infos) == 1


def test_other_ranks_generate_and_log_nothing(make_runner):
    runner = make_runner(model=Writer())
    runner.rank = 1
    hook = TextSampleHook(interval=0)
    runner.step(hook)
    hook.after_train(runner)
    assert len(runner.model.calls) == 1
    assert runner.recorder.infos == []


def test_a_model_that_cannot_generate_is_refused(make_runner):
    with pytest.raises(ConfigError, match=r"the model Linear has no method generate\("):
        TextSampleHook().before_train(make_runner())
    with pytest.raises(ConfigError, match="interval is -1"):
        TextSampleHook(interval=-1)
