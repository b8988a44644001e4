"""ZegCLIP and SPT-SEG: parameter counts, what learns, classes that stand by themselves, hidden masks, other vocabularies."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from freqseg.work.checkpoints import load_system, save_system
from freqseg.faces.cli import main
from freqseg.clip import Backbone, load_clip
from freqseg.data import Batch, SegmentationFolder, list_folder, zero_shot_view
from freqseg.lists import UNLABELLED, VOC_CLASSES, seen_and_unseen
from freqseg.pictures import palette, write_mask
from freqseg.files import InputError
from freqseg.systems.segmenter import known_systems, system_named
from freqseg.systems.sptseg import SPTSEG
from freqseg.systems.zegclip import ZegCLIP
from freqseg.world.scenes import WORLD_CLASSES, WORLD_DOMAIN, World

SYSTEMS = [name for name in known_systems() if system_named(name).supervision == "masks"]
SELF = 3*(4*(512*512 + 512) + 2*512)                                     # of three layers: an attention and a norm that no published forward pass runs
WORLD_ZERO_SHOT = seen_and_unseen(WORLD_CLASSES, domain=WORLD_DOMAIN)
BEHIND = 2*(512*512 + 512) + (512*2048 + 2048 + 2048*512 + 512) + 2*2*512   # of the last layer: what follows its scores, which are the answer


@pytest.fixture(scope="module")
def world() -> Backbone:
    return load_clip("world")


@pytest.fixture(scope="module")
def clip() -> Backbone:
    return load_clip("ViT-B-16", pretrained=None)


@pytest.fixture(scope="module")
def batch() -> Batch:
    "Three crops; unseen classes and background carry no label."
    scenes = [World(0, "train")[index] for index in range(3)]
    images = torch.stack([torch.from_numpy(scene.image[64:160, 64:160]).permute(2, 0, 1)/255 for scene in scenes])
    masks = torch.stack([torch.from_numpy(scene.mask[64:160, 64:160]) for scene in scenes]).long()
    masks = torch.where(masks <= len(WORLD_CLASSES), masks - 1, -1)
    unseen = torch.isin(masks, torch.tensor(WORLD_ZERO_SHOT.unseen_index))
    return Batch(("a", "b", "c"), images, masks.masked_fill(unseen, UNLABELLED).masked_fill(masks < 0, 255), None)


def build(name: str, backbone: Backbone, classes=WORLD_CLASSES, **options):
    torch.manual_seed(0)
    return system_named(name).build(backbone, classes, **options)


def trainable(system: torch.nn.Module) -> int: return sum(p.numel() for p in system.parameters() if p.requires_grad)


# ---- counts ---------------------------------------------------------------------------------------------------------

def test_zegclip_has_the_published_numbers_of_parameters(clip: Backbone) -> None:
    "The published numbers, and what is left of them without that which never gets a gradient."
    assert trainable(build("zegclip", clip, VOC_CLASSES)) + SELF + BEHIND == 13_821_184
    assert trainable(build("zegclip", clip, VOC_CLASSES, prompts=100)) + SELF + BEHIND == 14_650_624
    assert trainable(build("zegclip", clip, VOC_CLASSES, self_attention=True, whole_last=True)) == 13_821_184
    assert trainable(build("zegclip", clip, VOC_CLASSES, self_attention=True, whole_last=True, prompts=100)) == 14_650_624


def test_the_number_of_sptseg_follows_from_its_parts(clip: Backbone) -> None:
    system = build("sptseg", clip, VOC_CLASSES)
    tower = 12*10*768 + (768*768 + 768) + 2*768 + 14*8*768*2      # prompts, their layer, the norm, one complex filter for the 14 x 14 grid
    assert trainable(system.tower) == tower
    assert trainable(system) == tower + (1024*512 + 512) + trainable(system.decoder)
    assert trainable(build("sptseg", clip, VOC_CLASSES, shared_filter=False)) == trainable(system) + 14*8*768*2
    assert trainable(build("sptseg", clip, VOC_CLASSES, filter_size=512)) == trainable(system) + (32*17 - 14*8)*768*2
    assert trainable(build("sptseg", clip, VOC_CLASSES, spectral=None, decoder="cross")) == 13_821_184 - SELF - BEHIND


# ---- what learns ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SYSTEMS)
def test_a_step_trains_prompts_filters_and_head_and_nothing_of_the_backbone(name: str, world: Backbone, batch: Batch) -> None:
    before = copy.deepcopy(world.state_dict())
    system = build(name, world).train()
    optimiser = torch.optim.AdamW([dict(params=group["params"], lr=1e-3) for group in system.parameter_groups()])
    losses = system.training_step(batch, 0.)
    assert set(losses) == ({"focal", "dice"} if name == "zegclip" else {"focal", "ssim"}) and all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in system.parameters() if p.requires_grad)
    optimiser.step()
    assert all(torch.equal(value, before[key]) for key, value in world.state_dict().items()) and not any(p.requires_grad for p in world.parameters())
    assert sum(len(group["params"]) for group in system.parameter_groups()) == sum(p.requires_grad for p in system.parameters())
    assert not any(key.startswith("backbone.") for key in system.trainable_state())


def test_norms_do_not_decay(world: Backbone) -> None:
    rest, norms = build("sptseg", world).parameter_groups()
    assert norms["weight_decay"] == 0 and all(p.ndim == 1 for p in norms["params"]) and any(p.ndim > 1 for p in rest["params"])


@pytest.mark.parametrize("options", [dict(spectral="1-2"), dict(decoder="spectral"), dict(spectral="1-6", shared_filter=False), dict(spectral="6"),
                                     dict(decoder="spectral", high_heads=4, head_window=2), dict(decoder="spectral", residual=True), dict(decoder="spectral", mask_padding=False, similarity="clamp"),
                                     dict(decoder="spectral", reads="previous"), dict(ssim=1., ssim_over="all"), dict(decoder_layers=1), dict(decoder_layers=5, decoder="spectral"), dict(self_attention=True), dict(prompts=0), dict(ssim=1.),
                                     dict(ignored_as_negative=False), dict(transductive=True), dict(drop_path=.1, prompt_dropout=0., decoder_dropout=0.)])
def test_every_switch_trains(options: dict, world: Backbone, batch: Batch) -> None:
    system = build("zegclip", world, **options).train()
    for progress in (0., .9):
        loss = sum(system.training_step(batch, progress).values())
        loss.backward()
        assert loss.isfinite() and all(p.grad.isfinite().all() for p in system.parameters() if p.grad is not None)


@pytest.mark.slow
def test_a_few_steps_learn(world: Backbone, batch: Batch) -> None:
    for name in SYSTEMS:
        system = build(name, world, prompt_dropout=0., decoder_dropout=0.).train()
        optimiser = torch.optim.AdamW(system.parameters(), lr=1e-3)
        losses = []
        for _ in range(15):
            loss = sum(system.training_step(batch, 0.).values())
            optimiser.zero_grad(); loss.backward(); optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < .8*losses[0], name


# ---- classes stand by themselves ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SYSTEMS)
def test_masks_follow_the_order_of_names_and_do_not_heed_other_names(name: str, world: Backbone, batch: Batch) -> None:
    system, images = build(name, world).eval(), world.normalise(batch.images)
    whole = system.predict(images)
    assert whole.shape == (3, 20, 12, 12)
    for names in (("tree", "key"), ("moon", "tree", "key", "ring"), ("tree", "grass", "key")):
        other = system.with_vocabulary(names)
        found = other.predict(images)
        for row, word in enumerate(names):
            if word in WORLD_CLASSES: torch.testing.assert_close(found[:, row], whole[:, WORLD_CLASSES.index(word)], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(system.predict(images), whole)
    assert system.classes == WORLD_CLASSES and other.classes == ("tree", "grass", "key") and other.num_classes == 3


def test_seen_names_are_held_back_unseen_and_new_ones_are_not(world: Backbone) -> None:
    system = build("zegclip", world)
    assert system.handicap.tolist() == pytest.approx([.1*(name in WORLD_ZERO_SHOT.seen) for name in WORLD_CLASSES])
    assert system.with_vocabulary(["ring", "grass", "ladder"]).handicap.tolist() == pytest.approx([.1, 0, 0])
    assert build("zegclip", world, transductive=True).handicap.tolist() == [0]*20
    assert build("zegclip", world, transductive=True, bias=.2).handicap.max().item() == pytest.approx(.2)


def test_capitals_and_earlier_vocabularies_change_no_handicap(world: Backbone, batch: Batch) -> None:
    system, images = build("zegclip", world).eval(), world.normalise(batch.images)
    assert system.with_vocabulary(["Ring", "LADDER"]).handicap.tolist() == pytest.approx([.1, 0])
    torch.testing.assert_close(system.with_vocabulary(["Ring"]).predict(images), system.with_vocabulary(["ring"]).predict(images))
    again = system.with_vocabulary(["grass", "tree"]).with_vocabulary(["ring", "tree"])
    assert again.handicap.tolist() == pytest.approx([.1, .1]) and again.split.seen == ("ring", "tree")
    assert system.with_vocabulary(["grass", "tree"]).config == system.config


def test_labels_are_the_best_names_with_seen_ones_held_back(world: Backbone) -> None:
    names = ["ladder", "ring", "tree", "house"]
    few, logits = build("sptseg", world, bias=.3).with_vocabulary(names), torch.randn(2, 4, 8, 8)
    scores = torch.stack([logits[:, k].sigmoid() - .3*(name in WORLD_ZERO_SHOT.seen) for k, name in enumerate(names)], 1)
    assert torch.equal(few.labels(logits), scores.argmax(1) + 1)
    assert (few.labels(logits) != logits.argmax(1) + 1).any()


def test_no_head_is_dead_at_any_of_twenty_starts(world: Backbone, batch: Batch) -> None:
    images = world.normalise(batch.images[:1])
    for seed in range(20):
        torch.manual_seed(seed)
        system = SPTSEG.build(world, WORLD_CLASSES, filter_size=96)
        logits = system.masks(images, system.text)
        logits.square().mean().backward()
        assert logits.std() > 0 and all(p.grad.abs().max() > 0 for p in system.decoder.parameters()), seed


@pytest.mark.parametrize("name", SYSTEMS)
def test_in_bfloat16_no_two_names_are_best(name: str, world: Backbone, batch: Batch) -> None:
    system, images = build(name, world).eval(), world.normalise(batch.images)
    with torch.autocast("cpu", torch.bfloat16): logits = system.predict(images)
    best = logits.topk(2, 1).values
    assert logits.dtype == torch.float32 and (best[:, 0] == best[:, 1]).float().mean() < .002
    assert (logits.argmax(1) == system.predict(images).argmax(1)).float().mean() > .9


def test_tokens_may_be_filtered_before_the_names_ask(world: Backbone, batch: Batch) -> None:
    system, images = build("sptseg", world).eval(), world.normalise(batch.images)
    both = system.predict(images, lambda patches: torch.cat([patches, 0*patches]))
    torch.testing.assert_close(both[:3], system.predict(images), atol=1e-5, rtol=1e-4)
    assert both.shape[0] == 6 and both[3:].std((2, 3)).max() < 1e-4


# ---- hidden masks ---------------------------------------------------------------------------------------------------

def test_training_does_not_depend_on_what_is_hidden_but_for_where(world: Backbone, batch: Batch) -> None:
    "Inductive: unseen pixels, background and padding are all the same to the loss, whichever of the two values they carry."
    merged = Batch(batch.ids, batch.images, batch.masks.masked_fill(batch.masks == UNLABELLED, 255), None)
    for negative in (True, False):
        system = build("zegclip", world, ignored_as_negative=negative).eval()
        for name, loss in system.training_step(batch, .9).items(): torch.testing.assert_close(loss, system.training_step(merged, .9)[name])


def test_self_training_labels_only_hidden_pixels_and_only_with_unseen_classes(world: Backbone, batch: Batch) -> None:
    system = build("zegclip", world, transductive=True).eval()
    logits = F.interpolate(system.predict(world.normalise(batch.images)), (96, 96), mode="bilinear")
    found, hidden = system.self_labelled(logits, batch.masks), batch.masks == UNLABELLED
    assert hidden.any() and torch.equal(found[~hidden], batch.masks[~hidden])
    assert torch.isin(found[hidden], torch.tensor(WORLD_ZERO_SHOT.unseen_index)).all()
    best = logits[:, WORLD_ZERO_SHOT.unseen_index].argmax(1)
    assert torch.equal(found[hidden], torch.tensor(WORLD_ZERO_SHOT.unseen_index)[best][hidden])
    early, late = (system.training_step(batch, progress)["focal"] for progress in (.49, .5))
    assert early.item() != late.item()


def test_a_picture_that_shows_nothing_known_trains_without_nan(world: Backbone, batch: Batch) -> None:
    for name in SYSTEMS:
        system = build(name, world)
        for value in (255, UNLABELLED):
            for negative in (True, False):
                system = build(name, world, ignored_as_negative=negative, transductive=True)
                for progress in (0., .9):
                    losses = system.training_step(Batch(batch.ids, batch.images, torch.full_like(batch.masks, value), None), progress)
                    assert all(loss.isfinite() for loss in losses.values())


# ---- wrong input ----------------------------------------------------------------------------------------------------

def test_splits_and_names_that_cannot_be_are_explained(world: Backbone, batch: Batch) -> None:
    with pytest.raises(InputError, match="no published split.*unseen=cow"): seen_and_unseen(("cat", "dog", "cow"))
    with pytest.raises(InputError, match="both seen and unseen: dog"): seen_and_unseen(("cat", "dog"), ("dog",), ("dog", "cat"))
    with pytest.raises(InputError, match="'dgo'.*dog"): seen_and_unseen(("cat", "dog"), "dgo")
    system = build("zegclip", world)
    with pytest.raises(InputError, match="'zebra'"): system.with_vocabulary(["zebra"])
    with pytest.raises(InputError, match="twice"): system.with_vocabulary(["key", "key"])
    with pytest.raises(InputError, match="'Key' is named twice, before as 'key'"): system.with_vocabulary(["key", "Key"])
    with pytest.raises(InputError, match="has no name"): system.with_vocabulary(["key", " "])
    with pytest.raises(InputError, match="no masks for a"): system.training_step(Batch(batch.ids, batch.images, None, None), 0.)
    for options, told in ((dict(decoder="plain"), "one of cross, spectral"), (dict(spectral="0-2"), "0-2"), (dict(spectral="5-9"), "5-9"), (dict(spectral="1-2", filter_init="ones"), "filter_init='ones': this option is gone"),
                          (dict(wording="long"), "'long'"), (dict(focl=1), "focal"), (dict(decoder="spectral", similarity="dot"), "dot"),
                          (dict(decoder="spectral", reads="all"), "reads='all'"), (dict(ssim_over="none"), "ssim_over='none'"), (dict(filter_size=0), "filter_size=0"), (dict(bias=float("nan")), "bias=nan"),
                          (dict(self_from=3.), "self_from=3"), (dict(prompt_dropout=2.), "prompt_dropout=2"), (dict(focal=-1.), "focal=-1.0: give a number of at least 0"), (dict(focal=0., dice=0.), "above 0")):
        with pytest.raises(InputError, match=told): build("zegclip", world, **options)


# ---- checkpoints ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", SYSTEMS)
def test_a_saved_system_answers_the_same_again(name: str, world: Backbone, batch: Batch, tmp_path: Path) -> None:
    system = build(name, world, unseen=("key", "tree")).eval()
    save_system(system, tmp_path/"it.safetensors", step=3)
    again, images = load_system(tmp_path/"it.safetensors"), world.normalise(batch.images)
    assert torch.equal(again.predict(images), system.predict(images)) and again.split == system.split and again.name == name


def test_a_checkpoint_answers_for_the_classes_of_other_data(world: Backbone, tmp_path: Path) -> None:
    save_system(build("zegclip", world), tmp_path/"it.safetensors", step=0)
    other = load_system(tmp_path/"it.safetensors", classes=("tree", "water", "house"))
    assert other.classes == ("tree", "water", "house") and (other.split.seen, other.split.unseen) == (("tree",), ("water", "house"))


def test_a_system_that_answers_for_other_names_is_saved_as_it_was_trained(world: Backbone, batch: Batch, tmp_path: Path) -> None:
    system, images = build("sptseg", world).eval(), world.normalise(batch.images)
    save_system(system.with_vocabulary(["water", "tree"]), tmp_path/"it.safetensors", step=0)
    again = load_system(tmp_path/"it.safetensors")
    assert again.classes == WORLD_CLASSES and torch.equal(again.predict(images), system.predict(images))


def test_filters_of_another_grid_are_carried_over(world: Backbone, batch: Batch) -> None:
    system = build("sptseg", world).eval()
    for size in ((64, 96), (224, 224)): assert system.predict(torch.zeros(1, 3, *size)).shape == (1, 20, size[0]//8, size[1]//8)


def test_a_checkpoint_of_another_grid_is_resized_with_a_notice(world: Backbone, batch: Batch) -> None:
    small, large, images = build("sptseg", world, filter_size=96).eval(), build("sptseg", world, filter_size=128).eval(), world.normalise(batch.images)
    with pytest.warns(UserWarning, match="12 x 12 patches, carried over to 16 x 16"): large.load_trainable(small.trainable_state())
    wide = F.interpolate(images, (128, 128))
    torch.testing.assert_close(large.predict(wide), small.predict(wide), atol=1e-4, rtol=1e-3)    # both carry the same filter to this size
    with pytest.raises(InputError, match="do not fit"): large.load_trainable(build("zegclip", world).trainable_state())


# ---- the command ----------------------------------------------------------------------------------------------------

@pytest.fixture
def checkpoint(world: Backbone, tmp_path: Path) -> Path:
    save_system(build("sptseg", world), tmp_path/"it.safetensors", step=0)
    Image.fromarray(World(0, "val")[0].image[:50, :90]).save(tmp_path/"scene.png")
    return tmp_path/"it.safetensors"


def test_segment_answers_for_the_names_asked_for(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint.parent
    words = ["segment", str(folder/"scene.png"), "--model", str(checkpoint), "--out", str(folder/"out"), "--device", "cpu"]
    assert main([*words, "--classes", "tree, water, key", "--window", "64"]) == 0    # the picture is smaller than the window
    mask = Image.open(folder/"out"/"scene.png")
    assert mask.mode == "P" and mask.size == (90, 50) and set(np.unique(np.asarray(mask))) <= {1, 2, 3}
    assert mask.getpalette()[:9] == palette()[:3].ravel().tolist() and (folder/"out"/"scene_over.png").exists()
    assert main([*words, "--classes", "tree"]) == 0
    said = capsys.readouterr()
    assert "tree is the only name" in said.err and set(np.unique(np.asarray(Image.open(folder/"out"/"scene.png")))) <= {0, 1}
    for names, told in (("zebra", "'zebra'"), ("tree, tree", "twice"), (",", "no class names")):
        assert main([*words, "--classes", names]) == 2
        assert told in capsys.readouterr().err
    (folder/"broken.png").write_bytes(b"no picture")
    assert main(["segment", str(folder/"broken.png"), *words[1:]]) == 2
    said = capsys.readouterr()
    assert "broken.png" in said.err and "1 of 2 pictures" in said.out


def test_a_label_beyond_the_table_is_named(tmp_path: Path) -> None:
    (tmp_path/"JPEGImages").mkdir()
    (tmp_path/"classes.txt").write_text("ant\nbee\ncow\n")
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path/"JPEGImages"/"a.png")
    write_mask(tmp_path/"SegmentationClass"/"a.png", np.full((20, 20), 7))
    (tmp_path/"ImageSets"/"Segmentation").mkdir(parents=True)
    (tmp_path/"ImageSets"/"Segmentation"/"train.txt").write_text("a\n")
    view = zero_shot_view(list_folder(tmp_path, "train"), seen_and_unseen(("ant", "bee", "cow"), "cow"), UNLABELLED)
    with pytest.raises(InputError, match="a.png.*7 on 400 pixels"): SegmentationFolder(view, masks=True)[0]
