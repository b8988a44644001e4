"""Prompts: one wording for seeds, systems and pictures."""

import pytest
import torch

from freqseg.clip import WECLIP_TEMPLATE, Backbone, build_closed_clip, load_clip, save_clip
from freqseg.lists import COCO_CLASSES, VOC_CLASSES, Domain, seen_and_unseen
from freqseg.prompts import (BACKGROUND_PROMPTS, COCO_BACKGROUND_PROMPTS, COCO_PROMPT_ALIASES, VOC_PROMPT_ALIASES,
                             embed_wording, require_words, rivals, usual_background, usual_wording)
from freqseg.files import InputError
from freqseg.world.scenes import WORLD_BACKGROUNDS, WORLD_CLASSES


@pytest.fixture(scope="module")
def world() -> Backbone:
    return load_clip("world")


@pytest.fixture(scope="module")
def clip() -> Backbone:
    return load_clip("ViT-B-32", pretrained=None)


def test_the_rule_gives_both_of_weclips_lists() -> None:
    assert rivals(BACKGROUND_PROMPTS, VOC_CLASSES) == BACKGROUND_PROMPTS
    assert rivals(BACKGROUND_PROMPTS, COCO_CLASSES) == COCO_BACKGROUND_PROMPTS


def test_aliases_speak_of_classes_that_exist() -> None:
    assert set(VOC_PROMPT_ALIASES) < set(VOC_CLASSES) and set(COCO_PROMPT_ALIASES) < set(COCO_CLASSES)
    assert set(BACKGROUND_PROMPTS) - set(COCO_BACKGROUND_PROMPTS) == {"keyboard", "sign"}


def test_a_clip_is_asked_in_weclips_words(clip: Backbone) -> None:
    voc, coco = usual_wording(clip, VOC_CLASSES), usual_wording(clip, COCO_CLASSES)
    assert voc.templates == voc.background_templates == (WECLIP_TEMPLATE,)
    assert dict(voc.aliases) == VOC_PROMPT_ALIASES and voc.background == BACKGROUND_PROMPTS
    assert dict(coco.aliases) == COCO_PROMPT_ALIASES and coco.background == COCO_BACKGROUND_PROMPTS


def test_the_world_is_asked_in_its_captions_words(world: Backbone) -> None:
    words = usual_wording(world, WORLD_CLASSES)
    assert words.background == usual_background(world) == WORLD_BACKGROUNDS and not words.aliases
    assert words.background_templates == ("{}",) and all(template.endswith(" a {}") for template in words.templates)


def test_a_class_is_never_its_own_rival(world: Backbone) -> None:
    assert "sand" not in usual_wording(world, ["sand", "fish"]).background
    assert usual_wording(world, ["fish"], ["sand", "fish"]).background == ("sand",)
    assert usual_wording(world, ["fish"], ()).background == ()


def test_embedded_prompts_are_the_encoders_own(world: Backbone) -> None:
    words = usual_wording(world, ["fish", "key"])
    text, background = embed_wording(world, words)
    assert torch.equal(text, world.encode_text(["fish", "key"], words.templates))
    assert torch.equal(background, world.encode_text(words.background, ("{}",)))
    assert torch.allclose(text.norm(dim=1), torch.ones(2)) and embed_wording(world, usual_wording(world, ["fish"], ())).background is None


def test_wrong_words_are_refused_with_the_nearest(world: Backbone, clip: Backbone) -> None:
    with pytest.raises(InputError, match="'fihs'.*fish"): usual_wording(world, ["fihs"])
    with pytest.raises(InputError, match="'snad'.*sand"): usual_wording(world, ["fish"], ["snad"])
    with pytest.raises(InputError, match="background='none'"): usual_wording(world, ["fish"], "none")
    require_words(clip, ["fihs"])


def test_a_name_is_known_words_one_of_which_says_what(world: Backbone, clip: Backbone) -> None:
    require_words(world, ["fish", "Fish", "two red keys", "a photo of a key", "red-brick  house", *WORLD_CLASSES, *WORLD_BACKGROUNDS])
    for name in ("the", "a photo of", "Two", "we see a large"):
        with pytest.raises(InputError, match=f"'{name}' names nothing.*'ring'"): require_words(world, ["fish", name])
    for name in ("tree;key", "tree/key", "tree.", "'key'", "tree\u00b7key"):
        with pytest.raises(InputError, match="signs.*commas"): require_words(world, [name])
    for name in ("", ";", "tree;zebra"):
        with pytest.raises(InputError, match="unknown class"): require_words(world, [name])
    require_words(clip, ["the", "tree;key"])


def test_any_clip_with_a_closed_vocabulary_says_how_it_is_asked(tmp_path) -> None:
    config = {"embed_dim": 8, "vision_cfg": {"layers": 1, "width": 8, "head_width": 8, "patch_size": 8, "image_size": 16},
              "text_cfg": {"context_length": 8, "vocab_size": 9, "width": 8, "heads": 1, "layers": 1}}
    words, told = ("a", "drawn", "cat", "cow", "grass", "the"), dict(title="drawn animals", classes=["cat", "cow"], unseen=["cow"], background=["grass"], templates=["a drawn {}"], fillers=["the"])
    for name, more in (("told", {"domain": told}), ("silent", {})):   # files of earlier versions tell nothing
        save_clip(build_closed_clip(config), tmp_path / f"{name}.safetensors", config, words, **more)
    animals, silent = (load_clip(tmp_path / f"{name}.safetensors") for name in ("told", "silent"))
    words = usual_wording(animals, ["cat"])
    assert words.templates == ("a drawn {}",) and words.background == ("grass",) and words.background_templates == ("{}",)
    assert seen_and_unseen(["cat", "cow"], domain=animals.domain).unseen == ("cow",) and animals.domain.side is None
    with pytest.raises(InputError, match="'cta'.*'cat'.*a CLIP of drawn animals, knows nothing but cat, cow, and as backgrounds grass"): require_words(animals, ["cta"])
    with pytest.raises(InputError, match="'the' names nothing.*'cat'"): require_words(animals, ["the"])
    assert usual_wording(silent, ["cat"]).templates == ("{}",) and usual_wording(silent, ["cat"]).background == ()
    with pytest.raises(InputError, match="titel.*Did you mean 'title'"): Domain.parsed({"titel": "x"}, "file")
