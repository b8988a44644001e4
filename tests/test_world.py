"""The embedded world: deterministic, exact masks, truthful captions, and the failures it promises."""
import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from freqseg.data import open_folder
from freqseg.files import InputError
from freqseg.world.scenes import (DIFFICULTIES, KINDS, SPLITS, WORLD_BACKGROUNDS, WORLD_CLASSES, World, noise_bank, paint, plural, write_world)

indices = st.integers(0, 10**6)


def digest(scene) -> str:
    return hashlib.sha256(scene.image.tobytes() + scene.mask.tobytes() + scene.caption.encode()).hexdigest()


@settings(max_examples=25, deadline=None)
@given(indices, st.sampled_from(SPLITS), st.sampled_from(list(DIFFICULTIES)), st.integers(0, 3))
def test_a_scene_depends_on_seed_split_and_index_alone(index, split, difficulty, seed):
    once, again = (World(seed, split, 96, difficulty)[index] for _ in range(2))
    assert digest(once) == digest(again)
    assert digest(World(seed + 1, split, 96, difficulty)[index]) != digest(once)


def test_another_process_draws_the_same_scenes():
    code = ("import hashlib; from freqseg.world.scenes import World\n"
            "for i in (0, 7, 123):\n    s = World(0)[i]; print(hashlib.sha256(s.image.tobytes() + s.mask.tobytes() + s.caption.encode()).hexdigest())")
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert printed == [digest(World(0)[index]) for index in (0, 7, 123)]


def test_pixel_arithmetic_is_exact_on_every_platform():
    """Only + - * /, roots, comparisons and rounding touch pixels, so these sums hold to the last bit on any machine."""
    masks = np.stack([World(0, "test", 128)[index].mask for index in range(6)]).astype(np.int64)
    images = np.stack([World(0, "test", 128)[index].image for index in range(6)]).astype(np.int64)
    position = np.arange(masks.size).reshape(masks.shape) % 9973
    assert (int((masks*position).sum()), int((images*position[..., None]).sum())) == PINNED


PINNED = (8351859696, 148465408759)


@settings(max_examples=40, deadline=None)
@given(indices, st.sampled_from(list(DIFFICULTIES)))
def test_mask_labels_and_caption_agree(index, difficulty):
    scene = World(3, "val", 128, difficulty)[index]
    inside = {WORLD_CLASSES[value - 1] for value in np.unique(scene.mask) if 0 < value < 255}
    assert inside <= set(scene.classes)  # a thin class may be all border, but nothing unnamed is in the mask
    named = {name for name in WORLD_CLASSES if {name, plural(name)} & set(scene.caption.split())}
    assert named == set(scene.classes)
    assert scene.background is None or scene.background in WORLD_BACKGROUNDS
    assert 1 <= len(scene.classes) <= 3


@settings(max_examples=20, deadline=None)
@given(indices)
def test_every_border_is_two_pixels_of_void(index):
    mask = World(0, "train", 160)[index].mask.astype(int)
    inner = mask != 255
    for a, b, known in ((mask[:, 1:], mask[:, :-1], inner[:, 1:] & inner[:, :-1]), (mask[1:], mask[:-1], inner[1:] & inner[:-1])):
        assert not (known & (a != b)).any()  # two classes never touch
    void = mask == 255
    assert 0 < void.mean() < .4


def test_no_class_is_smaller_than_the_minimal_visible_area():
    knobs = DIFFICULTIES["hard"]
    world = World(1, "train", 224, knobs)
    for index in range(60):
        scene = world[index]
        void = (scene.mask == 255).mean()
        for name in scene.classes:
            assert (scene.mask == WORLD_CLASSES.index(name) + 1).mean() + void >= knobs.minimal


@pytest.mark.slow
def test_the_promised_failures_are_there():
    scenes = [World(0)[index] for index in range(400)]
    habitat = {kind.name: kind.habitat for kind in KINDS if kind.habitat}
    alone = [scene for scene in scenes if len(scene.classes) == 1]
    home = np.mean([scene.background == habitat[scene.classes[0]] for scene in alone if scene.classes[0] in habitat])
    elsewhere = np.mean([scene.background == "water" for scene in alone if scene.classes[0] != "fish"])
    assert home > .6 > 5*elsewhere  # co-occurring background
    spoken = [scene.background in scene.caption.split() for scene in scenes if scene.background]
    assert .3 < np.mean(spoken) < .7  # the ground is sometimes mentioned
    assert not any(name in scene.caption.split() for scene in scenes for name in set(WORLD_BACKGROUNDS) - {scene.background})


def test_a_part_wears_the_class_and_the_rest_is_shared():
    from freqseg.world.scenes import COATS, TEXTURES
    pairs = [(kind.texture, kind.hue) for kind in KINDS]
    assert len(set(pairs)) == len(KINDS)  # the typical look tells the classes apart
    assert len({kind.hue for kind in KINDS}) < len(KINDS) and len(COATS) < len(KINDS)
    u = np.linspace(-1, 1, 8, dtype=np.float32)[None].repeat(8, 0)
    for name in TEXTURES: assert paint(name, (.2, .5, .9), u, u.T, 2.).shape == (3, 8, 8)


def test_difficulties_differ_in_what_they_say():
    size = {name: np.median([(World(0, "val", 96, name)[i].mask > 0).mean() for i in range(60)]) for name in DIFFICULTIES}
    assert size["easy"] > size["hard"]
    assert all(len(World(0, "val", 96, "easy")[i].classes) <= 2 for i in range(40))


def test_noise_is_periodic_and_bounded():
    bank = noise_bank()
    jump = np.abs(bank[:, 0] - bank[:, -1]).mean()/np.abs(bank[:, 0] - bank[:, 1]).mean()
    assert np.abs(bank).max() <= 1 and jump < 2


@pytest.mark.parametrize("make, message", [
    (lambda: World(split="valid"), "split 'valid' is unknown: choose one of train, val, test"),
    (lambda: World(difficulty="brutal"), "difficulty 'brutal' is unknown"),
    (lambda: World(size=8), "32 to 1024 pixels"),
    (lambda: World()[-1], "numbered from 0")])
def test_wrong_settings_say_what_is_right(make, message):
    with pytest.raises(InputError, match=message): make()


def test_a_world_on_disk_reads_back_as_it_was_drawn(tmp_path):
    write_world(tmp_path/"w", train=3, val=2, test=1, size=64)
    dataset = open_folder(tmp_path/"w", "val")
    for index in range(2):
        scene, sample = World(0, "val", 64)[index], dataset[index]
        assert (np.asarray(sample.image) == scene.image).all() and (np.asarray(sample.mask) == scene.mask).all()
        assert [name for name, there in zip(WORLD_CLASSES, sample.labels) if there] == list(scene.classes)
    assert (tmp_path/"w"/"captions.txt").read_text().splitlines()[0] == f"train_000000\t{World(0, size=64)[0].caption}"


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path/"mine.txt").write_text("keep")
    with pytest.raises(InputError, match="is not empty"): write_world(tmp_path, 1, 0, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_world_without_scenes_is_refused(tmp_path):
    with pytest.raises(InputError, match="at least one scene"): write_world(tmp_path/"w", 0, 0, 0)


@pytest.mark.slow
def test_many_scenes_are_written_by_all_cores(tmp_path):
    write_world(tmp_path/"w", train=70, val=1, test=1, size=48, workers=2)
    assert len(list((tmp_path/"w"/"JPEGImages").iterdir())) == 72
    assert len((tmp_path/"w"/"ImageSets"/"Segmentation"/"train.txt").read_text().split()) == 70
