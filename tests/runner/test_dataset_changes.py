"""Hooks that change the dataset during training: the change takes effect, and a resume at any epoch is exact."""

import pytest
from exactness import assert_exact, run
from parts import logged

OPTIONS = {"train_cfg": {"by_epoch": False, "max_iters": 24}}  # four epochs of six iterations


class CloseMosaic:
    """Switches augmentation off from epoch 2 on, as YOLOX does; with ``idiom`` as mmdetection's hooks do."""

    def __init__(self, idiom):
        self.idiom = idiom

    def before_train_epoch(self, runner):
        loader = runner.train_dataloader
        if runner.epoch >= 2 and loader.dataset.augment:
            loader.dataset.augment = False
            if self.idiom and loader.persistent_workers:
                loader._DataLoader__initialized = False
                loader._iterator = None


@pytest.mark.parametrize(
    ("num_workers", "persistent_workers", "crash"),
    [(2, True, 9), (2, True, 15), (2, False, 18), (2, False, 12), (0, None, 14)],
)
def test_closing_augmentation_takes_effect_and_resumes_exactly(tmp_path, num_workers, persistent_workers, crash):
    changes = {
        "train_dataloader": {"num_workers": num_workers, "persistent_workers": persistent_workers},
        "custom_hooks": [CloseMosaic(idiom=crash == 15)],
        **OPTIONS,
    }
    assert_exact(tmp_path, crashes=[("iteration", crash)], **changes)
    run(tmp_path / "without", **(changes | {"custom_hooks": []}))
    found, plain = (logged(tmp_path / name, "loss") for name in ("uninterrupted", "without"))
    changed = [step for step in sorted(found) if found[step] != plain[step]]
    assert (len(found), changed[0]) == (24, 13)
