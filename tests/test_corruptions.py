"""Corruptions: as strong as ImageNet-C's, the same everywhere, and never another size."""

import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional as peer

from freqseg.work.corruptions import CORRUPTIONS, REFERENCE, SEVERITIES, Corruption, parse_corruptions
from freqseg.files import InputError
from freqseg.spectra import high_frequency_share
from freqseg.world.scenes import World

PUBLISHED = {   # of all five severities (Hendrycks and Dietterich, 2019)
    "blur": (1, 2, 3, 4, 6), "noise": (.08, .12, .18, .26, .38), "jpeg": (25, 18, 15, 10, 7), "contrast": (.4, .3, .2, .1, .05)}
ALL = [Corruption(kind, strength) for kind in CORRUPTIONS for strength in (1, 2, 3)]


@pytest.fixture(scope="module")
def scene() -> Image.Image:
    return Image.fromarray(World(0, "test")[3].image)


def values(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float64)


def test_the_table_is_imagenet_c_s_at_the_severities_named() -> None:
    assert set(CORRUPTIONS) == set(PUBLISHED)
    for kind, parameters in CORRUPTIONS.items():
        assert parameters == tuple(PUBLISHED[kind][severity - 1] for severity in SEVERITIES)
    assert Corruption("blur", 2).as_dict() == {"kind": "blur", "strength": 2, "parameter": 3, "severity": 3}
    assert Corruption("blur", 0).as_dict() == {"kind": "blur", "strength": 0, "parameter": None, "severity": 0}


# ---- what each does -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("strength", [1, 2, 3])
def test_blur_is_torchvision_s_inside_a_picture_of_the_reference_size(strength: int, scene) -> None:
    assert max(scene.size) == REFERENCE
    ours, edge, sigma = values(Corruption("blur", strength)(scene, "")), 30, CORRUPTIONS["blur"][strength - 1]
    theirs = peer.gaussian_blur(torch.from_numpy(values(scene)).float().permute(2, 0, 1), 8 * sigma + 1, sigma).permute(1, 2, 0)
    assert np.abs(ours - theirs.numpy())[edge:-edge, edge:-edge].max() < 1


@pytest.mark.parametrize("side", [56, 112, 448])
def test_blur_takes_the_same_share_of_a_picture_of_any_size(side: int) -> None:
    wave = np.cos(np.arange(side) / side * 2 * np.pi * 8)   # eight cycles per picture
    image = Image.fromarray(np.repeat((128 + 100 * np.tile(wave, (side, 1)))[..., None], 3, 2).round().astype(np.uint8))
    middle = slice(side // 4, -side // 4)
    left = values(Corruption("blur", 2)(image, ""))[:, middle].std() / values(image)[:, middle].std()
    assert left == pytest.approx(np.exp(-2 * (np.pi * 8 * CORRUPTIONS["blur"][1] / REFERENCE) ** 2), abs=0.02)


def test_the_long_side_counts() -> None:
    wide = Image.new("RGB", (448, 100))
    wide.paste((255, 255, 255), (224, 0, 448, 100))
    edge = values(Corruption("blur", 1)(wide, ""))[50, 200:248, 0]
    spread = np.diff(edge) / 255
    assert np.sqrt((spread * (np.arange(len(spread)) - (spread * np.arange(len(spread))).sum()) ** 2).sum()) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("strength, deviation", [(1, 0.08), (2, 0.18)])
def test_noise_has_its_deviation_and_no_direction(strength: int, deviation: float) -> None:
    grey = Image.new("RGB", (300, 300), (128, 128, 128))
    noise = values(Corruption("noise", strength)(grey, "a"))/255 - 128/255
    assert noise.std() == pytest.approx(deviation, rel=0.02) and abs(noise.mean()) < 0.002
    assert np.abs(np.corrcoef(noise.reshape(-1, 3).T) - np.eye(3)).max() < 0.02


@pytest.mark.parametrize("strength", [1, 2, 3])
def test_contrast_is_torchvision_s_for_a_grey_picture(strength: int, scene) -> None:
    grey = scene.convert("L").convert("RGB")
    ours = values(Corruption("contrast", strength)(grey, ""))
    assert np.abs(ours - values(peer.adjust_contrast(grey, CORRUPTIONS["contrast"][strength - 1]))).max() <= 1


def test_contrast_keeps_the_mean_colour(scene) -> None:
    for strength in (1, 2, 3):
        assert np.abs(values(Corruption("contrast", strength)(scene, "")).mean((0, 1)) - values(scene).mean((0, 1))).max() < 0.5


def test_jpeg_is_a_file_of_that_quality(scene) -> None:
    for strength, quality in enumerate(CORRUPTIONS["jpeg"], 1):
        file = io.BytesIO()
        scene.save(file, format="JPEG", quality=quality)
        assert Corruption("jpeg", strength)(scene, "").tobytes() == Image.open(file).convert("RGB").tobytes()


def test_blur_takes_high_frequencies_and_noise_adds_them(scene) -> None:
    def high(image: Image.Image) -> float:
        return float(high_frequency_share(torch.from_numpy(values(image)).permute(2, 0, 1)).mean())
    assert high(Corruption("blur", 2)(scene, "")) < high(scene) / 4
    assert high(Corruption("noise", 2)(scene, "")) > high(scene) * 4


# ---- for all of them ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_higher_strength_is_further_from_the_picture(kind: str, scene) -> None:
    distances = [np.abs(values(Corruption(kind, strength)(scene, "a")) - values(scene)).mean() for strength in range(4)]
    assert distances[0] == 0 and distances == sorted(distances) and len(set(distances)) == 4


@pytest.mark.parametrize("corruption", ALL, ids=str)
@given(width=st.integers(1, 40), height=st.integers(1, 40), mode=st.sampled_from(["RGB", "L", "P", "RGBA"]))
def test_size_stays_and_the_result_is_rgb(corruption: Corruption, width: int, height: int, mode: str) -> None:
    found = corruption(Image.new(mode, (width, height)), "a")
    assert found.size == (width, height) and found.mode == "RGB"


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_strength_0_is_the_picture_itself(kind: str, scene) -> None:
    assert Corruption(kind, 0)(scene, "a") is scene


def test_the_picture_that_was_given_is_not_changed(scene) -> None:
    before = scene.tobytes()
    for corruption in ALL:
        corruption(scene, "a")
    assert scene.tobytes() == before


# ---- the same everywhere --------------------------------------------------------------------------------------------

def test_noise_is_these_very_numbers() -> None:
    found = np.asarray(Corruption("noise", 1)(Image.new("RGB", (4, 2), (128, 128, 128)), "2007_000033"))
    assert found.tolist() == [[[123, 122, 90], [101, 163, 161], [131, 124, 124], [114, 116, 130]],
                              [[146, 148, 131], [127, 136, 123], [93, 123, 166], [89, 107, 125]]]


def test_noise_depends_on_name_and_strength_and_not_on_what_was_drawn_before(scene) -> None:
    first = Corruption("noise", 1)(scene, "a").tobytes()
    np.random.seed(5)
    assert Corruption("noise", 1)(scene, "a").tobytes() == first != Corruption("noise", 1)(scene, "b").tobytes()
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    one, two = ((values(Corruption("noise", strength)(grey, "a")) - 128).ravel() for strength in (1, 2))
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.05


@pytest.mark.parametrize("corruption", ALL, ids=str)
def test_a_corruption_travels_to_other_processes(corruption: Corruption) -> None:
    assert pickle.loads(pickle.dumps(corruption)) == corruption and hash(pickle.loads(pickle.dumps(corruption))) == hash(corruption)


# ---- errors ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("given_, message", [
    (("blurr", 1), "Did you mean 'blur'"), (("noise", 4), "use 1, 2 or 3"), (("noise", -1), "use 1, 2 or 3"), (("noise", True), "use 1, 2 or 3"),
    (("noise", 1.0), "use 1, 2 or 3"), (("noise", "1"), "use 1, 2 or 3")])
def test_what_there_is_not_is_said(given_, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Corruption(*given_)


def test_kinds_are_read_from_text() -> None:
    assert parse_corruptions("blur,noise,jpeg,contrast") == parse_corruptions("all") == tuple(CORRUPTIONS)
    assert parse_corruptions(" jpeg , blur,") == ("jpeg", "blur")


@pytest.mark.parametrize("text, message", [("", "no corruption named"), (",", "no corruption named"), ("blur,jpg", "Did you mean 'jpeg'"), ("blur,blur", "named twice")])
def test_text_that_names_no_corruption_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_corruptions(text)
