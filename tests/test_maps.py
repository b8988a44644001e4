"""All CAMs from one forward pass: each equals its own room's, absent classes are zero, subsets and batches change nothing."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings as limits
from hypothesis import strategies as st

from freqseg.affinity import SOURCES, box_mask, inverse_affinity, propagate, smoothed_affinity
from freqseg.cam import grad_cam, normalise_cam, patch_text_similarity
from freqseg.clip import Backbone, build_clip, load_clip
from freqseg.files import InputError
from freqseg.maps import (METHODS, PARTS, CamParts, CamSettings, affinity_source, cam_of, cam_parts, cam_request, frequency_cams, needed_parts,
                          register_map, surgery_blocks)
from freqseg.plugins import load_plugin
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
    for name in ("grad_cam_evidence", "mean_relation", "prompt_cosines", "split_bands", "symmetrise", "inverse_of"):
        monkeypatch.setattr(room, name, counted(name, getattr(room, name)))
    frequency_cams(backbone, *batch)
    assert calls == {"encode": 1, "grad_cam_evidence": 1, "mean_relation": 1, "prompt_cosines": 2, "split_bands": 1, "symmetrise": 1, "inverse_of": 1}


def test_each_map_equals_the_one_of_the_room_that_defines_it(backbone: Backbone, batch: tuple, cams: dict) -> None:
    images, text, present, background = batch
    source = affinity_source(backbone)
    features = backbone.encode(images, **cam_request(backbone, list(METHODS)))
    raw, smooth = grad_cam(backbone, features, text, present, background), smoothed_affinity(features, source)
    both, box = (smooth + inverse_affinity(features, source)) / 2, box_mask(raw, 0.4)
    expected = {"gradcam": raw, "patch_text": patch_text_similarity(backbone, features, text, present),
                "intra_correlation": patch_text_similarity(backbone, features, text, present, source="intra"),
                "smoothed": normalise_cam(propagate(smooth, raw, 2, box)), "dual": normalise_cam(propagate(both, raw, 2, box))}
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
    (dict(layers=0), "layers=0"), (dict(layers=()), "layers="), (dict(walk_steps=0), "walk_steps=0"), (dict(walk_steps=1.5), "walk_steps=1.5"),
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
    with pytest.raises(InputError, match="unknown map 'grad'"): cam_of(cam_parts(backbone, *batch, methods=("gradcam",)), "grad")


# ---- names, parts and settings --------------------------------------------------------------------------------------

def test_the_older_name_of_a_map_works_and_gives_one_notice(backbone: Backbone, batch: tuple, cams: dict) -> None:
    with pytest.warns(FutureWarning, match="'inverse' is called 'dual' now") as notices:
        found = frequency_cams(backbone, *batch, methods=("inverse", "gradcam"))
    assert len(notices) == 1 and list(found) == ["inverse", "gradcam"]
    torch.testing.assert_close(found["inverse"], cams["dual"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frequency_cams(backbone, *batch, methods=("dual",))


def test_options_are_read_under_their_older_names() -> None:
    assert CamSettings.read({"power": 3, "eps": 0.2}) == CamSettings(walk_steps=3, epsilon=0.2)
    with pytest.raises(InputError, match="Did you mean 'walk_steps'"): CamSettings.read({"walk_step": 3})


def test_needed_parts_come_after_what_they_are_made_of() -> None:
    assert needed_parts(["dual"]) == ("evidence", "raw", "relation", "smooth", "invert")
    assert needed_parts(["transport"], CamSettings(similarity="gradcam")) == ("evidence", "raw", "relation", "smooth", "invert", "similarity")
    assert needed_parts(["naclip"]) == () and set(needed_parts()) == set(PARTS)


# ---- maps and sources of one's own ----------------------------------------------------------------------------------

@pytest.fixture()
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    "What a test registers is gone after it."
    for registry in (METHODS, SOURCES): monkeypatch.setattr(registry, "_entries", dict(registry._entries))


OWN_MAP = """
from freqseg.maps import register_map

@register_map("squared", "GradCAM evidence, squared", needs=("evidence",))
def squared(parts):
    return parts.evidence * parts.evidence.abs() * {factor}
"""


def test_a_map_of_a_file_is_a_map_like_any_other(registries: None, tmp_path: Path, backbone: Backbone, batch: tuple) -> None:
    (file := tmp_path / "mine.py").write_text(OWN_MAP.format(factor=1))
    load_plugin(file)
    assert list(METHODS)[-1] == "squared"
    cam = frequency_cams(backbone, *batch)["squared"]
    evidence = cam_parts(backbone, *batch, methods=("squared",)).evidence
    torch.testing.assert_close(cam, normalise_cam(evidence.relu().square()), atol=1e-5, rtol=1e-4)
    file.write_text(OWN_MAP.format(factor=-1))
    load_plugin(file)   # what changed is run again and takes its own place
    negative = frequency_cams(backbone, *batch, methods=("squared",))["squared"]
    torch.testing.assert_close(negative, normalise_cam((-evidence).relu().square()), atol=1e-5, rtol=1e-4)


def test_two_files_cannot_have_one_name(registries: None, tmp_path: Path) -> None:
    for name in ("mine.py", "yours.py"): (tmp_path / name).write_text(OWN_MAP.format(factor=1))
    load_plugin(tmp_path / "mine.py")
    with pytest.raises(InputError, match=r"there is a map 'squared' already, of .*mine.py: give the one of .*yours.py another name"):
        load_plugin(tmp_path / "yours.py")
    with pytest.raises(InputError, match="already, of .*maps.py"): register_map("gradcam", "another")(lambda parts: parts.raw)


def test_what_cannot_be_registered_is_refused(registries: None) -> None:
    for name in ("My map", "a,b", "all", "inverse", ""):
        with pytest.raises(InputError, match="cannot name a map"): register_map(name, "")(lambda parts: parts.raw)
    with pytest.raises(InputError, match="needs vidence: parts are evidence"): register_map("mine", "", needs=("vidence",))
    with pytest.raises(InputError, match="kind='logits'"): register_map("mine", "", kind="logits")


def test_a_map_of_another_shape_is_refused_by_name(registries: None, backbone: Backbone, batch: tuple) -> None:
    register_map("flat", "", needs=("raw",))(lambda parts: parts.raw.flatten(2))
    register_map("numpy", "", needs=("raw",))(lambda parts: parts.raw.numpy())
    with pytest.raises(InputError, match=r"the map 'flat' gave \(3, 20, 100\): it has to be a tensor \(3, 20, 10, 10\)"): frequency_cams(backbone, *batch, methods=("flat",))
    with pytest.raises(InputError, match="the map 'numpy' gave ndarray"): frequency_cams(backbone, *batch, methods=("numpy",))


OWN_SOURCE = """
import torch
from freqseg.affinity import register_source

@register_source("near", "patches that are close to each other", needs=("tokens",))
def near(features, block):
    places = torch.cartesian_prod(*(torch.arange(float(side)) for side in features.grid))
    weight = torch.exp(-torch.cdist(places, places))
    return (weight / weight.sum(-1, keepdim=True)).expand(len(features.tokens[block]), -1, -1)
"""


def test_a_source_of_a_file_is_a_source_like_any_other(registries: None, tmp_path: Path, backbone: Backbone, batch: tuple) -> None:
    from freqseg.dual_affinity import DualAffinity, DualAffinitySettings
    from freqseg.systems.weclip import WeCLIP
    (file := tmp_path / "near.py").write_text(OWN_SOURCE)
    module, settings = load_plugin(file), CamSettings(source="near", layers=2)
    assert cam_request(backbone, ["smoothed"], settings)["tokens"] == (backbone.depth - 2, backbone.depth - 1)
    parts = cam_parts(backbone, *batch, methods=("smoothed",), settings=settings)
    torch.testing.assert_close(parts.relation, module.near(parts.features, backbone.depth - 1))
    assert cam_of(parts, "smoothed").isfinite().all()
    assert DualAffinity.for_backbone(backbone, DualAffinitySettings(source="near", layers=2)).request(6)["tokens"] == (4, 5)
    with pytest.raises(InputError, match="no heads"): DualAffinity.for_backbone(backbone, DualAffinitySettings(source="near", per_head=True))
    system = WeCLIP.build(backbone, WORLD_CLASSES, source="near", dim=16).eval()
    assert system.cam(batch[0], batch[2]).isfinite().all()


def test_a_source_of_another_shape_is_refused_by_name(registries: None, backbone: Backbone, batch: tuple) -> None:
    from freqseg.affinity import register_source
    register_source("broken", "")(lambda features, block: features.tokens[block])
    with pytest.raises(InputError, match=r"the source 'broken' gave .* a relation is \(B, 100, 100\)"):
        frequency_cams(backbone, *batch, methods=("smoothed",), settings=CamSettings(source="broken"))
    with pytest.raises(InputError, match="needs="): register_source("odd", "", needs=("pixels",))


# ---- readings of CLIP, written out ----------------------------------------------------------------------------------

def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def layer_norm(x: np.ndarray, module: torch.nn.LayerNorm) -> np.ndarray:
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + module.eps)
    return x * module.weight.numpy() + module.bias.numpy()


def branch(block: torch.nn.Module, x: np.ndarray, mixing: object) -> np.ndarray:
    "The attention branch of a block for one image (n, D), head by head, with `mixing(q, k, v)` in place of its attention."
    heads, out = block.attn.num_heads, []
    fused = layer_norm(x, block.ln_1) @ block.attn.in_proj_weight.numpy().T + block.attn.in_proj_bias.numpy()
    for q, k, v in zip(*(np.split(part, heads, -1) for part in np.split(fused, 3, -1))): out.append(mixing(q, k, v) @ v)
    return np.concatenate(out, -1) @ block.attn.out_proj.weight.numpy().T + block.attn.out_proj.bias.numpy()


def gaussian(grid: tuple[int, int], sigma: float) -> np.ndarray:
    "NACLIP's omega, pair by pair; nothing for CLS."
    (h, w), n = grid, grid[0] * grid[1]
    omega = np.zeros((n + 1, n + 1))
    for i in range(n):
        for j in range(n):
            omega[i + 1, j + 1] = np.exp(-((i // w - j // w) ** 2 + (i % w - j % w) ** 2) / (2 * sigma ** 2))
    return omega


def written_out(name: str, backbone: Backbone, inputs: list, grid: tuple[int, int]) -> np.ndarray:
    "A reading as its paper's equations say, for one image: `inputs` are those of all blocks, (n, D) each; gives (n, D)."
    last, scale = backbone.blocks[-1], backbone.blocks[-1].attn.head_dim ** -0.5
    if name == "sclip":
        x = inputs[-1] + branch(last, inputs[-1], lambda q, k, v: softmax(scale * q @ q.T) + softmax(scale * k @ k.T))
        return x + last.mlp(torch.from_numpy(layer_norm(x, last.ln_2)).float()).numpy()
    if name == "clearclip": return branch(last, inputs[-1], lambda q, k, v: softmax(scale * q @ q.T))
    if name == "naclip": return branch(last, inputs[-1], lambda q, k, v: softmax(scale * k @ k.T + gaussian(grid, 5)))
    first = backbone.depth - surgery_blocks(backbone)
    x = inputs[first]
    for index in range(first, backbone.depth): x = x + branch(backbone.blocks[index], inputs[index], lambda q, k, v: softmax(scale * v @ v.T))
    return x


@pytest.fixture(scope="module", params=["tiny", "ViT-B-16"])
def random_tower(request: pytest.FixtureRequest) -> tuple:
    "A backbone with random weights, the inputs of its blocks for one image, and the parts of its maps."
    torch.manual_seed(0)
    if request.param == "tiny":
        vision = dict(layers=4, width=32, head_width=16, patch_size=8, image_size=32)
        config = dict(embed_dim=24, vision_cfg=vision, text_cfg=dict(context_length=8, vocab_size=9, width=16, heads=2, layers=1))
        backbone, images = Backbone(build_clip(config), "tiny", None), torch.randn(1, 3, 24, 40)
    else: backbone, images = load_clip("ViT-B-16", None), torch.randn(1, 3, 48, 80)
    for parameter in backbone.parameters():
        if parameter.ndim == 1: parameter.data += 0.1 * torch.randn_like(parameter)   # biases and gains that matter
    text = torch.nn.functional.normalize(torch.randn(3, backbone.embed_dim), dim=1)
    parts = cam_parts(backbone, images, text, methods=("sclip", "clearclip", "naclip", "clip_surgery"))
    inputs = [backbone.embed(images)]
    for index in range(backbone.depth - 1): inputs.append(backbone.block(index, inputs[-1]))
    return backbone, [x[0].double().numpy() for x in inputs], parts


@pytest.mark.parametrize("name", ["sclip", "clearclip", "naclip", "clip_surgery"])
def test_readings_equal_their_equations_written_out(name: str, random_tower: tuple) -> None:
    backbone, inputs, parts = random_tower
    x = layer_norm(written_out(name, backbone, inputs, parts.features.grid), backbone.model.visual.ln_post)[1:] @ backbone.model.visual.proj.numpy()
    expected = (x / np.linalg.norm(x, axis=-1, keepdims=True)) @ parts.text.numpy().T
    found = METHODS[name].make(parts)[0].flatten(1).T
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5, rtol=1e-3)


def test_readings_differ_and_a_wide_prior_of_naclip_is_none(random_tower: tuple) -> None:
    backbone, _, parts = random_tower
    maps = torch.stack([METHODS[name].make(parts) for name in ("sclip", "clearclip", "naclip", "clip_surgery")])
    assert (maps[:, None] - maps[None]).abs().amax((2, 3, 4, 5)).fill_diagonal_(1).min() > 1e-4
    narrow, wide = (METHODS["naclip"].make(parts, sigma=sigma) for sigma in (0.3, 1e4))
    assert (narrow - maps[2]).abs().max() > 1e-4 and (wide - maps[2]).abs().max() > 1e-5


# ---- forgiving arguments --------------------------------------------------------------------------------------------

def test_names_do_in_place_of_embeddings_and_one_picture_in_place_of_a_batch(backbone: Backbone) -> None:
    from freqseg.prompts import embed_wording, usual_wording
    scene = World(0, "test", size=96)[3]
    images, names = backbone.preprocess(scene.image, 64), list(scene.classes)
    prompts = embed_wording(backbone, usual_wording(backbone, names))
    expected = frequency_cams(backbone, images, prompts.text, torch.ones(1, len(names), dtype=torch.bool), prompts.background, ("gradcam", "dual"))
    for given in (None, names, list(range(len(names))), [True] * len(names)):
        found = frequency_cams(backbone, images[0], names, given, methods=("gradcam", "dual"))
        for name, cam in expected.items(): torch.testing.assert_close(found[name], cam)
    first = frequency_cams(backbone, images, names, names[0], methods="gradcam")["gradcam"]
    assert first[:, 0].any() and not first[:, 1:].any()
    without, embedded = (frequency_cams(backbone, images, names, background=background, methods="gradcam")["gradcam"] for background in ((), prompts.background))
    torch.testing.assert_close(embedded, expected["gradcam"])
    assert (without - embedded).abs().max() > 1e-3
    with pytest.raises(InputError, match="unknown class 'stra'"): frequency_cams(backbone, images, ["star"], "stra")
    with pytest.raises(InputError, match="class indices below"): frequency_cams(backbone, images, prompts.text, "star")
    with pytest.raises(InputError, match=r"images \(64, 64\): give \(B, 3, H, W\)"): frequency_cams(backbone, images[0, 0], names)


def test_parts_can_be_put_together_by_hand(backbone: Backbone, batch: tuple, cams: dict) -> None:
    images, text, present, background = batch
    features = backbone.encode(images, joint=False, last_input=True)
    torch.testing.assert_close(cam_of(CamParts(backbone, features, text, present, background), "gradcam"), cams["gradcam"])


# ---- the guide ------------------------------------------------------------------------------------------------------

def test_the_code_of_the_guide_runs_as_it_stands(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    page = (root / "nbs/guide/own_map.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    files = {named[1]: block for block in blocks if (named := re.match(r"# (\w+\.py)\n", block))}
    programs = [block for block in blocks if block not in files.values()]
    assert sorted(files) == ["my_map.py", "my_source.py"] and len(programs) == 2
    for name, block in files.items(): (tmp_path / name).write_text(block, encoding="utf-8")
    for program, expected in zip(programs, ("'squared': (1, 2, 28, 28)", "near_tokens")):
        done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True)
        assert done.returncode == 0 and expected in done.stdout, done.stderr
