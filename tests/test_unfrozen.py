"""The unfrozen backbone: the same features, gradients where asked for and nowhere else, and the original untouched."""
import json
import pickle

import pytest
import torch

from freqseg import clip as clip_room
from freqseg.cam import grad_cam
from freqseg.clip import Backbone, ClosedVocabulary, build_closed_clip
from freqseg.files import InputError
from freqseg.unfrozen import TrainableBackbone, positions_are_weights, resolve_blocks, unfreeze

WORDS = ("red", "blue", "circle")
LITTLE = {"embed_dim": 24, "vision_cfg": {"image_size": 32, "layers": 3, "width": 48, "head_width": 16, "patch_size": 8},
          "text_cfg": {"context_length": 10, "vocab_size": len(WORDS) + 3, "width": 32, "heads": 2, "layers": 2}}
CHOICES = ("all", (-1,), (0, 2), (1,))

def little(**vision):
    config = LITTLE | {"vision_cfg": LITTLE["vision_cfg"] | vision}
    return Backbone(build_closed_clip(config), "little", ClosedVocabulary(WORDS, 10))

@pytest.fixture
def frozen():
    return little()

@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))

def learning(backbone):
    return {name for name, p in backbone.model.named_parameters() if p.requires_grad}

def with_gradient(backbone):
    return {name for name, p in backbone.model.named_parameters() if p.grad is not None and p.grad.any()}

def tokens_of(backbone, images):
    return backbone.encode(images, tokens=(-1,), joint=False).tokens[backbone.depth - 1]


@pytest.mark.parametrize("blocks", CHOICES)
def test_features_are_those_of_the_frozen_backbone(frozen, images, blocks):
    ask = {"tokens": range(3), "attention": (0, -1), "qkv": (1,)}
    theirs, ours = frozen.encode(images, **ask), unfreeze(frozen, blocks).encode(images, **ask)
    assert all(torch.equal(theirs.tokens[i], ours.tokens[i]) for i in range(3))
    assert torch.equal(theirs.attention[2], ours.attention[2]) and torch.equal(theirs.keys[1], ours.keys[1])
    assert torch.equal(theirs.patch_embedding, ours.patch_embedding) and torch.equal(theirs.cls_embedding, ours.cls_embedding)

@pytest.mark.parametrize("blocks", CHOICES)
@pytest.mark.parametrize("projection", [False, True])
def test_exactly_what_was_unfrozen_receives_gradients(frozen, images, blocks, projection):
    backbone = unfreeze(frozen, blocks, projection=projection)
    features = backbone.encode(images, tokens=(-1,))
    (features.tokens[2].square().sum() + features.patch_embedding.square().sum()).backward()
    assert with_gradient(backbone) == learning(backbone) and learning(backbone)
    visible = {name for name in learning(backbone) if ".resblocks." in name}
    assert {int(name.split(".resblocks.")[1].split(".")[0]) for name in visible} == set(resolve_blocks(3, blocks))
    assert ("visual.proj" in learning(backbone)) == projection and ("visual.conv1.weight" in learning(backbone)) == (blocks == "all")

def test_all_the_weights_that_make_tokens_learn_and_text_never_does(frozen):
    everything = learning(unfreeze(frozen, "all", projection=True))
    assert everything == {name for name, _ in frozen.model.named_parameters() if name.startswith("visual.")}
    assert learning(unfreeze(frozen, (1,), embedding=True)) >= {"visual.conv1.weight", "visual.positional_embedding"}
    assert "visual.conv1.weight" not in learning(unfreeze(frozen, "all", embedding=False))

def test_training_the_copy_changes_nothing_in_the_original(frozen, images):
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    text = frozen.encode_text(["red circle"], ["{}"])
    backbone = unfreeze(frozen, "all", projection=True)
    optimiser = torch.optim.AdamW(backbone.parameters(), lr=0.1, weight_decay=0.5)
    backbone.encode(images).patch_embedding.square().sum().backward()
    optimiser.step()
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    assert not learning(frozen) and all(p.grad is None for p in frozen.parameters())
    moved = {name for name, p in backbone.model.named_parameters() if not torch.equal(p, before[f"model.{name}"])}
    assert moved == learning(backbone)
    assert torch.equal(backbone.encode_text(["red circle"], ["{}"]), text)

def test_it_remembers_how_its_backbone_was_loaded(frozen):
    frozen.recipe = {"name": "little"}
    copied = unfreeze(frozen)
    assert copied.recipe == frozen.recipe and copied.recipe is not frozen.recipe
    assert (copied.name, copied.mean, copied.std, copied.position_resize) == (frozen.name, frozen.mean, frozen.std, frozen.position_resize)

def test_no_memory_is_shared_with_the_original(frozen):
    theirs = {p.data_ptr() for p in frozen.parameters()}
    assert not theirs & {p.data_ptr() for p in unfreeze(frozen).parameters()}

def test_frozen_blocks_before_the_first_learning_one_record_no_graph(frozen, images):
    features = unfreeze(frozen, (-1,)).encode(images, tokens=range(3))
    assert [features.tokens[i].requires_grad for i in range(3)] == [False, False, True]
    assert not any(frozen.encode(images, tokens=range(3)).tokens[i].requires_grad for i in range(3))

def test_attention_is_written_out_only_where_it_is_asked_for(frozen, images, monkeypatch):
    backbone, calls = unfreeze(frozen), []
    written_out = clip_room.attention_weights
    monkeypatch.setattr(clip_room, "attention_weights", lambda *qk: calls.append(1) or written_out(*qk))
    tokens_of(backbone, images).sum().backward()
    assert not calls
    backbone.encode(images, attention=(1,))
    assert len(calls) == 1

def test_gradients_of_fused_attention_are_those_of_written_out_attention(frozen, images):
    backbone = unfreeze(frozen, (-1,))
    weights = list(backbone.blocks[-1].parameters())
    direction = torch.randn(2, 48, 4, 6)
    fused = torch.autograd.grad((tokens_of(backbone, images) * direction).sum(), weights)
    found = backbone.encode(images, tokens=(-2,), joint=False, last_input=True)
    block, x = backbone.blocks[-1], found.last_residual
    by_hand = backbone.last_block(block.ln_1(x), x)[:, 1:].mT.unflatten(2, (4, 6))
    written_out = torch.autograd.grad((by_hand * direction).sum(), weights)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(fused, written_out, strict=True))

def test_it_stays_in_eval_mode_and_one_picture_does_not_depend_on_its_batch(frozen, images):
    backbone = unfreeze(little(patch_dropout=0.5))
    torch.nn.Sequential(backbone).train()
    assert not any(module.training for module in backbone.modules())
    assert torch.allclose(tokens_of(backbone, images)[:1], tokens_of(backbone, images[:1]), atol=1e-5)

def test_activation_maps_do_not_touch_the_gradients_of_the_weights(frozen, images):
    backbone = unfreeze(frozen)
    features = backbone.encode(images)
    text = backbone.encode_text(WORDS, ["{}"])
    cam = grad_cam(backbone, features, text, torch.ones(2, 3, dtype=torch.bool))
    assert all(p.grad is None for p in backbone.parameters())
    assert torch.allclose(cam.detach(), grad_cam(frozen, frozen.encode(images), text, torch.ones(2, 3, dtype=torch.bool)), atol=1e-5)

def test_only_what_learns_is_saved_and_it_comes_back(frozen, images):
    backbone = unfreeze(frozen, (-1,))
    with torch.no_grad():
        for p in backbone.blocks[-1].parameters(): p.add_(0.1)
    state = {name: value.clone() for name, value in backbone.trainable_state().items()}
    assert state.keys() == learning(backbone) and not any(value.requires_grad for value in state.values())
    again = unfreeze(frozen, **json.loads(json.dumps(backbone.unfrozen)))
    again.load_trainable(state)
    assert torch.equal(tokens_of(again, images), tokens_of(backbone, images)) and learning(again) == learning(backbone)
    with pytest.raises(InputError, match="Unfreeze the same blocks"): unfreeze(frozen, (0,)).load_trainable(state)
    with pytest.raises(InputError, match="does not fit"): again.load_trainable({name: value[:1] for name, value in state.items()})

@pytest.mark.parametrize("options", [{"blocks": "all"}, {"blocks": "all", "embedding": False}, {"blocks": (0, -1)},
                                     {"blocks": (), "projection": True}, {"blocks": (1,), "embedding": True}])
def test_the_choice_survives_json(frozen, options):
    backbone = unfreeze(frozen, **options)
    assert learning(unfreeze(frozen, **json.loads(json.dumps(backbone.unfrozen)))) == learning(backbone)

def test_it_survives_pickling_and_copies_of_copies(frozen, images):
    backbone = unfreeze(frozen, (-1,))
    again = pickle.loads(pickle.dumps(backbone))
    assert isinstance(again, TrainableBackbone) and learning(again) == learning(backbone)
    assert torch.equal(tokens_of(again, images), tokens_of(backbone, images))
    other = unfreeze(backbone, (0,))   # what the source could learn is no concern of the copy
    assert {name.split(".")[3] for name in learning(other)} == {"0"} and "learning: blocks [0]" in repr(other)

def test_sine_cosine_positions_stay_constants():
    table = little(pos_embed_type="sin_cos_2d")
    assert not positions_are_weights(table.model.visual) and positions_are_weights(little().model.visual)
    assert positions_are_weights(little(image_size=(32, 48)).model.visual)
    names = learning(unfreeze(table))
    assert "visual.conv1.weight" in names and "visual.positional_embedding" not in names

def test_bf16_autocast_gives_finite_gradients(frozen, images):
    backbone = unfreeze(frozen)
    with torch.autocast("cpu", dtype=torch.bfloat16): loss = tokens_of(backbone, images).float().square().mean()
    loss.backward()
    assert with_gradient(backbone) == learning(backbone)
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in backbone.parameters() if p.grad is not None)

def test_mistakes_are_named(frozen):
    with pytest.raises(InputError, match="'all' or block indices"): unfreeze(frozen, "last")
    with pytest.raises(InputError, match=r"blocks 0..2"): unfreeze(frozen, (3,))
    with pytest.raises(InputError, match="nothing would learn"): unfreeze(frozen, ())
