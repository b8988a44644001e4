"""The intermediate classifier: its pooling, its maps and its loss are what they are called."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from freqseg.files import InputError
from freqseg.token_classifier import ORDERS, POOLS, TokenClassifier, multilabel_loss

few = settings(max_examples=20)
seeds = st.integers(0, 2**31)

def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

@pytest.fixture
def present():
    return torch.tensor([[True, False, True], [False, False, True]])

@few
@given(seeds, st.integers(1, 6), st.integers(1, 6))
def test_the_logit_is_the_pooled_score_of_a_linear_map(seed, h, w):
    tokens, weight = normal(2, 5, h, w, seed=seed), None
    for pool in POOLS:
        classifier = TokenClassifier(5, 3, pool)
        weight = classifier.score.weight[:, :, 0, 0]
        scores = torch.einsum("kd,bdhw->bkhw", weight, tokens)
        expected = scores.amax((-2, -1)) if pool == "max" else scores.mean((-2, -1))
        assert torch.allclose(classifier(tokens), expected, atol=1e-5)
        assert torch.allclose(classifier.evidence(tokens), scores, atol=1e-5)
    assert weight.shape == (3, 5) and sum(p.numel() for p in classifier.parameters()) == 15

def test_pooling_tokens_first_is_global_pooling_and_a_linear_layer():
    tokens = normal(2, 5, 4, 6)
    for pool, layer in (("max", nn.AdaptiveMaxPool2d(1)), ("mean", nn.AdaptiveAvgPool2d(1))):
        classifier = TokenClassifier(5, 3, pool, order="tokens")
        expected = layer(tokens).flatten(1) @ classifier.score.weight[:, :, 0, 0].T
        assert torch.allclose(classifier(tokens), expected, atol=1e-6)

def test_for_the_mean_the_order_does_not_matter_and_for_the_maximum_it_does():
    tokens, results = normal(2, 5, 4, 6), {}
    for pool in POOLS:
        for order in ORDERS:
            torch.manual_seed(0)
            results[pool, order] = TokenClassifier(5, 3, pool, order)(tokens)
    assert torch.allclose(results["mean", "scores"], results["mean", "tokens"], atol=1e-6)
    assert not torch.allclose(results["max", "scores"], results["max", "tokens"], atol=1e-2)

@few
@given(seeds)
def test_pooling_ignores_where_tokens_are(seed):
    tokens = normal(2, 5, 4, 6, seed=seed)
    shuffled = tokens.flatten(2)[..., torch.randperm(24)].view_as(tokens)
    for pool in POOLS:
        classifier = TokenClassifier(5, 3, pool)
        assert torch.allclose(classifier(tokens), classifier(shuffled), atol=1e-5)

@few
@given(seeds)
def test_maps_lie_in_0_to_1_reach_1_where_there_is_evidence_and_are_0_for_absent_classes(seed):
    present = torch.tensor([[True, False, True], [False, False, True]])
    tokens, classifier = normal(2, 5, 4, 6, seed=seed), TokenClassifier(5, 3)
    cam = classifier.cam(tokens, present)
    assert cam.shape == (2, 3, 4, 6) and cam.min() >= 0 and cam.max() <= 1 and not cam[~present].any()
    positive = (classifier.evidence(tokens).amax((-2, -1)) > 1e-3) & present
    spread = classifier.evidence(tokens).relu()
    assert torch.allclose(cam[positive].amax((-2, -1)), torch.ones(int(positive.sum())), atol=1e-3)
    assert torch.equal(cam[positive].flatten(1).argmax(1), spread[positive].flatten(1).argmax(1))

def test_a_class_without_positive_evidence_has_an_empty_map():
    classifier = TokenClassifier(2, 1)
    with torch.no_grad(): classifier.score.weight.fill_(-1.0)
    assert not classifier.cam(normal(1, 2, 3, 3).abs()).any()

def test_maps_carry_no_gradient_and_logits_do(present):
    tokens = normal(2, 5, 4, 6).requires_grad_()
    classifier = TokenClassifier(5, 3)
    assert not classifier.cam(tokens, present).requires_grad
    multilabel_loss(classifier(tokens), present).backward()
    assert tokens.grad.any() and classifier.score.weight.grad.any()

def test_with_the_maximum_each_class_moves_one_token_of_each_image():
    tokens = normal(2, 5, 4, 6).requires_grad_()
    TokenClassifier(5, 1)(tokens).sum().backward()
    assert (tokens.grad.norm(dim=1) > 0).sum((1, 2)).tolist() == [1, 1]

@few
@given(seeds)
def test_the_loss_is_the_mean_of_binary_cross_entropies(seed):
    logits, labels = 5 * normal(4, 3, seed=seed), normal(4, 3, seed=seed + 1) > 0
    assert torch.allclose(multilabel_loss(logits, labels), F.binary_cross_entropy_with_logits(logits, labels.float()), atol=1e-6)

def test_the_loss_of_extreme_logits_is_finite_with_finite_gradients(present):
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.tensor([[1e4, -1e4, -1e4], [1e4, 1e4, 1e4]], dtype=dtype, requires_grad=True)
        loss = multilabel_loss(logits, present)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(logits.grad).all() and loss.dtype == torch.float32

def test_normalising_removes_the_scale_of_every_token():
    tokens, classifier = normal(2, 5, 4, 6), TokenClassifier(5, 3, normalise=True)
    assert torch.allclose(classifier(tokens), classifier(7 * tokens + 3), atol=1e-4)
    assert not torch.allclose(classifier(tokens), classifier(tokens.flip(1)), atol=1e-2)

def test_bf16_tokens_and_autocast_give_fp32_maps(present):
    tokens, classifier = normal(2, 5, 4, 6), TokenClassifier(5, 3)
    full = classifier.cam(tokens, present)
    with torch.autocast("cpu", dtype=torch.bfloat16): cast = classifier.cam(tokens, present)
    half = classifier.bfloat16().cam(tokens.bfloat16(), present)
    assert cast.dtype == half.dtype == torch.float32
    assert torch.allclose(full, cast, atol=0.1) and torch.allclose(full, half, atol=0.1)

def test_a_separable_problem_is_learned_from_image_labels_and_localised():
    torch.manual_seed(0)
    tokens, labels = 0.3 * torch.randn(40, 6, 5, 5), torch.rand(40, 3) < 0.5
    places = torch.randint(25, (40, 3))
    for c in range(3): tokens.flatten(2)[torch.arange(40), c, places[:, c]] += 3.0 * labels[:, c]
    classifier = TokenClassifier(6, 3, "mean")   # a convex problem: no start is unlucky
    optimiser = torch.optim.AdamW(classifier.parameters(), lr=0.05)
    for _ in range(100):
        optimiser.zero_grad(); multilabel_loss(classifier(tokens), labels).backward(); optimiser.step()
    peaks = classifier.cam(tokens).flatten(2).argmax(2)
    assert (peaks == places)[labels].float().mean() > 0.9

def test_mistakes_are_named(present):
    classifier, tokens = TokenClassifier(5, 3), normal(2, 5, 4, 6)
    for options, message in (({"pool": "sum"}, "pool='sum'"), ({"order": "first"}, "order='first'"), ({"classes": 0}, "classes=0")):
        with pytest.raises(InputError, match=message): TokenClassifier(**{"width": 5, "classes": 3} | options)
    with pytest.raises(InputError, match=r"reads \(B, 5, h, w\)"): classifier(normal(2, 4, 4, 6))
    with pytest.raises(InputError, match="does not fit maps"): classifier.cam(tokens, present[:, :2])
    with pytest.raises(InputError, match="differ in shape"): multilabel_loss(classifier(tokens), present[:1])
