"""The backbone: equal to open_clip, frozen, computes only what was asked, and loads nothing unsafe."""
import json, pickle, warnings

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import nn

from freqseg import clip as room
from freqseg.clip import (Backbone, ClosedVocabulary, attention_weights, build_clip, build_closed_clip, class_prompts, load_clip, merge_requests,
                          nearest_multiple, pad_to_patch, read_weights, resize_position_embedding, save_clip)
from freqseg.files import InputError, sha256

WORDS = ("a", "photo", "of", "red", "blue", "circle", "square")
LITTLE = {"embed_dim": 24, "vision_cfg": {"image_size": 32, "layers": 3, "width": 48, "head_width": 16, "patch_size": 8},
          "text_cfg": {"context_length": 10, "vocab_size": len(WORDS) + 3, "width": 32, "heads": 2, "layers": 2}}
VARIANTS = {
    "plain": {}, "layer_scale": {"ls_init_value": 0.3}, "no_ln_pre": {"no_ln_pre": True}, "average_pool": {"pool_type": "avg"},
    "norm_after_pool": {"pool_type": "avg", "final_ln_after_pool": True}, "patch_dropout": {"patch_dropout": 0.5},
    "qk_norm": {"qk_norm": True}, "head_scale": {"scale_heads": True}, "inner_norm": {"scale_attn_inner": True},
    "attention_norm": {"scale_attn": True, "scale_fc": True}, "sincos": {"pos_embed_type": "sin_cos_2d"},
    "rectangle": {"image_size": (32, 48)},
}

def little_config(**vision):
    return LITTLE | {"vision_cfg": LITTLE["vision_cfg"] | vision}

@pytest.fixture(scope="module")
def little():
    return Backbone(build_closed_clip(LITTLE), "little", ClosedVocabulary(WORDS, 10))

def pixels(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- equal to open_clip ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("variant", VARIANTS)
def test_native_size_equals_open_clip_for_every_block_variant(variant):
    model = build_clip(little_config(**VARIANTS[variant]))
    with torch.no_grad():   # make gains and scales differ from their neutral initial values
        for parameter in model.visual.parameters(): parameter.add_(0.05 * torch.randn_like(parameter))
    ours = Backbone(model, variant, None)
    images = pixels(2, 3, *(ours.native_size if isinstance(ours.native_size, tuple) else (32, 32)))
    assert torch.allclose(ours.encode(images).cls_embedding, model.encode_image(images), atol=1e-5)

@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-B-32"])
def test_native_size_equals_open_clip_for_full_models(name):
    clip = load_clip(name, pretrained=None)
    assert isinstance(clip.blocks[0].mlp.gelu, open_clip.transformer.QuickGELU)   # as OpenAI trained it
    images = pixels(1, 3, 224, 224)
    assert torch.allclose(clip.encode(images).cls_embedding, clip.model.encode_image(images), atol=1e-5)

def test_block_outputs_equal_open_clip_intermediates(little):
    images = pixels(2, 3, 32, 32)
    theirs = little.model.visual.forward_intermediates(images, normalize_intermediates=False)["image_intermediates"]
    ours = little.encode(images, tokens=range(3)).tokens
    assert all(torch.allclose(ours[i], theirs[i], atol=1e-5) for i in range(3))

def test_attention_equals_torch_multihead_attention(little):
    images = pixels(2, 3, 40, 24)
    x = little.embed(images)
    normed = little.blocks[0].ln_1(x)
    attn = little.blocks[0].attn
    _, mean = attn(normed, normed, normed, need_weights=True)
    _, heads = attn(normed, normed, normed, need_weights=True, average_attn_weights=False)
    assert torch.allclose(little.encode(images, attention=(0,)).attention[0], mean, atol=1e-6)
    assert torch.allclose(little.encode(images, attention=(0,), per_head=True).attention[0], heads, atol=1e-6)

def test_patch_embedding_is_the_projected_last_block(little):
    features = little.encode(pixels(1, 3, 32, 32), tokens=(-1,))
    visual = little.model.visual
    expected = visual.ln_post(features.tokens[2].flatten(2).mT) @ visual.proj
    assert torch.allclose(features.patch_embedding.flatten(2).mT, expected, atol=1e-6)

def test_last_block_from_ln1_reproduces_the_tower(little):
    features = little.encode(pixels(2, 3, 32, 48), tokens=(-1,))
    out = little.last_block(features.last_ln1, features.last_residual)
    assert torch.allclose(out[:, 1:].mT.unflatten(2, features.grid), features.tokens[2], atol=1e-5)
    assert torch.allclose(little.pool(out), features.cls_embedding, atol=1e-5)

def test_block_steps_chain_to_encode(little):
    images = pixels(1, 3, 48, 32)
    x = little.embed(images)
    for index in range(little.depth): x = little.block(index, x)
    assert torch.allclose(little.pool(x), little.encode(images).cls_embedding, atol=1e-6)


# ---- only what is asked ---------------------------------------------------------------------------------------------

def ran_blocks(little, **request):
    "Indices of the blocks whose MLP ran, and how often attention was written out."
    ran, handles = [], []
    for i, block in enumerate(little.blocks):
        handles.append(block.mlp.register_forward_hook(lambda *_, i=i: ran.append(i)))
    try: little.encode(pixels(1, 3, 32, 32), **request)
    finally: [handle.remove() for handle in handles]
    return ran

@pytest.mark.parametrize("request_,expected", [
    (dict(joint=False), []), (dict(tokens=(0,), joint=False), [0]), (dict(attention=(1,), joint=False), [0]),
    (dict(qkv=(-1,), joint=False), [0, 1]), (dict(joint=False, last_input=True), [0, 1]), (dict(), [0, 1, 2]),
    (dict(tokens=(1,), attention=(0,), joint=False), [0, 1]), (dict(tokens=(-1,), joint=False), [0, 1, 2])])
def test_blocks_that_nobody_needs_are_not_finished(little, request_, expected):
    assert ran_blocks(little, **request_) == expected

def test_attention_is_written_out_only_where_asked(little, monkeypatch):
    calls = []
    monkeypatch.setattr(room, "attention_weights", lambda q, k: calls.append(1) or attention_weights(q, k))
    little.encode(pixels(1, 3, 32, 32))
    assert not calls
    little.encode(pixels(1, 3, 32, 32), attention=(0, 2))
    assert len(calls) == 2

def test_nothing_unasked_is_returned(little):
    features = little.encode(pixels(1, 3, 32, 32), tokens=(1,), joint=False)
    assert features.patch_embedding is None and features.cls_embedding is None and features.last_ln1 is None
    assert list(features.tokens) == [1] and not features.attention and not features.queries

def test_asking_for_more_does_not_change_the_rest(little):
    images = pixels(2, 3, 32, 32)
    lean = little.encode(images)
    full = little.encode(images, tokens=range(3), attention=range(3), qkv=range(3))
    assert torch.allclose(lean.patch_embedding, full.patch_embedding, atol=1e-6)


# ---- attention and shapes -------------------------------------------------------------------------------------------

@settings(max_examples=12, deadline=None)
@given(h=st.integers(1, 6), w=st.integers(1, 6), batch=st.integers(1, 3))
def test_shapes_and_row_stochastic_attention_on_any_grid(little, h, w, batch):
    features = little.encode(pixels(batch, 3, 8 * h, 8 * w), tokens=(0,), attention=(0, -1), qkv=(1,))
    n = h * w
    assert features.grid == (h, w) and features.tokens[0].shape == (batch, 48, h, w)
    assert features.attention[2].shape == (batch, n + 1, n + 1) and features.queries[1].shape == (batch, 3, n + 1, 16)
    assert torch.allclose(features.attention[0].sum(-1), torch.ones(batch, n + 1), atol=1e-5)
    assert features.patch_embedding.shape == (batch, 24, h, w) and features.cls_embedding.shape == (batch, 24)
    assert features.patch_attention(-1).shape == (batch, n, n)
    assert torch.allclose(features.patch_attention(0, renormalise=True).sum(-1), torch.ones(batch, n), atol=1e-5)

def test_images_in_a_batch_do_not_influence_each_other(little):
    images = pixels(3, 3, 32, 40)
    assert torch.allclose(little.encode(images).patch_embedding[1:2], little.encode(images[1:2]).patch_embedding, atol=1e-5)

def test_asking_features_for_what_was_not_encoded_says_what_to_pass(little):
    features = little.encode(pixels(1, 3, 32, 32))
    with pytest.raises(InputError, match=r"attention=\(-1,\)"): features.patch_attention(-1)
    with pytest.raises(InputError, match=r"qkv=\(0,\)"): features.of(features.keys, 0, "keys")

def test_unknown_block_is_refused(little):
    with pytest.raises(InputError, match="0..2"): little.encode(pixels(1, 3, 32, 32), tokens=(3,))


# ---- positions and sizes --------------------------------------------------------------------------------------------

def test_native_positions_are_returned_untouched():
    table = pixels(17, 5)
    assert resize_position_embedding(table, (4, 4), (4, 4)) is table

@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_resized_positions_keep_cls_and_match_interpolate(mode):
    table = pixels(17, 5)
    ours = resize_position_embedding(table, (4, 4), (7, 6), mode)
    grid = F.interpolate(table[1:].view(1, 4, 4, 5).permute(0, 3, 1, 2), size=(7, 6), mode=mode, align_corners=False)
    assert torch.equal(ours[0], table[0]) and torch.allclose(ours[1:], grid[0].permute(1, 2, 0).reshape(42, 5))

def test_constant_positions_stay_constant_at_any_size():
    assert torch.allclose(resize_position_embedding(torch.full((17, 3), 2.5), (4, 4), (9, 2)), torch.full((19, 3), 2.5))

@given(side=st.integers(1, 2000), patch=st.integers(1, 64))
def test_nearest_multiple_is_a_multiple_and_nearest(side, patch):
    near = nearest_multiple(side, patch)
    assert near % patch == 0 and near >= patch and (abs(near - side) * 2 <= patch or near == patch)

def test_size_error_names_the_nearest_valid_size(little):
    with pytest.raises(InputError, match="32 x 48"): little.encode(torch.zeros(1, 3, 33, 45))
    with pytest.raises(InputError, match="shape"): little.encode(torch.zeros(3, 32, 32))

@given(h=st.integers(1, 40), w=st.integers(1, 40), patch=st.integers(1, 16))
def test_padding_reaches_whole_patches_and_crops_back(h, w, patch):
    images = torch.arange(float(h * w)).view(1, 1, h, w)
    padded, (height, width) = pad_to_patch(images, patch)
    assert padded.shape[-2] % patch == 0 and padded.shape[-1] % patch == 0
    assert padded.shape[-2] - h < patch and padded.shape[-1] - w < patch
    assert torch.equal(padded[..., :height, :width], images)


# ---- pictures in ----------------------------------------------------------------------------------------------------

def test_preprocess_accepts_pil_and_arrays_and_inverts(little):
    array = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    from_array, from_pil = little.preprocess(array, 32), little.preprocess([Image.fromarray(array)], 32)
    assert torch.equal(from_array, from_pil) and from_array.shape == (1, 3, 32, 32)
    assert torch.allclose(little.denormalise(from_array)[0].permute(1, 2, 0) * 255, torch.from_numpy(array).float(), atol=1e-3)

def test_preprocess_resizes_to_exactly_the_size_asked(little):
    grey = Image.fromarray(np.full((50, 31), 128, np.uint8))
    assert little.preprocess([grey, grey], size=(24, 40)).shape == (2, 3, 24, 40)
    with pytest.raises(InputError, match="uint8"): little.preprocess(np.zeros((8, 8, 3)))

def test_imagenet_normalisation_is_an_option(saved):
    assert load_clip(saved, normalise="imagenet").mean == (0.485, 0.456, 0.406)
    with pytest.raises(InputError, match="imagenet"): load_clip("ViT-B-32", pretrained=None, normalise="inception")


# ---- frozen ---------------------------------------------------------------------------------------------------------

def test_backbone_stays_in_eval_mode_inside_a_training_parent():
    clip = Backbone(build_clip(little_config(patch_dropout=0.5)), "dropping", None)
    parent = nn.Sequential(clip, nn.Linear(2, 2)).train()
    images = pixels(1, 3, 32, 32)
    assert parent[1].training and not any(module.training for module in clip.modules())
    assert torch.equal(clip.encode(images).cls_embedding, clip.encode(images).cls_embedding)

def test_backbone_neither_moves_nor_receives_gradients():
    clip = Backbone(build_closed_clip(LITTLE), "little", ClosedVocabulary(WORDS, 10))
    before = {k: v.clone() for k, v in clip.state_dict().items()}
    head = nn.Conv2d(24, 2, 1)
    optimiser = torch.optim.AdamW([*clip.parameters(), *head.parameters()], lr=1.0, weight_decay=0.5)
    head(clip.encode(pixels(2, 3, 32, 32)).patch_embedding).square().sum().backward()
    optimiser.step()
    assert all(p.grad is None for p in clip.parameters()) and head.weight.grad is not None
    assert all(torch.equal(v, before[k]) for k, v in clip.state_dict().items())

def test_gradients_flow_through_to_the_input(little):
    images = pixels(1, 3, 32, 32).requires_grad_()
    little.encode(images).cls_embedding.sum().backward()
    assert images.grad.abs().sum() > 0

def test_bf16_autocast_stays_close_and_finite(little):
    images = pixels(2, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16): low = little.encode(images, attention=(-1,))
    assert torch.isfinite(low.patch_embedding).all()
    full = little.encode(images)
    assert F.cosine_similarity(low.cls_embedding.float(), full.cls_embedding).min() > 0.99
    assert torch.allclose(low.attention[2].float().sum(-1), torch.ones(2, 17), atol=2e-2)

def test_backbone_survives_pickling(little):
    again = pickle.loads(pickle.dumps(little))
    images = pixels(1, 3, 32, 32)
    assert torch.equal(again.encode(images).cls_embedding, little.encode(images).cls_embedding)


# ---- text -----------------------------------------------------------------------------------------------------------

def test_text_equals_open_clip_and_is_unit_norm(little):
    ours = little.encode_text(["red circle"], ["a photo of a {}."])
    theirs = little.model.encode_text(little.tokenizer(["a photo of a red circle."]), normalize=True)
    assert torch.allclose(ours, theirs, atol=1e-6) and torch.allclose(ours.norm(dim=-1), torch.ones(1))

def test_ensemble_is_the_renormalised_mean_over_templates_and_aliases(little):
    ours = little.encode_text(["x"], ["{}", "photo of {}"], {"x": ["red circle", "blue square"]})
    rows = little.encode_text(["red circle", "photo of red circle", "blue square", "photo of blue square"], ["{}"])
    assert torch.allclose(ours[0], F.normalize(rows.mean(0), dim=0), atol=1e-6)

def test_text_is_computed_once_per_content(monkeypatch):
    clip = Backbone(build_closed_clip(LITTLE), "little", ClosedVocabulary(WORDS, 10))
    first = clip.encode_text(["red", "blue", "red"], ["a {}"])
    monkeypatch.setattr(clip.model, "encode_text", lambda *_: pytest.fail("encoded again"))
    assert torch.equal(clip.encode_text(["blue"], ["a {}"])[0], first[1]) and torch.equal(first[0], first[2])

def test_new_weights_empty_the_text_cache():
    clip = Backbone(build_closed_clip(LITTLE, seed=0), "little", ClosedVocabulary(WORDS, 10))
    other = Backbone(build_closed_clip(LITTLE, seed=1), "other", ClosedVocabulary(WORDS, 10))
    before = clip.encode_text(["red"], ["{}"])
    clip.load_state_dict(other.state_dict())
    assert torch.equal(clip.encode_text(["red"], ["{}"]), other.encode_text(["red"], ["{}"]))
    assert not torch.equal(clip.encode_text(["red"], ["{}"]), before)

def test_text_mistakes_are_named(little):
    with pytest.raises(InputError, match="no {}"): class_prompts("cat", ["a photo"])
    with pytest.raises(InputError, match="no template"): class_prompts("cat", [])
    with pytest.raises(InputError, match="list of class names"): little.encode_text("red")
    with pytest.raises(InputError, match="nearest: 'circle'"): little.encode_text(["cirkle"], ["a {}"])

def test_unknown_word_lists_the_vocabulary():
    with pytest.raises(InputError) as caught: ClosedVocabulary(WORDS)("a photo of a zebra")
    assert "zebra" in str(caught.value) and all(word in str(caught.value) for word in WORDS)

@given(st.lists(st.sampled_from(WORDS), max_size=8))
def test_tokenizer_round_trips_words(words):
    tokenizer = ClosedVocabulary(WORDS, 10)
    ids = tokenizer(" ".join(words).upper() + " !")[0].tolist()
    assert ids[0] == 1 and ids[len(words) + 1] == 2 and set(ids[len(words) + 2:]) <= {0}
    assert [WORDS[i - 3] for i in ids[1:len(words) + 1]] == words

def test_tokenizer_refuses_long_texts_and_bad_vocabularies():
    with pytest.raises(InputError, match="at most 2"): ClosedVocabulary(WORDS, 4)("a red circle")
    with pytest.raises(InputError, match="not one"): ClosedVocabulary(("two words",))
    with pytest.raises(InputError, match="twice"): ClosedVocabulary(("a", "a"))
    assert len(ClosedVocabulary(WORDS)) == len(WORDS) + 3


# ---- loading --------------------------------------------------------------------------------------------------------

def test_random_weights_are_seeded_and_leave_the_global_generator_alone():
    torch.manual_seed(7); expected = torch.rand(1); torch.manual_seed(7)
    one, two, three = (build_closed_clip(LITTLE, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(one.visual.proj, two.visual.proj) and not torch.equal(one.visual.proj, three.visual.proj)

def test_openai_tag_forces_quickgelu_and_plain_tags_do_not(monkeypatch, tmp_path):
    path = tmp_path/"published.safetensors"
    save_clip(build_closed_clip(LITTLE), path, LITTLE, WORDS)
    monkeypatch.setattr(open_clip, "download_pretrained", lambda published: str(path))
    little = lambda config, *_: build_clip(LITTLE | {"quick_gelu": config["quick_gelu"]})
    monkeypatch.setattr(room, "build_clip", little)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kinds = {tag: type(load_clip("ViT-B-16", tag).blocks[0].mlp.gelu) for tag in ("openai", "laion2b_s34b_b88k")}
    assert kinds == {"openai": open_clip.transformer.QuickGELU, "laion2b_s34b_b88k": nn.GELU}

@pytest.fixture
def saved(tmp_path):
    path = tmp_path/"little.safetensors"
    save_clip(build_closed_clip(LITTLE, seed=5), path, LITTLE, WORDS, default_attention_source="kk", mean=[.1, .2, .3])
    return path

def test_saved_world_model_loads_back_identically(saved):
    clip, model = load_clip(saved), build_closed_clip(LITTLE, seed=5).eval()
    images = pixels(1, 3, 32, 32)
    assert torch.allclose(clip.encode(images).cls_embedding, model.encode_image(images), atol=1e-5)
    assert clip.metadata["default_attention_source"] == "kk" and clip.mean == (.1, .2, .3) and clip.name == "little"

def test_shipped_world_model_is_checked_against_its_digest(saved, tmp_path, monkeypatch):
    digest = tmp_path/"world_clip.sha256"
    monkeypatch.setattr(room, "shipped", lambda name: digest if name.endswith("sha256") else saved)
    digest.write_text(f"{sha256(saved)}  world_clip.safetensors\n")
    assert load_clip("world").depth == 3
    digest.write_text("0" * 64)
    with pytest.raises(InputError, match="damaged"): load_clip("world")

def test_truncated_files_are_named(saved, tmp_path):
    saved.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(InputError, match="little.safetensors is truncated"): load_clip(saved)
    torch_file = tmp_path/"little.pt"
    torch.save(build_closed_clip(LITTLE).state_dict(), torch_file)
    torch_file.write_bytes(torch_file.read_bytes()[:-2000])
    with pytest.raises(InputError, match="little.pt"): read_weights(torch_file)
    with pytest.raises(InputError, match="no weights file"): load_clip("ViT-B-16", pretrained=tmp_path/"absent.safetensors")

def test_other_architecture_names_file_and_mismatch(saved):
    with pytest.raises(InputError, match=r"little.safetensors is of another architecture: .* in the file and .* in the model"):
        load_clip("ViT-B-32", pretrained=saved)

def test_checkpoint_wrappings_are_unwrapped(tmp_path):
    path, state = tmp_path/"train.pt", build_closed_clip(LITTLE, seed=2).state_dict()
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    assert all(torch.equal(value, state[key]) for key, value in read_weights(path).items())

class Bomb:
    def __reduce__(self): return (pytest.fail, ("code ran while loading",))

def test_a_pickle_that_runs_code_is_refused_unrun(tmp_path):
    path = tmp_path/"bomb.pt"
    torch.save({"x": Bomb()}, path)
    with pytest.raises(InputError, match="refused"): load_clip("ViT-B-32", pretrained=path)
    path.write_bytes(pickle.dumps({"x": Bomb()}, protocol=2))
    with pytest.raises(InputError, match="refused"): read_weights(path)

def test_torchscript_archives_are_refused_with_the_remedy(tmp_path):
    path = tmp_path/"ViT-B-16.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path)
    with pytest.raises(InputError, match="TorchScript.*pretrained=\"openai\""): read_weights(path)

def test_failed_download_says_how_to_fetch_by_hand(monkeypatch):
    def unreachable(*_, **__): raise OSError("Network is unreachable")
    monkeypatch.setattr(open_clip, "download_pretrained", unreachable)
    with pytest.raises(InputError, match="could not download ViT-B-16.*open_clip_model.safetensors.*pretrained=") as caught:
        load_clip("ViT-B-16", "openai")
    assert "Network is unreachable" in str(caught.value)

def test_unknown_names_tags_and_towers_are_refused():
    with pytest.raises(InputError, match="no backbone called 'ViT-B-17'.*ViT-B-16"): load_clip("ViT-B-17")
    with pytest.raises(InputError, match="published: .*openai"): load_clip("ViT-B-16", "opeani")
    with pytest.raises(InputError, match="ResNet"): load_clip("RN50", pretrained=None)
    with pytest.raises(InputError, match="timm"): load_clip("ViT-B-16-SigLIP", pretrained=None)
    with pytest.raises(InputError, match="captioning|pooler"): load_clip("coca_ViT-B-32", pretrained=None)
    with pytest.raises(InputError, match="scaled cosine"): Backbone(build_clip(little_config(scaled_cosine_attn=True)), "swinish", None)

def test_world_file_without_configuration_is_refused(tmp_path):
    from safetensors.torch import save_file
    path = tmp_path/"bare.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="which architecture"): load_clip(path)


def test_merged_requests_ask_for_everything_once(little):
    both = merge_requests({"tokens": (1, 0)}, {"tokens": (1,), "attention": (0,), "last_input": True})
    assert both["tokens"] == (0, 1) and both["attention"] == (0,) and both["last_input"] and not both["joint"] and not both["per_head"]
    images = torch.rand(1, 3, little.native_size, little.native_size)
    features = little.encode(images, **both)
    assert set(features.tokens) == {0, 1} and set(features.attention) == {0} and features.last_ln1 is not None and features.patch_embedding is None


@pytest.mark.slow
def test_a_recipe_loads_the_same_backbone_again():
    first = load_clip("ViT-B-32", pretrained=None, normalise="imagenet", seed=3)
    again = load_clip(**first.recipe)
    assert again.mean == first.mean and all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    assert json.loads(json.dumps(first.recipe)) == first.recipe
