import torch

from mmtrain.models.sampling import draw, sample_tokens


def test_draws_follow_the_probabilities():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.5, 0.25, 0.25]).log()
    drawn = [draw(logits, temperature=1.0, top_k=None, generator=generator) for _ in range(2000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=3) / 2000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.25, 0.25]), atol=0.05, rtol=0)


def test_top_k_leaves_only_the_best():
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.0, 3.0, 1.0, 2.9])
    assert {draw(logits, temperature=5.0, top_k=2, generator=generator) for _ in range(100)} == {1, 3}
    assert {draw(logits, temperature=100.0, top_k=9, generator=generator) for _ in range(200)} == {0, 1, 2, 3}


class Counter(torch.nn.Module):
    """Predicts the last token plus one, and remembers how much it was shown."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.lengths = []

    def forward(self, input_ids):
        self.lengths.append(input_ids.shape[1])
        return {"logits": 100.0 * torch.nn.functional.one_hot((input_ids + 1) % 10, 10)}


def test_the_window_never_exceeds_the_context():
    model = Counter()
    assert sample_tokens(model, [3, 4], count=7, context=4) == [5, 6, 7, 8, 9, 0, 1]
    assert model.lengths == [2, 3, 4, 4, 4, 4, 4]


def test_every_module_is_left_in_its_mode():
    model = Counter()
    model.frozen = torch.nn.Dropout().eval()
    sample_tokens(model.train(), [1], count=1, context=4)
    assert model.training
    model.frozen.eval()
    sample_tokens(model, [1], count=1, context=4)
    assert (model.training, model.frozen.training) == (True, False)
