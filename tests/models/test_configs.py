"""The configs in configs/gpt: they load, and what they describe can be built."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mmtrain.registry import DATASETS, MODELS, build

CONFIGS = Path(__file__).parents[2] / "configs" / "gpt"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.py") if not path.stem.startswith("_"))


def load(name):
    return Config.fromfile(CONFIGS / f"{name}.py")


@pytest.mark.parametrize("name", NAMES)
def test_model_and_data_agree(name):
    cfg = load(name)
    data = [cfg.train_dataloader.dataset, cfg.val_dataloader.dataset]
    assert {part.context for part in data} == {cfg.model.context}
    assert {part.cache_dir for part in data} == {f"{cfg.work_dir}/data"}
    assert [part.split for part in data] == ["train", "val"]
    warm_up, decay = cfg.param_scheduler
    assert warm_up.end == decay.begin < cfg.train_cfg.max_iters
    with torch.device("meta"):
        model = build(MODELS, cfg.model, path="model")
    assert model.context == cfg.model.context


def test_configs_do_not_change_their_base():
    assert load("gpt2_124m").model.vocab_size == 50257
    assert load("stdlib").model.vocab_size == load("tiny").model.vocab_size == 256


def test_sizes_are_those_in_the_comments():
    sizes = {}
    for name in ("stdlib", "gpt2_124m"):
        with torch.device("meta"):
            sizes[name] = build(MODELS, load(name).model, path="model").num_parameters()
    assert sizes["gpt2_124m"] == 124_439_808
    assert 0.75e6 < sizes["stdlib"] < 0.85e6


def test_the_tiny_config_learns(tmp_path):
    cfg = load("tiny")
    for part in (cfg.train_dataloader.dataset, cfg.val_dataloader.dataset):
        part.cache_dir = str(tmp_path)
    train = build(DATASETS, cfg.train_dataloader.dataset, path="train_dataloader.dataset")
    assert len(build(DATASETS, cfg.val_dataloader.dataset, path="val_dataloader.dataset")) == 32
    torch.manual_seed(0)
    model = build(MODELS, cfg.model, path="model")
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.optim_wrapper.optimizer.lr)
    losses = []
    for _ in range(cfg.train_cfg.max_iters):
        indices = torch.randint(len(train), (cfg.train_dataloader.batch_size,)).tolist()
        items = [train[index] for index in indices]
        loss = model(**{key: torch.stack([item[key] for item in items]) for key in items[0]})["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) / 5 < losses[0] - 1.0


@pytest.mark.slow
def test_gpt2_takes_one_step():
    cfg = load("gpt2_124m")
    torch.manual_seed(0)
    model = build(MODELS, cfg.model, path="model")
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.optim_wrapper.optimizer.lr)
    tokens = torch.randint(256, (1, cfg.model.context + 1))
    before = model.blocks[0].mlp.up.weight.detach().clone()
    with torch.autocast("cpu", getattr(torch, cfg.optim_wrapper.dtype)):
        loss = model(input_ids=tokens[:, :-1], labels=tokens[:, 1:])["loss"]
    loss.backward()
    optimizer.step()
    assert 10 < float(loss.detach()) < 12  # ln 50,257 = 10.8
    assert not torch.equal(model.blocks[0].mlp.up.weight, before)
