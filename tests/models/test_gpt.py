import math

import pytest
import torch

from mmtrain.datasets import ByteTokenizer
from mmtrain.errors import ConfigError, RunError
from mmtrain.models import GPT
from mmtrain.registry import MODELS, build


def small(**changes):
    torch.manual_seed(0)
    options = {"layers": 2, "heads": 2, "width": 32, "positions": "rotary", **changes}
    return GPT(256, 16, **options)


def ids(batch=3, length=16):
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["learned", "rotary"])
def positions(request):
    return request.param


def test_shapes_and_loss_of_a_fresh_model(positions):
    model = small(positions=positions)
    tokens, labels = ids(), ids().roll(1)
    assert model(input_ids=tokens)["logits"].shape == (3, 16, 256)
    output = model(input_ids=tokens, labels=labels)
    assert list(output) == ["loss"]
    assert output["loss"].shape == ()
    assert abs(float(output["loss"].detach()) - math.log(256)) < 0.5  # it has not learned anything yet
    both = model(input_ids=tokens, labels=labels, return_logits=True)
    expected = torch.nn.functional.cross_entropy(both["logits"].flatten(0, 1), labels.flatten())
    torch.testing.assert_close(both["loss"], expected)


def test_labels_of_minus_100_are_left_out():
    model = small()
    tokens, labels = ids(), ids().roll(1)
    labels[:, 4:] = -100
    first = model(input_ids=tokens[:, :4], labels=labels[:, :4])["loss"]
    torch.testing.assert_close(model(input_ids=tokens, labels=labels)["loss"], first)


def test_later_tokens_do_not_change_earlier_logits(positions):
    model = small(positions=positions)
    tokens = ids()
    before = model(input_ids=tokens)["logits"]
    tokens[:, 10] = (tokens[:, 10] + 1) % 256
    after = model(input_ids=tokens)["logits"]
    torch.testing.assert_close(after[:, :10], before[:, :10], rtol=0, atol=0)
    assert not torch.equal(after[:, 10:], before[:, 10:])


def test_order_matters(positions):
    model = small(positions=positions)
    tokens = ids()
    swapped = tokens.clone()
    swapped[:, [0, 1]] = tokens[:, [1, 0]]
    assert not torch.allclose(model(input_ids=tokens)["logits"][:, -1], model(input_ids=swapped)["logits"][:, -1])


def test_rotary_scores_depend_only_on_the_distance():
    rotary = small().rotary
    query, key = torch.randn(2, 16).unbind(0)
    turned_query, turned_key = rotary(query.expand(1, 1, 16, 16)), rotary(key.expand(1, 1, 16, 16))
    scores = turned_query[0, 0] @ turned_key[0, 0].T
    for distance in range(5):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[0].expand_as(diagonal), rtol=1e-4, atol=1e-4)


def test_embedding_and_head_are_one_weight_with_a_gradient():
    model = small()
    assert model.head.weight is model.embed.weight
    model(input_ids=ids(), labels=ids())["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_init_weights_after_to_empty_sets_every_value():
    with torch.device("meta"):
        blank = GPT(256, 16, layers=2, heads=2, width=32, positions="rotary", bias=True)
    assert all(p.is_meta for p in blank.parameters())
    blank.to_empty(device="cpu")
    ordinary = small(bias=True)
    for model in (blank, ordinary):
        torch.manual_seed(3)
        model.init_weights()
    assert blank.head.weight is blank.embed.weight
    torch.testing.assert_close(blank.state_dict(), ordinary.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(blank(input_ids=ids()), ordinary(input_ids=ids()), rtol=0, atol=0)


def test_layers_that_write_to_the_residual_stream_start_smaller():
    model = small(width=128, layers=8, heads=4)
    wide, narrow = (layer.weight.detach() for layer in (model.blocks[3].mlp.up, model.blocks[3].mlp.down))
    assert float(wide.std()) == pytest.approx(0.02 * math.sqrt(768 / 128), rel=0.03)
    assert float(narrow.std()) == pytest.approx(float(wide.std()) / 4, rel=0.03)


def test_gpt2_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = GPT(50257, 1024, layers=12, heads=12, width=768, bias=True)
    assert model.num_parameters() == 124_439_808
    expected = 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024
    assert model.flops_per_token() == expected
    model.requires_grad_(False)
    assert model.num_parameters(trainable_only=True) == 0


def test_dropout_acts_in_training_only():
    model = small(dropout=0.5)
    tokens = ids()
    assert not torch.equal(model(input_ids=tokens)["logits"], model(input_ids=tokens)["logits"])
    model.eval()
    assert torch.equal(model(input_ids=tokens)["logits"], model(input_ids=tokens)["logits"])


def test_it_learns():
    model = small()
    tokens = ids(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = model(input_ids=tokens[:, :-1], labels=tokens[:, 1:])["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss.detach()) < 0.5


def test_bfloat16_autocast(positions):
    model = small(positions=positions)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids(), labels=ids())["loss"]
    loss.backward()
    assert loss.isfinite()
    assert model.embed.weight.grad.dtype == torch.float32


def test_generate_is_repeatable_and_does_not_change_the_default_generators():
    model = small(tokenizer=ByteTokenizer(), dropout=0.3).train()
    state = torch.get_rng_state()
    texts = [
        model.generate("ab", max_new_tokens=30, top_k=20, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert texts[0].startswith("ab")
    assert texts[0] == texts[1] != texts[2]
    assert model.generate("ab", max_new_tokens=5) == model.generate("ab", max_new_tokens=5)


def test_generate_at_temperature_0_takes_the_most_likely():
    model = small(tokenizer=ByteTokenizer())
    likeliest = int(model(input_ids=torch.tensor([[97, 98]]))["logits"][0, -1].argmax())
    assert model.generate("ab", max_new_tokens=1, temperature=0) == "ab" + ByteTokenizer().decode([likeliest])
    assert model.generate("", max_new_tokens=1, top_k=1) == model.generate("", max_new_tokens=1, temperature=0)


def test_built_from_a_config_with_its_tokenizer():
    shape = {"layers": 1, "heads": 2, "width": 8}
    cfg = {"type": "GPT", "vocab_size": 256, "context": 8, "tokenizer": {"type": "ByteTokenizer"}, **shape}
    model = build(MODELS, cfg, path="model")
    assert isinstance(model, GPT)
    assert isinstance(model.tokenizer, ByteTokenizer)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"width": 33}, "model.width: 33 cannot be divided among model.heads=2"),
        ({"width": 6}, "rotary positions need an even one"),
        ({"positions": "relative"}, "model.positions: 'relative'"),
    ],
)
def test_impossible_shapes_are_refused(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        small(**changes)


def test_a_sequence_beyond_the_context_and_a_missing_tokenizer_are_refused():
    with pytest.raises(RunError, match="17 tokens does not fit a context of 16"):
        small()(input_ids=ids(length=17))
    with pytest.raises(ConfigError, match=r"model.tokenizer: is not set"):
        small().generate("x")
