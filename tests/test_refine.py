"""The refinement room: PAR equals its equation written as plain loops."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import freqseg.refine as refine_room
from freqseg.files import InputError
from freqseg.refine import PAR


def plain_par(image: np.ndarray, probs: np.ndarray, iterations: int, dilations: tuple[int, ...]) -> np.ndarray:
    "Pixel-adaptive refinement of one (3, H, W) image, one pixel and one neighbour at a time."
    _, height, width = image.shape
    offsets = [(d * dy, d * dx) for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
    distances = np.array([np.hypot(dy, dx) for dy, dx in offsets])
    position = np.exp(-((distances / (distances.std(ddof=1) + 1e-8) / 0.3) ** 2))
    position /= position.sum()

    def stands_at(row: int, column: int) -> list[tuple[int, int]]:
        return [(min(max(row + dy, 0), height - 1), min(max(column + dx, 0), width - 1)) for dy, dx in offsets]

    weights = {}
    for row, column in itertools.product(range(height), range(width)):
        colours = np.array([image[:, i, j] for i, j in stands_at(row, column)])
        difference = np.abs(colours - image[:, row, column]) / (colours.std(0, ddof=1) + 1e-8) / 0.3
        logits = -(difference**2).mean(1)
        affinity = np.exp(logits - logits.max())
        weights[row, column] = affinity / affinity.sum() + 0.01 * position
    for _ in range(iterations):
        previous, probs = probs, np.zeros_like(probs)
        for (row, column), weight in weights.items():
            for (i, j), w in zip(stands_at(row, column), weight, strict=True):
                probs[:, row, column] += w * previous[:, i, j]
    return probs


def random_case(batch: int, classes: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(height * width)
    return torch.rand(batch, 3, height, width, generator=generator), torch.rand(batch, classes, height, width, generator=generator)


@pytest.mark.parametrize("dilations", [(1,), (1, 2, 4), (1, 2, 4, 8, 12, 24)])
def test_par_equals_the_equation_in_plain_loops(dilations: tuple[int, ...]) -> None:
    image, probs = random_case(2, 3, 7, 9)
    refined = PAR(3, dilations)(image, probs.double())
    for n in range(2):
        expected = plain_par(image[n].double().numpy(), probs[n].double().numpy(), 3, dilations)
        np.testing.assert_allclose(refined[n], expected, atol=2e-5)


def test_par_defaults_are_the_published_ones() -> None:
    par = PAR()
    assert (par.iterations, par.dilations, par.width, par.position_weight) == (20, (1, 2, 4, 8, 12, 24), 0.3, 0.01)
    assert not list(par.parameters()) and not par.state_dict()
    assert par.weights(torch.rand(1, 3, 5, 5)).shape == (1, 48, 5, 5)


def test_par_weights_are_positive_and_sum_to_one_point_zero_one() -> None:
    weights = PAR().weights(random_case(1, 1, 20, 15)[0])
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(1), torch.full((1, 20, 15), 1.01))


def test_par_of_a_constant_map_grows_by_the_sum_of_weights() -> None:
    image, _ = random_case(1, 1, 12, 12)
    torch.testing.assert_close(PAR()(image, torch.full((1, 2, 12, 12), 0.5)), torch.full((1, 2, 12, 12), 0.5 * 1.01**20))


@settings(max_examples=15)
@given(height=st.integers(2, 12), width=st.integers(2, 12), classes=st.integers(1, 4))
def test_par_is_linear_in_the_scores_and_equivariant_to_class_order(height: int, width: int, classes: int) -> None:
    image, probs = random_case(1, classes, height, width)
    par, order = PAR(4), torch.randperm(classes)
    torch.testing.assert_close(par(image, probs[:, order]), par(image, probs)[:, order])
    torch.testing.assert_close(par(image, 2 * probs + 1), 2 * par(image, probs) + par(image, torch.ones_like(probs)))


def test_par_mirrors_with_the_picture() -> None:
    image, probs = random_case(1, 2, 10, 13)
    torch.testing.assert_close(PAR(5)(image.flip(-1), probs.flip(-1)), PAR(5)(image, probs).flip(-1), atol=1e-5, rtol=1e-4)


def test_par_does_not_care_whether_colours_run_to_1_or_to_255() -> None:
    image, probs = random_case(1, 2, 10, 10)
    torch.testing.assert_close(PAR(5)(255 * image, probs), PAR(5)(image, probs), atol=1e-4, rtol=1e-4)
    whole = (255 * image).byte()
    torch.testing.assert_close(PAR(5)(whole, probs), PAR(5)(whole / 255, probs), atol=1e-4, rtol=1e-4)


def test_par_refines_each_image_of_a_batch_by_itself() -> None:
    image, probs = random_case(3, 2, 9, 8)
    torch.testing.assert_close(PAR(5)(image, probs)[1:2], PAR(5)(image[1:2], probs[1:2]))


def test_par_survives_a_picture_of_one_colour() -> None:
    _, probs = random_case(1, 2, 9, 8)
    weights = PAR().weights(torch.full((1, 3, 9, 8), 0.3))
    torch.testing.assert_close(weights.sum(1), torch.full((1, 9, 8), 1.01))
    assert PAR()(torch.full((1, 3, 9, 8), 0.3), probs).isfinite().all()


def test_par_keeps_scores_on_their_side_of_a_clear_outline() -> None:
    image = torch.zeros(1, 3, 24, 24)
    image[..., 12:] = 1
    probs = torch.full((1, 1, 24, 24), 0.2)
    probs[..., 10:] = 0.8  # two columns over the outline
    refined = PAR()(image, probs)[0, 0, 12]
    assert refined[:12].max() < refined[12:].min() - 0.2


def test_par_resizes_the_picture_to_the_scores() -> None:
    image, probs = random_case(1, 2, 16, 16)
    large = torch.nn.functional.interpolate(image, size=(31, 31), mode="bilinear", align_corners=True)
    torch.testing.assert_close(PAR(5)(large, probs), PAR(5)(image, probs), atol=1e-3, rtol=1e-3)


def test_par_neighbours_are_views_not_copies() -> None:
    _, probs = random_case(1, 21, 30, 30)
    storages = {view.untyped_storage().data_ptr() for view in refine_room._neighbours(probs, PAR().dilations)}
    assert len(storages) == 1


def test_par_gradient_with_respect_to_the_scores_is_right() -> None:
    image, probs = random_case(1, 2, 4, 5)
    assert torch.autograd.gradcheck(lambda p: PAR(2, (1, 2))(image, p), probs.double().requires_grad_())


def test_par_rejects_batches_of_different_length() -> None:
    with pytest.raises(InputError, match="2 images but 3 score maps"):
        PAR()(torch.zeros(2, 3, 8, 8), torch.zeros(3, 1, 8, 8))
