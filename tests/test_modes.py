from contextlib import suppress

import pytest
from torch import nn

from mmtrain.modes import evaluation_mode


@pytest.mark.parametrize("error", [None, ValueError])
def test_every_module_is_in_the_mode_it_was_in(error):
    model = nn.Sequential(nn.Dropout(), nn.Linear(1, 1)).train()
    model[0].eval()
    with suppress(ValueError), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        if error:
            raise error
    assert [module.training for module in model.modules()] == [True, False, True]
