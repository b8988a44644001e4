"""The refinement room: PAR equals its equation written as plain loops; the dense CRF is pydensecrf, ordered and bounded."""

import builtins
import itertools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import freqseg.refine as refine_room
from freqseg.files import InputError
from freqseg.refine import CRF_PRESETS, PAR, CRFSettings, crf_image, crf_settings, dense_crf


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


# --- pixel-adaptive refinement -------------------------------------------------------------------------------------

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


# --- dense CRF -----------------------------------------------------------------------------------------------------

def crf_case(number: int, classes: int = 3, size: tuple[int, int] = (24, 31)) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(number)
    image = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
    logits = generator.normal(size=(classes, *size)).astype(np.float32)
    return image, np.exp(logits) / np.exp(logits).sum(0)


def exact_mean_field(image: np.ndarray, probs: np.ndarray, settings: CRFSettings) -> np.ndarray:
    "Dense CRF with every pair of pixels summed, kernels normalised symmetrically (Krähenbühl and Koltun, 2011)."
    classes, height, width = probs.shape
    place = np.stack(np.mgrid[:height, :width], -1).reshape(-1, 2).astype(float)
    colour = image.reshape(-1, 3).astype(float)

    def kernel(*features: np.ndarray) -> np.ndarray:
        f = np.concatenate(features, 1)
        k = np.exp(-((f[:, None] - f[None]) ** 2).sum(-1) / 2)
        scale = 1 / np.sqrt(k.sum(1) + 1e-20)
        return scale[:, None] * k * scale[None]

    pair = settings.gaussian_compat * kernel(place / settings.gaussian_sxy)
    pair += settings.bilateral_compat * kernel(place / settings.bilateral_sxy, colour / settings.bilateral_srgb)
    log_unary = np.log(probs.clip(1e-5, 1)).reshape(classes, -1)
    q = np.exp(log_unary) / np.exp(log_unary).sum(0)
    for _ in range(settings.iterations):
        logits = log_unary + q @ pair.T
        q = np.exp(logits - logits.max(0))
        q /= q.sum(0)
    return q.reshape(probs.shape)


@pytest.fixture
def pydensecrf():
    return pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf2 is not installed (pip install 'freqseg[crf]')")


@pytest.mark.parametrize("name", CRF_PRESETS)
def test_crf_is_close_to_exact_mean_field_over_all_pairs(pydensecrf, name: str) -> None:
    image = np.full((20, 22, 3), 60, np.uint8)
    image[:, 11:] = 180
    _, noise = crf_case(1, 3, (20, 22))
    probs = 0.6 * noise + 0.4 * np.stack([image[..., 0] < 100, image[..., 0] > 100, np.zeros((20, 22))]).astype(np.float32)
    found, expected = crf_image(image, probs, name), exact_mean_field(image, probs, CRF_PRESETS[name])
    # pydensecrf filters on a permutohedral lattice, which approximates the sums.
    assert np.abs(found - expected).mean() < 0.03
    assert (found.argmax(0) == expected.argmax(0)).mean() > 0.97


def test_presets_are_the_published_numbers() -> None:
    numbers = {name: tuple(vars(s).values()) for name, s in CRF_PRESETS.items()}
    assert numbers == {"weclip": (10, 3, 3, 64, 5, 4), "toco": (10, 1, 1, 121, 5, 4), "clip_es": (10, 1, 3, 67, 3, 4)}


def test_crf_sums_to_one_and_labels_are_its_argmax(pydensecrf) -> None:
    image, probs = crf_case(2)
    posterior = crf_image(image, probs)
    assert posterior.dtype == np.float32 and posterior.shape == probs.shape
    np.testing.assert_allclose(posterior.sum(0), 1, atol=1e-4)
    labels = crf_image(image, probs, labels=True)
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, posterior.argmax(0))


def test_crf_without_kernels_returns_the_probabilities(pydensecrf) -> None:
    image, probs = crf_case(3)
    np.testing.assert_allclose(crf_image(image, probs, CRFSettings(gaussian_compat=0, bilateral_compat=0)), probs, atol=1e-5)


def test_crf_is_equivariant_to_class_order(pydensecrf) -> None:
    image, probs = crf_case(4)
    np.testing.assert_allclose(crf_image(image, probs[[2, 0, 1]]), crf_image(image, probs)[[2, 0, 1]], atol=1e-4)


class ThreadsForProcesses(ThreadPoolExecutor):
    "The pool's interface without the seconds in which processes start."

    def __init__(self, workers: int, context: object, initializer: object, initargs: tuple) -> None:
        assert context.get_start_method() == "spawn"
        super().__init__(workers)


@pytest.mark.parametrize("pool", [ThreadsForProcesses, pytest.param(ProcessPoolExecutor, marks=pytest.mark.slow)])
def test_pool_gives_the_serial_results_in_order_and_stays_bounded(pydensecrf, monkeypatch, pool) -> None:
    monkeypatch.setattr(refine_room, "ProcessPoolExecutor", pool)
    cases = [crf_case(n, size=(10 + n, 12)) for n in range(9)]
    serial = list(dense_crf([i for i, _ in cases], [p for _, p in cases], workers=1, progress=False))
    read = itertools.count()
    progress = {"read": 0, "behind": 0}

    def images():
        for image, _ in cases:
            progress["read"] = next(read) + 1
            yield image

    results = dense_crf(images(), (torch.from_numpy(p) for _, p in cases), workers=2, progress=False)
    for done, (found, expected) in enumerate(zip(results, serial, strict=True)):
        progress["behind"] = max(progress["behind"], progress["read"] - done)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert progress["read"] == 9 and progress["behind"] <= 4


def test_nothing_is_read_before_the_first_result_is_asked_for(pydensecrf) -> None:
    def never():
        raise AssertionError("read too early")
        yield

    results = dense_crf(never(), never(), progress=False)
    assert iter(results) is results
    results.close()


def test_stopping_early_closes_the_sources(pydensecrf) -> None:
    closed = []

    def images():
        try:
            while True:
                yield crf_case(0)[0]
        finally:
            closed.append(True)

    results = dense_crf(images(), itertools.repeat(crf_case(0)[1]), workers=1, progress=False, labels=True)
    assert next(results).shape == (24, 31)
    results.close()
    del results
    assert closed


def test_progress_bar_counts_images_on_standard_error(pydensecrf, capsys) -> None:
    image, probs = crf_case(5)
    list(dense_crf([Image.fromarray(image)] * 2, [probs] * 2, workers=1))
    shown = capsys.readouterr()
    assert "dense CRF" in shown.err and "2/2" in shown.err and not shown.out
    list(dense_crf([image], [probs], workers=1, progress=False))
    assert not capsys.readouterr().err


def test_wrong_items_are_named_by_their_number(pydensecrf) -> None:
    image, probs = crf_case(6)

    def run(images, maps):
        return list(dense_crf(images, maps, workers=1, progress=False))

    with pytest.raises(InputError, match=r"image 1 is float64 \(24, 31, 3\): .*uint8 RGB"):
        run([image, image / 255], [probs, probs])
    with pytest.raises(InputError, match="image 0 is uint8 .*uint8 RGB"):
        run([image[..., 0]], [probs])
    with pytest.raises(InputError, match=r"probabilities 1 .*needs \(classes, 24, 31\)"):
        run([image, image], [probs, probs[:, :20]])
    with pytest.raises(InputError, match="only one of the two has an item 1"):
        run([image], [probs, probs])


def test_wrong_settings_are_reported_at_once(pydensecrf) -> None:
    with pytest.raises(InputError, match="'voc': use one of weclip, toco, clip_es"):
        dense_crf([], [], preset="voc")
    with pytest.raises(InputError, match="at least 1, got 0"):
        dense_crf([], [], workers=0)
    assert crf_settings(CRFSettings(iterations=3)).iterations == 3


def test_missing_package_says_what_to_install(monkeypatch) -> None:
    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("pydensecrf"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install pydensecrf2==1\.1.*Python 3\.13"):
        dense_crf([], [])


@pytest.mark.slow
def test_a_killed_process_is_reported_and_leaves_no_process_behind(pydensecrf) -> None:
    image, probs = crf_case(0, size=(200, 200))
    results = dense_crf(itertools.repeat(image), itertools.repeat(probs), workers=2, progress=False)
    next(results)
    children = multiprocessing.active_children()
    children[0].kill()
    with pytest.raises(RuntimeError, match="a CRF process died"):
        list(results)
    for child in children:
        child.join(10)
    assert children and not any(child.is_alive() for child in children)


def test_a_dying_process_is_reported_with_remedies(pydensecrf, monkeypatch) -> None:
    class DyingPool(refine_room.ProcessPoolExecutor):
        def submit(self, *args):
            raise refine_room.BrokenProcessPool("gone")

    monkeypatch.setattr(refine_room, "ProcessPoolExecutor", DyingPool)
    with pytest.raises(RuntimeError, match="fewer workers.*__main__"):
        list(dense_crf([crf_case(0)[0]], [crf_case(0)[1]], workers=2, progress=False))


def test_real_pictures_keep_their_clear_labels(pydensecrf, real_data) -> None:
    picture = next(iter(sorted(real_data.rglob("*.jpg"))))
    image = np.asarray(Image.open(picture).convert("RGB").resize((120, 90)))
    bright = image.mean(-1) > np.median(image.mean(-1))
    probs = np.stack([np.where(bright, 0.1, 0.9), np.where(bright, 0.9, 0.1)]).astype(np.float32)
    agreement = (crf_image(image, probs, labels=True) == bright).mean()
    assert agreement > 0.7
