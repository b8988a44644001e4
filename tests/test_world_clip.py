"""The trainer of the world's CLIP: its texts, its losses, its stop and go, and the model that ships."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from freqseg.world import clip as world_clip
from freqseg.clip import load_clip
from freqseg.files import InputError, sha256, shipped
from freqseg.metrics import mean_average_precision
from freqseg.world.scenes import WORLD_CLASSES, World
from freqseg.clip import ClosedVocabulary
from freqseg.world.clip import (STAGES, VOCABULARY, caption_loss, content_words, keep_patches, key_imbalance,
                                learning_rate, new_world_clip, phrases, scene_cache, ship_world_clip, train_forward, train_world_clip, true_of,
                                view, world_config)


def test_every_caption_can_be_read():
    tokenizer = ClosedVocabulary(VOCABULARY, 24)
    captions = [World(seed, split, 64, difficulty)[index].caption for seed in (0, 5) for split in ("train", "test")
                for difficulty in ("easy", "hard") for index in range(40)]
    assert tokenizer(captions).shape == (len(captions), 24)


def test_a_caption_is_true_of_its_own_picture_and_of_richer_ones():
    captions = ["a photo of a key", "we see a red key and two mugs on sand", "a mug"]
    table = true_of(content_words(captions), content_words(captions))
    assert table.tolist() == [[1, 0, 0], [1, 1, 1], [0, 0, 1]]
    assert phrases(captions[1]) == ["a red key", "two mugs", "sand"]


def test_caption_loss_is_torchs_sigmoid_loss_pair_by_pair():
    torch.manual_seed(0)
    e, t, truth = torch.randn(3, 8), torch.randn(5, 8), (torch.rand(3, 5) < .3).float()
    scale, bias = torch.tensor(7.), torch.tensor(-2.)
    expected = 0.
    for i in range(3):
        for j in range(5):
            logit = float(scale*F.cosine_similarity(e[i], t[j], 0) + bias)
            expected += math.log1p(math.exp(-logit if truth[i, j] else logit))
    assert float(caption_loss(e, t, truth, scale, bias)) == pytest.approx(expected/3, rel=1e-4)


def test_keys_of_one_length_are_even_whatever_their_direction():
    keys = torch.nn.functional.normalize(torch.randn(2, 3, 11, 8), dim=-1)*5
    assert float(key_imbalance(keys)) == pytest.approx(0, abs=1e-10)
    keys[:, :, 0] *= 100  # CLS has no part in it
    assert float(key_imbalance(keys)) == pytest.approx(0, abs=1e-10)
    keys[:, :, 3] *= 3
    assert float(key_imbalance(keys)) > 1
    assert float(key_imbalance(keys*7)) == pytest.approx(float(key_imbalance(keys)), rel=1e-5)


def test_evening_reaches_the_query_and_key_weights_of_every_block():
    model = new_world_clip(world_config(64))
    train_forward(model.visual, torch.randn(2, 3, 96, 96))[1].backward()
    for block in model.visual.transformer.resblocks:
        _, key, _ = block.attn.in_proj_weight.grad.chunk(3)
        assert key.abs().sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_keys_stay_queries_while_they_are_tied(tmp_path, tied):
    trainer, _ = train_world_clip(tmp_path, steps=6, batch=8, scenes=16, width=64, tied=tied)
    pairs = [block.attn.in_proj_weight.detach().chunk(3)[:2] for block in trainer.model.visual.transformer.resblocks]
    assert all(torch.allclose(query, key, atol=1e-5) for query, key in pairs) == tied


def test_training_forward_equals_the_backbone_when_nothing_is_dropped():
    model = new_world_clip(world_config(64)).eval()
    images = torch.randn(2, 3, 112, 112)
    with torch.no_grad(): tokens, _ = train_forward(model.visual, images)
    expected = model.encode_image(images)
    ours = model.visual.ln_post(tokens[:, 0]) @ model.visual.proj
    assert torch.allclose(ours, expected, atol=1e-5)


def test_keys_begin_as_queries():
    model = new_world_clip(world_config(64))
    for block in model.visual.transformer.resblocks:
        query, key, _ = block.attn.in_proj_weight.chunk(3)
        assert torch.equal(query, key) and torch.allclose(query @ query.T, torch.eye(64), atol=1e-5)


def test_kept_patches_are_some_of_the_patches():
    x = torch.arange(2*10*3.).view(2, 10, 3)
    kept = keep_patches(x, .5)
    assert kept.shape == (2, 5, 3)
    for rows, source in zip(kept, x): assert all((source == row).all(1).any() for row in rows)
    assert keep_patches(x, 1.) is x


def test_stages_cover_the_run_and_rates_rise_and_fall():
    assert STAGES[-1].until == 1 and [s.until for s in STAGES] == sorted(s.until for s in STAGES)
    rates = np.array([learning_rate(step, 4000) for step in range(4000)])
    assert rates.argmax() >= 99 and rates[-1] == pytest.approx(1e-5, abs=1e-6) and (np.diff(rates[1200:]) <= 0).all()


def test_a_view_shows_the_same_window_of_each_picture():
    pictures = np.stack([World(0, size=64)[index].image for index in range(4)])
    x = view(pictures, np.arange(4), 48, np.random.default_rng(0))
    assert x.shape == (4, 3, 48, 48) and x.isfinite().all() and x.abs().max() < 3


def test_a_cache_is_drawn_once_and_holds_the_scenes(tmp_path):
    world = World(2, "val", 64)
    first = scene_cache(tmp_path, world, 5)
    stamp = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = scene_cache(tmp_path, world, 5)
    assert stamp == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert (again.pictures[4] == world[4].image).all() and first.captions[4] == world[4].caption
    scene_cache(tmp_path, World(2, "val", 64, "hard"), 5)
    assert len(list(tmp_path.iterdir())) == 4  # other knobs, other cache


@pytest.mark.slow
def test_a_killed_run_continues_bit_for_bit(tmp_path, monkeypatch):
    settings = dict(steps=7, batch=8, scenes=16, width=64, save_every=3)
    whole, log = train_world_clip(tmp_path/"whole", **settings)
    step = world_clip.train_step
    def die_at_5(trainer):
        if trainer.step == 5: raise KeyboardInterrupt
        return step(trainer)
    monkeypatch.setattr(world_clip, "train_step", die_at_5)
    with pytest.raises(KeyboardInterrupt): train_world_clip(tmp_path/"killed", **settings)
    monkeypatch.setattr(world_clip, "train_step", step)
    again, _ = train_world_clip(tmp_path/"killed", **settings)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values()))
    assert log[-1]["step"] == 7 and all(math.isfinite(row["captions"]) for row in log)
    with pytest.raises(InputError, match="run of 7 steps, not 9"): train_world_clip(tmp_path/"whole", **{**settings, "steps": 9})


def test_a_shipped_file_is_small_and_reads_back(tmp_path):
    trainer, _ = train_world_clip(tmp_path, steps=1, batch=4, scenes=8, width=64)
    digest = ship_world_clip(trainer, tmp_path/"m.safetensors", "tokens")
    backbone = load_clip(tmp_path/"m.safetensors")
    assert backbone.metadata["default_attention_source"] == "tokens" and digest in (tmp_path/"m.sha256").read_text()
    images = torch.randn(1, 3, 112, 112)
    ours = trainer.model.eval().encode_image(images)
    assert F.cosine_similarity(backbone.encode(images).cls_embedding, ours).item() > .999  # half precision apart


def test_the_model_that_ships_is_whole_small_and_knows_its_words():
    path = shipped("world_clip.safetensors")
    assert path.stat().st_size < 8e6 and sha256(path) in shipped("world_clip.sha256").read_text()
    backbone = load_clip("world")
    assert backbone.patch_size == 8 and len(backbone.tokenizer) == len(VOCABULARY) + 3
    with pytest.raises(InputError, match="never saw the word 'zebra'.*It knows: .*umbrella"): backbone.encode_text(["zebra"])


def test_the_model_that_ships_names_what_it_sees():
    backbone = load_clip("world")
    scenes = [World(0, "test")[index] for index in range(40)]
    pixels = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2).float()/255
    pooled = backbone.encode(backbone.normalise(pixels)).patch_embedding.mean((2, 3))
    scores = F.normalize(pooled, dim=1) @ backbone.encode_text(WORLD_CLASSES, ("a picture of a {}",)).T
    truth = torch.tensor([[name in scene.classes for name in WORLD_CLASSES] for scene in scenes])
    assert mean_average_precision(scores, truth) > .6  # a sample of 40: the report measures 500
