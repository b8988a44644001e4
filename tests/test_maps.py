"""All CAMs from one forward pass: each equals its own room's, absent classes are zero, subsets and batches change nothing."""

import pytest
import torch
from hypothesis import given, settings as limits
from hypothesis import strategies as st

from freqseg.affinity import box_mask, inverse_affinity, propagate, smoothed_affinity
from freqseg.cam import grad_cam, normalise_cam, patch_text_similarity
from freqseg.clip import Backbone, build_clip, load_clip
from freqseg.files import InputError
from freqseg.maps import METHODS, CamSettings, affinity_source, cam_of, cam_parts, cam_request, frequency_cams
from freqseg.spectra import split_bands
from freqseg.world.scenes import WORLD_BACKGROUNDS, WORLD_CLASSES, World

GRID = 10


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_clip("world")


@pytest.fixture(scope="module")
def batch(backbone: Backbone) -> tuple:
    "Three scenes, all twenty classes, the scenes' own marked present, named backgrounds."
    scenes = [World(0, "test", size=96)[i] for i in (3, 4, 5)]   # GradCAM finds evidence for all their classes
    images = backbone.preprocess([scene.image for scene in scenes], GRID * backbone.patch_size)
    present = torch.tensor([[name in scene.classes for name in WORLD_CLASSES] for scene in scenes])
    return images, backbone.encode_text(WORLD_CLASSES), present, backbone.encode_text(WORLD_BACKGROUNDS)


@pytest.fixture(scope="module")
def cams(backbone: Backbone, batch: tuple) -> dict:
    return frequency_cams(backbone, *batch)


@pytest.mark.parametrize("method", METHODS)
def test_maps_are_finite_in_the_unit_interval_and_zero_for_absent_classes(method: str, cams: dict, batch: tuple) -> None:
    cam, present = cams[method], batch[2]
    assert cam.shape == (3, 20, GRID, GRID) and cam.isfinite().all() and cam.min() >= 0 and cam.max() <= 1
    assert not cam[~present].any()
    assert (cam[present].amax((-2, -1)) > 0.99).all()


def test_the_tower_runs_once_and_nothing_runs_twice(backbone: Backbone, batch: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    import freqseg.maps as room
    calls: dict[str, int] = {}

    def counted(name: str, function):
        def wrapper(*args, **options):
            calls[name] = calls.get(name, 0) + 1
            return function(*args, **options)
        return wrapper

    monkeypatch.setattr(Backbone, "encode", counted("encode", Backbone.encode))
    for name in ("grad_cam_evidence", "mean_relation", "patch_embeddings", "split_bands", "symmetrise"):
        monkeypatch.setattr(room, name, counted(name, getattr(room, name)))
    frequency_cams(backbone, *batch)
    assert calls == {"encode": 1, "grad_cam_evidence": 1, "mean_relation": 1, "patch_embeddings": 2, "split_bands": 1, "symmetrise": 2}


def test_each_map_equals_the_one_of_the_room_that_defines_it(backbone: Backbone, batch: tuple, cams: dict) -> None:
    images, text, present, background = batch
    source = affinity_source(backbone)
    features = backbone.encode(images, **cam_request(backbone, list(METHODS)))
    raw, smooth = grad_cam(backbone, features, text, present, background), smoothed_affinity(features, source)
    both, box = (smooth + inverse_affinity(features, source)) / 2, box_mask(raw, 0.4)
    expected = {"gradcam": raw, "patch_text": patch_text_similarity(backbone, features, text, present),
                "intra_correlation": patch_text_similarity(backbone, features, text, present, source="intra"),
                "smoothed": normalise_cam(propagate(smooth, raw, 2, box)), "inverse": normalise_cam(propagate(both, raw, 2, box))}
    for method, cam in expected.items():
        torch.testing.assert_close(cams[method], cam, atol=1e-4, rtol=1e-3, msg=lambda m, method=method: f"{method}: {m}")


def test_transport_scores_patches_by_the_patch_text_map(backbone: Backbone, batch: tuple, cams: dict) -> None:
    parts, present = cam_parts(backbone, *batch, methods=("transport",)), batch[2]
    score = parts.similarity.mT.unflatten(2, (GRID, GRID))
    torch.testing.assert_close(score[:, :-1], cams["patch_text"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(score[:, -1], 1 - cams["patch_text"].amax(1), atol=1e-5, rtol=1e-4)
    chosen = cam_parts(backbone, *batch, methods=("transport",), settings=CamSettings(similarity="gradcam"))
    torch.testing.assert_close(chosen.similarity[..., :-1], cams["gradcam"].flatten(2).mT, atol=1e-5, rtol=1e-4)
    assert "value_cosines" not in vars(chosen) and not chosen.similarity[..., :-1].mT[~present].any()


@pytest.mark.parametrize("settings", [CamSettings(contrast="prompts"), CamSettings(similarity="gradcam"), CamSettings(similarity="intra")], ids=lambda s: f"{s.similarity}-{s.contrast}")
def test_transport_over_every_score_is_a_map(settings: CamSettings, backbone: Backbone, batch: tuple, cams: dict) -> None:
    cam, present = frequency_cams(backbone, *batch, methods=("transport",), settings=settings)["transport"], batch[2]
    assert cam.isfinite().all() and cam.min() >= 0 and (cam[present].amax((-2, -1)) > 0.99).all() and not cam[~present].any()
    assert (cam - cams["transport"]).abs().max() > 0.01


def test_bands_sum_to_the_evidence(backbone: Backbone, batch: tuple) -> None:
    parts = cam_parts(backbone, *batch, methods=("low",), settings=CamSettings(mu=0.2, shape="disc"))
    low, high = parts.bands
    torch.testing.assert_close(low + high, parts.evidence, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(low, split_bands(parts.evidence, 0.2, "disc")[0])


def test_a_full_pass_leaves_nothing_high_and_the_whole_map_low(backbone: Backbone, batch: tuple, cams: dict) -> None:
    found = frequency_cams(backbone, *batch, methods=("low", "high"), settings=CamSettings(mu=0.5))
    assert not found["high"].any()
    torch.testing.assert_close(found["low"], cams["gradcam"])


@limits(max_examples=6)
@given(st.sets(st.sampled_from(list(METHODS)), min_size=1))
def test_a_subset_of_methods_gives_the_same_maps(chosen: set) -> None:
    backbone = load_clip("world")
    scene = World(0, "test", size=96)[0]
    images = backbone.preprocess(scene.image, 64)
    text, present = backbone.encode_text(scene.classes), torch.ones(1, len(scene.classes), dtype=torch.bool)
    everything = frequency_cams(backbone, images, text, present)
    some = frequency_cams(backbone, images, text, present, methods=sorted(chosen))
    assert list(some) == sorted(chosen)
    for name in chosen: torch.testing.assert_close(some[name], everything[name], atol=1e-5, rtol=1e-4)


def test_maps_do_not_depend_on_the_batch(backbone: Backbone, batch: tuple, cams: dict) -> None:
    images, text, present, background = batch
    for row in range(len(images)):
        alone = frequency_cams(backbone, images[row:row + 1], text, present[row:row + 1], background)
        # Sinkhorn stops for the whole batch at once: within its tolerance, not to the last bit
        for name in METHODS: torch.testing.assert_close(alone[name][0], cams[name][row], atol=5e-3, rtol=1e-2)


def test_maps_follow_a_permutation_of_the_classes(backbone: Backbone, batch: tuple, cams: dict) -> None:
    images, text, present, background = batch
    order = torch.randperm(len(text))
    turned = frequency_cams(backbone, images, text[order], present[:, order], background)
    for name in METHODS: torch.testing.assert_close(turned[name], cams[name][:, order], atol=1e-3, rtol=1e-3)


def test_absent_classes_do_not_disturb_the_others(backbone: Backbone, batch: tuple, cams: dict) -> None:
    images, text, present, background = batch
    own = present.any(0)
    small = frequency_cams(backbone, images, text[own], present[:, own], background)
    for name in METHODS: torch.testing.assert_close(small[name], cams[name][:, own], atol=1e-3, rtol=1e-3)


def test_a_picture_without_any_class_gives_zeros(backbone: Backbone, batch: tuple) -> None:
    images, text, present, background = batch
    for prompts in (background, None):
        cams = frequency_cams(backbone, images, text, torch.zeros_like(present), prompts)
        assert all(not cam.any() for cam in cams.values())


def test_without_background_prompts_a_single_class_still_gets_a_map(backbone: Backbone, batch: tuple) -> None:
    images, text, present, _ = batch
    one = torch.zeros_like(present)
    one[torch.arange(3), present.to(torch.uint8).argmax(1)] = True
    cam = frequency_cams(backbone, images, text, one, methods=("transport",))["transport"][one]
    assert (cam.amax((-2, -1)) == 1).all() and (cam.std((-2, -1)) > 0.01).all()


def test_no_gradient_and_no_weight_is_touched(backbone: Backbone, batch: tuple) -> None:
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    cams = frequency_cams(backbone, *batch)
    assert not any(cam.requires_grad for cam in cams.values())
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_a_random_tower_of_another_shape_works() -> None:
    vision = dict(layers=3, width=32, head_width=16, patch_size=16, image_size=64)
    config = dict(embed_dim=24, vision_cfg=vision, text_cfg=dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=1), quick_gelu=True)
    backbone = Backbone(build_clip(config), "tiny", lambda texts: torch.zeros(len(texts), 77, dtype=torch.long))
    text = torch.nn.functional.normalize(torch.randn(4, 24), dim=1)
    present = torch.tensor([[True, False, True, False], [False, False, False, True]])
    cams = frequency_cams(backbone, torch.randn(2, 3, 48, 80), text, present)
    assert affinity_source(backbone) == "attention"
    assert all(cam.shape == (2, 4, 3, 5) and cam.isfinite().all() and not cam[~present].any() for cam in cams.values())


def test_settings_choose_the_source(backbone: Backbone) -> None:
    assert affinity_source(backbone) == backbone.metadata.get("default_attention_source", "attention")
    request = cam_request(backbone, ["smoothed"], CamSettings(source="attention", layers=2))
    assert request["attention"] == (backbone.depth - 2, backbone.depth - 1) and not request["qkv"]
    assert cam_request(backbone, ["smoothed"], CamSettings(source="kk", layers=(-1,)))["qkv"] == (backbone.depth - 1,)


@pytest.mark.parametrize("wrong, named", [
    (dict(mu=0.6), "mu=0.6"), (dict(mu=-1), "mu=-1"), (dict(shape="round"), "shape='round'"), (dict(source="heads"), "source='heads'"),
    (dict(layers=0), "layers=0"), (dict(layers=()), "layers="), (dict(power=0), "power=0"), (dict(power=1.5), "power=1.5"),
    (dict(box=0.0), "box=0.0"), (dict(similarity="tokens"), "similarity="), (dict(contrast="sky"), "contrast="), (dict(epsilon=0), "epsilon=0"), (dict(lambda_h=-1), "lambda_h=-1")])
def test_wrong_settings_are_named(wrong: dict, named: str) -> None:
    with pytest.raises(InputError, match=named.replace("(", r"\(")): CamSettings(**wrong)


def test_wrong_input_is_named(backbone: Backbone, batch: tuple) -> None:
    images, text, present, background = batch
    with pytest.raises(InputError, match="sharpened"): frequency_cams(backbone, *batch, methods=("sharpened",))
    with pytest.raises(InputError, match="methods="): frequency_cams(backbone, *batch, methods=())
    with pytest.raises(InputError, match="present is"): frequency_cams(backbone, images, text, present[:, :3], background)
    with pytest.raises(InputError, match="background prompts"): frequency_cams(backbone, images, text, present, background[:, :3])
    with pytest.raises(InputError, match="whole number"): frequency_cams(backbone, images[..., :-1], text, present)
    with pytest.raises(InputError, match="no method"): cam_of(cam_parts(backbone, *batch, methods=("gradcam",)), "grad")
