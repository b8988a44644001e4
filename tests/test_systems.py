"""The weakly supervised systems: parameter counts, frozen backbones, named losses, maps, pseudo-labels, composition, checkpoints."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from freqseg.work.checkpoints import Checkpoint, checkpoint_path, load_system, save_system, write_checkpoint
from freqseg.clip import Backbone, load_clip
from freqseg.data import Batch
from freqseg.lists import COCO_CLASSES, VOC_CLASSES
from freqseg.files import InputError
from freqseg.systems.dfa import DFA
from freqseg.systems.ffr import FFR
from freqseg.cam import pack_present
from freqseg.systems.segmenter import Segmenter, assign_labels, known_systems, system_named
from freqseg.systems.weclip import WeCLIP, WeCLIPOptions
from freqseg.systems.wtclip import WTCLIP, edge_map
from freqseg.world.scenes import WORLD_CLASSES, World

WEAK = [name for name in known_systems() if system_named(name).supervision == "labels"]
LOSSES = {"weclip": {"seg", "affinity"}, "wtclip": {"seg", "affinity"}, "dfa": {"seg", "alignment", "rectification"},
          "ffr": {"cls", "cls_middle", "seg", "seg_high", "rectify"}}


@pytest.fixture(scope="module")
def world() -> Backbone:
    return load_clip("world")


@pytest.fixture(scope="module")
def clip() -> Backbone:
    return load_clip("ViT-B-16", pretrained=None)


@pytest.fixture(scope="module")
def batch() -> Batch:
    scenes = [World(0, "train")[index] for index in range(3)]
    images = torch.stack([torch.from_numpy(scene.image[64:160, 64:160]).permute(2, 0, 1) / 255 for scene in scenes])
    labels = torch.tensor([[name in scene.classes for name in WORLD_CLASSES] for scene in scenes])
    valid = torch.ones(3, 96, 96, dtype=torch.bool)
    valid[0, :, 80:] = False
    return Batch(("a", "b", "c"), images, None, labels, valid)


def build(name: str, backbone: Backbone, **options) -> Segmenter:
    torch.manual_seed(0)
    return system_named(name).build(backbone, WORLD_CLASSES, par_iterations=2, **options)


def trainable(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


# ---- counts ---------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_weclip_has_the_published_number_of_parameters(clip: Backbone) -> None:
    assert trainable(WeCLIP.build(clip, VOC_CLASSES)) == 5_985_045
    # 60 more classes are 60 more rows of the classifier: 256 weights and a bias each
    assert trainable(WeCLIP.build(clip, COCO_CLASSES)) == 5_985_045 + 60 * 257


def test_wtclip_has_the_published_number_less_the_fixed_taps(clip: Backbone) -> None:
    assert trainable(WTCLIP.build(clip, VOC_CLASSES)) == 6_074_646 - 8_192
    learned = WTCLIP.build(clip, VOC_CLASSES, learn_filters=True)
    assert trainable(learned) == 6_074_646 - 8_192 + 8   # two analysis and two synthesis filters of two taps


# ---- frozen ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", WEAK)
def test_a_step_trains_every_parameter_and_nothing_of_the_backbone(name: str, world: Backbone, batch: Batch) -> None:
    before = copy.deepcopy(world.state_dict())
    system = build(name, world)
    optimiser = torch.optim.AdamW([dict(params=group["params"], lr=1e-3 * group["lr_scale"]) for group in system.parameter_groups()])
    for progress in (0.0, 0.9):   # both phases of WeCLIP
        losses = system.train().training_step(batch, progress)
        assert set(losses) == LOSSES[name] and all(loss.ndim == 0 and loss.isfinite() for loss in losses.values())
        optimiser.zero_grad()
        sum(losses.values()).backward()
        lacking = [key for key, p in system.named_parameters() if p.requires_grad and p.grad is None]
        assert not lacking
        optimiser.step()
    assert all(p.grad is None and not p.requires_grad for p in world.parameters())
    assert all(torch.equal(before[key], value) for key, value in world.state_dict().items())
    assert not world.training and not any(key.startswith("backbone.") for key in system.trainable_state())


def test_an_unfrozen_tower_learns_in_its_own_copy(world: Backbone, batch: Batch) -> None:
    system = build("ffr", world, unfreeze=[-1])
    assert system.rectifies_tokens
    sum(system.train().training_step(batch, 0.0).values()).backward()
    learning = {key for key, p in system.backbone.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert learning and all("resblocks.5" in key for key in learning)
    assert any(key.startswith("backbone.") for key in system.trainable_state())
    tower, new = system.parameter_groups()
    assert (tower["lr_scale"], new["lr_scale"]) == (1.0, 10.0) and not any(p.requires_grad for p in world.parameters())


# ---- maps and labels ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", WEAK)
def test_maps_are_in_range_zero_for_absent_classes_and_without_gradient(name: str, world: Backbone, batch: Batch) -> None:
    system = build(name, world).eval()
    images = world.normalise(batch.images)
    cam = system.cam(images, batch.labels)
    assert cam.shape == (3, 20, 12, 12) and cam.min() >= 0 and cam.max() <= 1 and not cam.requires_grad
    assert cam[~batch.labels].abs().max() == 0
    again, labels = system.explain(images, batch.labels)
    assert torch.equal(again, cam)
    assert labels.shape == (3, 96, 96) and labels.dtype == torch.int64
    for row, there in zip(labels, batch.labels): assert set(row.unique().tolist()) <= {0, *(there.nonzero()[:, 0] + 1).tolist()}


@pytest.mark.parametrize("name", WEAK)
def test_pictures_of_a_batch_do_not_see_each_other(name: str, world: Backbone, batch: Batch) -> None:
    system = build(name, world).eval()
    images = world.normalise(batch.images)
    together, alone = system.cam(images, batch.labels), torch.cat([system.cam(images[i:i + 1], batch.labels[i:i + 1]) for i in range(3)])
    assert torch.allclose(together, alone, atol=2e-3)
    assert torch.allclose(system.predict(images), torch.cat([system.predict(images[i:i + 1]) for i in range(3)]), atol=1e-4)


def test_prediction_may_keep_a_part_of_the_tokens(world: Backbone, batch: Batch) -> None:
    system, seen = build("weclip", world).eval(), []
    images = world.normalise(batch.images)
    def keep(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return x
    assert torch.equal(system.predict(images, keep), system.predict(images)) and seen == [(3, 128, 12, 12)] * 5
    assert not torch.equal(system.predict(images, torch.zeros_like), system.predict(images))


def test_packing_keeps_present_maps_and_their_names() -> None:
    cam, present = torch.rand(3, 7, 2, 2), torch.tensor([[0, 1, 0, 1, 0, 0, 1], [0] * 7, [1, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    packed, classes = pack_present(cam, present)
    assert packed.shape == (3, 3, 2, 2) and classes[0].tolist() == [1, 3, 6] and classes[2, 0] == 0
    assert torch.equal(packed[0], cam[0, [1, 3, 6]]) and packed[1].abs().sum() == 0 and packed[2, 1:].abs().sum() == 0


def test_labels_equal_an_argmax_over_all_classes_and_ignore_what_is_outside() -> None:
    torch.manual_seed(1)
    present = torch.rand(4, 6) < .5
    cam = torch.rand(4, 6, 5, 5) * present[:, :, None, None]
    plain = torch.cat([1 - cam.amax(1, keepdim=True), cam], 1).argmax(1)
    assert torch.equal(assign_labels(cam, present, torch.rand(4, 3, 5, 5), None), plain)
    sure = torch.full((4, 1, 5, 5), 2.0)
    assert assign_labels(cam, present, torch.rand(4, 3, 5, 5), None, background_score=sure).max() == 0
    valid = torch.rand(4, 5, 5) < .5
    assert torch.equal(assign_labels(cam, present, torch.rand(4, 3, 5, 5), None, valid) == 255, ~valid)


def test_training_without_image_labels_says_what_is_missing(world: Backbone, batch: Batch) -> None:
    with pytest.raises(InputError, match=r"no image labels for a, b, c .*labels\.txt"):
        build("dfa", world).training_step(Batch(batch.ids, batch.images, None, None), 0.0)


# ---- options --------------------------------------------------------------------------------------------------------

def test_the_decoder_selects_maps_only_after_the_switch(world: Backbone, batch: Batch) -> None:
    system = build("weclip", world).eval()
    with torch.no_grad():
        forward = system.forward_pass(world.normalise(batch.images), batch.labels)
        early, late = system.affinity(forward, 0.49), system.affinity(forward, 0.5)
    assert not torch.allclose(early, late)
    never = build("weclip", world, switch=2.0).eval()
    with torch.no_grad(): assert torch.equal(never.affinity(never.forward_pass(world.normalise(batch.images), batch.labels), 1.0), early)


@pytest.mark.parametrize("options", [dict(maps="propagate", align=False, inverse=False), dict(maps="propagate", align=False, relate=False),
                                     dict(maps="propagate", inverse=False), dict(maps="propagate"), {}, dict(similarity="intra"),
                                     dict(similarity="gradcam"), dict(contrast="prompts"), dict(background_from="prompts"), dict(score="literal"), dict(per_head=True),
                                     dict(inversion="gaussian"), dict(combine="product", maps="propagate"), dict(vote_window=None)])
def test_dfa_runs_with_every_switch(options: dict, world: Backbone, batch: Batch) -> None:
    system = build("dfa", world, **options)
    losses = system.train().training_step(batch, 0.0)
    wanted = {"seg"}
    if options.get("align", True): wanted.add("alignment")
    if options.get("relate", True) and options.get("inverse", True): wanted.add("rectification")
    assert set(losses) == wanted and sum(losses.values()).isfinite()
    cam = system.eval().cam(world.normalise(batch.images), batch.labels)
    assert 0 <= cam.min() and cam.max() <= 1


def test_the_background_of_the_transport_competes_in_what_is_taught_and_in_what_is_shown(world: Backbone, batch: Batch) -> None:
    images = world.normalise(batch.images)
    plain, own = (build("dfa", world, background_from=background).eval() for background in ("max", "prompts"))
    (cam, labels), (same, others) = (system.explain(images, batch.labels) for system in (plain, own))
    assert torch.equal(cam, same) and not torch.equal(labels, others)
    maps = own.activation_maps(own.forward_pass(images, batch.labels), 1.)
    scores = torch.cat([maps[:, -1:], maps[:, :-1]], 1)
    assert torch.equal(others, own.par(batch.images, F.interpolate(scores, images.shape[-2:], mode="bilinear")).argmax(1))


def test_new_parts_of_ffr_learn_at_their_own_rate_frozen_or_not(world: Backbone) -> None:
    [alone] = build("ffr", world).parameter_groups()
    tower, new = build("ffr", world, unfreeze=[-1]).parameter_groups()
    assert (alone["lr_scale"], tower["lr_scale"], new["lr_scale"]) == (10., 1., 10.)
    assert [p.shape for p in alone["params"]] == [p.shape for p in new["params"]]


def test_the_weights_of_the_losses_are_the_papers(world: Backbone) -> None:
    dfa, ffr, weclip = (build(name, world).options for name in ("dfa", "ffr", "weclip"))
    assert (dfa.lambda_align, dfa.lambda_relation, dfa.lambda_l, dfa.lambda_h) == (.1, .2, 1, .1)
    assert (ffr.mu, ffr.lambda_head, ffr.lambda_1, ffr.lambda_seg) == (.4, 2, 1, .1) and weclip.affinity_weight == .1


def test_weights_scale_their_losses(world: Backbone, batch: Batch) -> None:
    one, two = (build("ffr", world, lambda_1=w).eval().training_step(batch, 0.0)["rectify"] for w in (1.0, 3.0))
    assert torch.allclose(3 * one, two)


def test_smoothed_maps_of_ffr_are_weclips_before_its_decoder_selects(world: Backbone, batch: Batch) -> None:
    images = world.normalise(batch.images)
    for box in (.4, None):
        ffr, weclip = build("ffr", world, maps="smoothed", box=box).eval(), build("weclip", world, switch=2., box=box).eval()
        assert torch.equal(ffr.cam(images, batch.labels), weclip.cam(images, batch.labels))


@pytest.mark.parametrize("options", [dict(maps="classifier"), dict(maps="smoothed"), dict(start="random"), dict(order="scores"), dict(background_power=2.), dict(lambda_energy=.05), dict(shape="disc", mu=.2)])
def test_ffr_runs_with_every_switch(options: dict, world: Backbone, batch: Batch) -> None:
    losses = build("ffr", world, **options).train().training_step(batch, 0.0)
    assert sum(losses.values()).isfinite() and ("energy" in losses) == ("lambda_energy" in options)


def test_edges_are_found_where_they_are_and_weigh_the_maps(world: Backbone, batch: Batch) -> None:
    image = torch.zeros(1, 3, 64, 64)
    image[..., 35:] = 1   # off the transform's own grid, so that every level sees it
    edges = edge_map(image, (8, 8))
    assert edges[0, 0, :, 4].min() > .9 and edges[0, 0, :, :3].max() < 1e-6
    images = world.normalise(batch.images)
    without, with_edges = (build("wtclip", world, edge=edge).eval().cam(images, batch.labels) for edge in ("none", "image"))
    assert not torch.equal(without, with_edges)


@pytest.mark.parametrize("name, options", [("dfa", dict(decoder="wavelet", levels=2)), ("dfa", dict(rectify=.3)), ("weclip", dict(rectify=.3)),
                                           ("dfa", dict(decoder="wavelet", learn_filters=True, reconstruction=.1, rectify=.4)),
                                           ("wtclip", dict(learn_filters=True, wavelet="bior2.2", reconstruction=1.0)),
                                           ("ffr", dict(decoder="wavelet", learn_filters=True, reconstruction=1.0))])
def test_parts_of_one_system_go_into_another(name: str, options: dict, world: Backbone, batch: Batch) -> None:
    losses = build(name, world, **options).train().training_step(batch, 0.0)
    added = {loss for option, loss in (("rectify", "rectify"), ("reconstruction", "reconstruct")) if option in options}
    assert set(losses) == LOSSES[name] | added and sum(losses.values()).isfinite()


def test_wrong_options_name_the_nearest_or_the_choices(world: Backbone) -> None:
    with pytest.raises(InputError, match="'lambda_hh'.*Did you mean 'lambda_h'"): build("dfa", world, lambda_hh=1)
    with pytest.raises(InputError, match="decoder='cnn': give one of transformer, wavelet"): build("weclip", world, decoder="cnn")
    with pytest.raises(InputError, match="edge='canny'"): build("wtclip", world, edge="canny")
    with pytest.raises(InputError, match="maps='cam'"): build("dfa", world, maps="cam")
    with pytest.raises(InputError, match="needs maps='transport'"): build("dfa", world, background_from="prompts", maps="propagate")
    with pytest.raises(InputError, match="needs decoder='wavelet' and learn_filters"): build("wtclip", world, reconstruction=1.0)
    with pytest.raises(InputError, match="FFR always rectifies"): build("ffr", world, rectify=.4)
    with pytest.raises(InputError, match="needs tokens that learn"): build("ffr", world, rectified="tokens")
    assert WeCLIPOptions.read(dict(background=["sky"])).background == ("sky",)


# ---- checkpoints ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", WEAK)
def test_a_saved_system_predicts_the_same_again(name: str, world: Backbone, batch: Batch, tmp_path: Path) -> None:
    system = build(name, world, **({"unfreeze": [-1]} if name == "ffr" else {})).eval()
    path = save_system(system, tmp_path / "system.safetensors", step=3)
    again = load_system(path)
    images = world.normalise(batch.images)
    assert type(again) is type(system) and again.options == system.options and torch.equal(again.predict(images), system.predict(images))
    assert json.loads(json.dumps(system.config)) == again.config | {"options": json.loads(json.dumps(again.config["options"]))}
    assert path.stat().st_size < 40e6   # the frozen backbone is not in it


def test_a_run_folder_stands_for_its_best_checkpoint(world: Backbone, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no checkpoint"): checkpoint_path(tmp_path)
    save_system(build("weclip", world), tmp_path / "last.safetensors")
    assert checkpoint_path(tmp_path).name == "last.safetensors"
    save_system(build("weclip", world), tmp_path / "best.safetensors")
    assert checkpoint_path(tmp_path).name == "best.safetensors"


def test_a_checkpoint_that_does_not_fit_is_refused(world: Backbone, tmp_path: Path) -> None:
    system = build("weclip", world)
    path = save_system(system, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="trained on 20 classes, the data have 2.*cat, dog"): load_system(path, world, classes=("cat", "dog"))
    with pytest.raises(InputError, match="the same ones in another order"): load_system(path, world, classes=WORLD_CLASSES[::-1])
    with pytest.raises(InputError, match="'wecilp'.*weclip"): system_named("wecilp")
    state = system.trainable_state()
    write_checkpoint(tmp_path / "b.safetensors", Checkpoint(dict(list(state.items())[1:]), dict(step=0), system.config, system.classes))
    with pytest.raises(InputError, match="b.safetensors: the weights do not fit weclip"): load_system(tmp_path / "b.safetensors", world)
    write_checkpoint(tmp_path / "c.safetensors", Checkpoint(state, dict(step=0), dict(kind="toy"), system.classes))
    with pytest.raises(InputError, match="no system of freqseg"): load_system(tmp_path / "c.safetensors", world)
    (tmp_path / "d.safetensors").write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match="d.safetensors"): load_system(tmp_path / "d.safetensors", world)
