"""Segmenting with one activation map: shares of cosines against their formula, windows, backgrounds, thresholds and mistakes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from freqseg.clip import Backbone, load_clip
from freqseg.files import InputError
from freqseg.maps import METHODS, cam_parts, frequency_cams, raw_map
from freqseg.prompts import embed_wording, usual_wording
from freqseg.work.inference import Inference
from freqseg.work.training_free import segment_with_map
from freqseg.world.scenes import WORLD_CLASSES, World

SCENE = World(0, "test", size=96)[3]
WHOLE = Inference(flip=False, side=128)
COSINES = [name for name, method in METHODS.items() if method.kind == "cosine"]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_clip("world")


@pytest.mark.parametrize("method", COSINES)
def test_scores_are_shares_of_the_enlarged_cosines(method: str, backbone: Backbone) -> None:
    found = segment_with_map(backbone, SCENE.image, WORLD_CLASSES, method, inference=WHOLE)
    prompts = embed_wording(backbone, usual_wording(backbone, WORLD_CLASSES))
    parts = cam_parts(backbone, backbone.preprocess(SCENE.image, 128), torch.cat(prompts), methods=[method])
    cosines = F.interpolate(raw_map(parts, method), SCENE.mask.shape, mode="bilinear", align_corners=False)[0]
    shares = (backbone.logit_scale * cosines).softmax(0)
    torch.testing.assert_close(found.scores, shares[:20], atol=2e-3, rtol=1e-2)
    winner = shares.argmax(0).numpy()
    expected = np.where(winner < 20, winner + 1, 0)
    assert found.labels.shape == SCENE.mask.shape and found.labels.dtype == np.uint8 and (found.labels == expected).mean() > 0.995


def test_a_threshold_leaves_only_what_is_sure(backbone: Backbone) -> None:
    loose = segment_with_map(backbone, SCENE.image, SCENE.classes, inference=WHOLE)
    level = float(loose.scores.amax(0).median())
    strict = segment_with_map(backbone, SCENE.image, SCENE.classes, threshold=level, inference=WHOLE)
    sure = loose.scores.amax(0).numpy() >= np.float32(level)
    assert torch.equal(loose.scores, strict.scores) and (strict.labels[sure] == loose.labels[sure]).all() and not strict.labels[~sure].any()
    assert 0 < sure.mean() < 1


def test_without_a_background_every_pixel_has_a_class(backbone: Backbone) -> None:
    found = segment_with_map(backbone, SCENE.image, WORLD_CLASSES, background=(), inference=WHOLE)
    torch.testing.assert_close(found.scores.sum(0), torch.ones(SCENE.mask.shape))
    assert found.labels.min() >= 1
    named = segment_with_map(backbone, SCENE.image, WORLD_CLASSES, background=("grass", "sky"), inference=WHOLE)
    assert (named.scores <= found.scores + 1e-6).all()


@pytest.mark.parametrize("method, compare", [("gradcam", None), ("naclip", "maps"), ("transport", "maps")])
def test_maps_are_cut_at_a_threshold(method: str, compare: str | None, backbone: Backbone) -> None:
    found = segment_with_map(backbone, SCENE.image, SCENE.classes, method, compare=compare, inference=WHOLE)
    cams = frequency_cams(backbone, backbone.preprocess(SCENE.image, 128), SCENE.classes, methods=method)[method]
    large = F.interpolate(cams, SCENE.mask.shape, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(found.scores, large, atol=1e-3, rtol=1e-3)
    assert ((found.scores.amax(0) >= 0.4).numpy() == (found.labels > 0)).all()


def test_windows_cover_the_picture_and_one_that_holds_it_all_is_no_window(backbone: Backbone) -> None:
    whole = segment_with_map(backbone, SCENE.image, WORLD_CLASSES, inference=WHOLE)
    one = segment_with_map(backbone, SCENE.image, WORLD_CLASSES, inference=Inference(flip=False, side=128, window=128))
    torch.testing.assert_close(one.scores, whole.scores)
    several = segment_with_map(backbone, SCENE.image, WORLD_CLASSES, inference=Inference(flip=False, side=128, window=64, stride=48))
    assert several.scores.isfinite().all() and several.labels.shape == SCENE.mask.shape and (several.scores - whole.scores).abs().max() > 1e-3


def test_it_finds_the_objects_of_the_world(backbone: Backbone) -> None:
    right = []
    for number in (3, 4, 5, 48):
        scene = World(0, "test")[number]
        found = segment_with_map(backbone, scene.image, scene.classes, "patch_text")
        for place, name in enumerate(scene.classes, start=1):
            own, claimed = scene.mask == 1 + WORLD_CLASSES.index(name), found.labels == place
            right.append((own & claimed).sum() / max(1, (own | claimed).sum()))
    assert np.mean(right) > 0.35


@pytest.mark.parametrize("options, message", [
    (dict(method="nacklip"), "Did you mean 'naclip'"), (dict(classes=[]), "0 class names"), (dict(threshold=1.5), "threshold=1.5"),
    (dict(classes=["star"], background=()), "'star' is the only name"), (dict(classes=["zebra"]), "zebra"),
    (dict(method="gradcam", compare="cosines"), "made of no cosines"), (dict(compare="logits"), "compare='logits'"),
    (dict(image=np.zeros((8, 8, 3))), "float64"), (dict(image=np.zeros(8, np.uint8)), r"\(8,\)")])
def test_mistakes_are_named(options: dict, message: str, backbone: Backbone) -> None:
    with pytest.raises(InputError, match=message): segment_with_map(backbone, **{"image": SCENE.image, "classes": ["star", "wheel"], **options})
