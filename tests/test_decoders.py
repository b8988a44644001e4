"""The decoder room: the published sizes, equal to a plain reference with the same weights, any grid, any precision."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from freqseg.clip import load_clip
from freqseg.decoders import (
    BlockFusion, BlockLinear, DecoderBlock, DualHead, TransformerDecoder, decoder_blocks, pass_through, token_affinity, wtclip_decoder,
)
from freqseg.files import InputError

KINDS = {"WeCLIP": TransformerDecoder, "WTCLIP": wtclip_decoder}
kinds = pytest.mark.parametrize("kind", KINDS)


def trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def random_tokens(blocks: int, batch: int, width: int, height: int, breadth: int, dtype=torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(height * breadth)
    return list(torch.randn(blocks, batch, width, height, breadth, generator=generator, dtype=dtype))


def small_decoder(kind: str, blocks: int = 3, width: int = 12, classes: int = 5, **options) -> TransformerDecoder:
    "Small, with every parameter off its start: zero biases would hide mistakes."
    decoder = KINDS[kind](width, blocks, classes, **{"dim": 16, "layers": 2, "heads": 4} | options)
    with torch.no_grad():
        for parameter in decoder.parameters(): parameter.add_(0.1 * torch.randn_like(parameter))
    return decoder.eval()


class ReferenceBlock(nn.Module):
    "CLIP's residual block on torch's own attention."

    def __init__(self, block: DecoderBlock, pre_norm: bool = True) -> None:
        super().__init__()
        dim = block.out.out_features
        self.attention = nn.MultiheadAttention(dim, block.heads, batch_first=True)
        with torch.no_grad():
            self.attention.in_proj_weight.copy_(block.qkv.weight)
            self.attention.in_proj_bias.copy_(block.qkv.bias)
        self.attention.out_proj.load_state_dict(block.out.state_dict())
        self.norm_1, self.norm_2 = copy.deepcopy(block.norm_1), copy.deepcopy(block.norm_2)
        self.widen, self.narrow = copy.deepcopy(block.mlp[0]), copy.deepcopy(block.mlp[2])
        self.pre_norm = pre_norm

    def attend(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=True)[0]

    def mlp(self, x: Tensor) -> Tensor:
        y = self.widen(x)
        return self.narrow(y * torch.sigmoid(1.702 * y))

    def forward(self, x: Tensor) -> Tensor:
        if self.pre_norm:
            x = x + self.attend(self.norm_1(x))
            return x + self.mlp(self.norm_2(x))
        x = self.norm_1(x + self.attend(x))
        return self.norm_2(x + self.mlp(x))


class Reference(nn.Module):
    "The decoder as the paper draws it: one nn.Sequential per block, concatenation, 1x1 convolutions."

    def __init__(self, decoder: TransformerDecoder, pre_norm: bool = True) -> None:
        super().__init__()
        fusion = decoder.fusion
        blocks, dim, width = fusion.inner.weight.shape
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(width, dim), nn.ReLU(), nn.Linear(dim, dim)) for _ in range(blocks))
        self.fuse = nn.Conv2d(blocks * dim, dim, 1)
        self.gate = None if fusion.gate is None else nn.Conv2d(blocks * dim, 1, 1)
        self.layers = nn.Sequential(*(ReferenceBlock(block, pre_norm) for block in decoder.layers))
        self.refine, self.classifier = copy.deepcopy(decoder.refine), copy.deepcopy(decoder.classifier)
        self.copy_fusion(fusion)

    @torch.no_grad()
    def copy_fusion(self, fusion: BlockFusion) -> None:
        for index, mlp in enumerate(self.mlps):
            for layer, stacked in ((mlp[0], fusion.inner), (mlp[2], fusion.outer)):
                layer.weight.copy_(stacked.weight[index])
                layer.bias.copy_(stacked.bias[index])
        for conv, linear in ((self.fuse, fusion.fuse), (self.gate, fusion.gate)):
            if conv is not None:
                conv.weight.copy_(linear.weight[:, :, None, None])
                conv.bias.copy_(linear.bias)

    def forward(self, tokens: list[Tensor]) -> tuple[Tensor, Tensor]:
        maps = [mlp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for mlp, x in zip(self.mlps, tokens, strict=True)]
        stacked = torch.cat(maps, 1)
        if self.gate is not None:
            stacked = stacked * torch.sigmoid(self.gate(stacked))
        features = self.fuse(stacked)
        x = self.layers(features.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(features.shape)
        return features, self.classifier(self.refine(x))


# ---- sizes ----------------------------------------------------------------------------------------------------------

def test_weclip_has_the_published_number_of_parameters() -> None:
    assert trainable(TransformerDecoder(768, 11, 21)) == 5_985_045


def test_wtclip_has_the_published_number_once_fixed_taps_are_counted_per_channel() -> None:
    decoder = wtclip_decoder(768, 11, 21)
    taps_as_published = 2 * (4 * 256) * 2 * 2  # analysis and synthesis kernels of 1,024 sub-band channels
    assert trainable(decoder) == 6_066_454 == sum(p.numel() for p in decoder.state_dict().values())
    assert trainable(decoder) + taps_as_published == 6_074_646


@pytest.mark.parametrize(("wavelet", "taps"), [("haar", 8), ("db2", 16), ("bior2.2", 24)])
def test_learned_filters_add_four_shared_filters(wavelet: str, taps: int) -> None:
    fixed, learned = (wtclip_decoder(8, 2, 3, dim=8, wavelet=wavelet, learn_filters=learn) for learn in (False, True))
    assert trainable(learned) - trainable(fixed) == taps
    assert learned.refine.reconstruction_penalty() < 1e-8


def test_another_level_adds_its_sub_band_kernels_and_scales_only() -> None:
    one, two = (trainable(wtclip_decoder(8, 2, 3, dim=8, levels=levels)) for levels in (1, 2))
    assert two - one == 4 * 8 * 9 + 4 * 8


def test_decoders_read_all_blocks_but_the_last() -> None:
    assert decoder_blocks(12) == tuple(range(11))
    with pytest.raises(InputError, match="at least 2"):
        decoder_blocks(1)


# ---- equal to the reference -----------------------------------------------------------------------------------------

@settings(max_examples=25)
@given(kind=st.sampled_from(list(KINDS)), blocks=st.integers(1, 5), width=st.integers(1, 20), height=st.integers(1, 9),
       breadth=st.integers(1, 9), gate=st.booleans(), pre_norm=st.booleans())
def test_decoders_equal_the_plain_reference_with_the_same_weights(kind, blocks, width, height, breadth, gate, pre_norm) -> None:
    decoder = small_decoder(kind, blocks, width, gate=gate, pre_norm=pre_norm).double()
    tokens = random_tokens(blocks, 2, width, height, breadth, torch.float64)
    features, logits = Reference(decoder, pre_norm).double()(tokens)
    decoded = decoder(tokens)
    torch.testing.assert_close(decoded.features, features)
    torch.testing.assert_close(decoded.logits, logits)
    assert decoded.high_logits is None


@kinds
def test_gradients_equal_those_of_the_reference(kind: str) -> None:
    decoder = small_decoder(kind).double()
    reference, tokens = Reference(decoder).double(), random_tokens(3, 2, 12, 5, 4, torch.float64)
    decoder(tokens).logits.square().sum().backward()
    reference(tokens)[1].square().sum().backward()
    fusion = decoder.fusion
    for index, mlp in enumerate(reference.mlps):
        for layer, stacked in ((mlp[0], fusion.inner), (mlp[2], fusion.outer)):
            torch.testing.assert_close(stacked.weight.grad[index], layer.weight.grad)
            torch.testing.assert_close(stacked.bias.grad[index], layer.bias.grad)
    torch.testing.assert_close(fusion.fuse.weight.grad, reference.fuse.weight.grad[:, :, 0, 0])
    if fusion.gate is not None:
        torch.testing.assert_close(fusion.gate.weight.grad, reference.gate.weight.grad[:, :, 0, 0])
        torch.testing.assert_close(fusion.gate.bias.grad, reference.gate.bias.grad)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in decoder.parameters())


def test_the_fusion_has_right_gradients_to_tokens_and_weights() -> None:
    fusion, tokens = BlockFusion(3, 2, dim=4, gate=True).double(), random_tokens(2, 1, 3, 2, 2, torch.float64)
    names, values = zip(*fusion.named_parameters(), strict=True)
    run = lambda *given: torch.func.functional_call(fusion, dict(zip(names, given[2:], strict=True)), (given[:2],))  # noqa: E731
    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in tokens] + [v.detach().requires_grad_() for v in values])


def test_block_layers_start_like_as_many_linear_layers() -> None:
    torch.manual_seed(0)
    layer, plain = BlockLinear(6, 64, 32), nn.Linear(64, 6 * 32)
    for name in ("weight", "bias"):
        ours, theirs = getattr(layer, name), getattr(plain, name)
        assert ours.abs().max() <= 64**-0.5 and ours.numel() == theirs.numel()
        torch.testing.assert_close(ours.std(), theirs.std(), rtol=0.1, atol=0)


def test_attention_starts_like_that_of_torch() -> None:
    block, plain = DecoderBlock(64, 8), nn.MultiheadAttention(64, 8)
    torch.testing.assert_close(block.qkv.weight.std(), plain.in_proj_weight.std(), rtol=0.05, atol=0)
    torch.testing.assert_close(block.out.weight.std(), plain.out_proj.weight.std(), rtol=0.1, atol=0)
    assert not block.qkv.bias.any() and not block.out.bias.any()


# ---- what the parts do ----------------------------------------------------------------------------------------------

def test_an_open_gate_changes_nothing_and_a_shut_one_leaves_the_bias() -> None:
    gated, tokens = BlockFusion(6, 3, dim=8, gate=True), random_tokens(3, 2, 6, 4, 5)
    plain = BlockFusion(6, 3, dim=8)
    plain.load_state_dict({name: value for name, value in gated.state_dict().items() if not name.startswith("gate")})
    nn.init.zeros_(gated.gate.weight)
    nn.init.constant_(gated.gate.bias, 40.0)
    torch.testing.assert_close(gated(tokens), plain(tokens))
    nn.init.constant_(gated.gate.bias, -200.0)
    torch.testing.assert_close(gated(tokens), gated.fuse.bias[:, None, None].expand(2, 8, 4, 5))


def test_the_gate_is_one_number_per_patch() -> None:
    gated, tokens = BlockFusion(6, 3, dim=8, gate=True), random_tokens(3, 1, 6, 4, 5)
    plain = BlockFusion(6, 3, dim=8)
    plain.load_state_dict({name: value for name, value in gated.state_dict().items() if not name.startswith("gate")})
    bias = gated.fuse.bias[:, None, None]
    ratio = (gated(tokens) - bias) / (plain(tokens) - bias)
    torch.testing.assert_close(ratio, ratio.mean(1, keepdim=True).expand_as(ratio), rtol=1e-3, atol=1e-4)
    assert ratio.min() > 0 and ratio.max() < 1


def test_dropout_drops_whole_channels_of_the_fused_map_in_training_only() -> None:
    decoder, tokens = small_decoder("WeCLIP", dropout=0.5), random_tokens(3, 4, 12, 5, 5)
    still = decoder(tokens)
    torch.testing.assert_close(decoder(tokens).logits, still.logits)
    dropped = decoder.train()(tokens).features
    gone = (dropped == 0).flatten(2)
    assert torch.equal(gone.all(-1), gone.any(-1)) and 0.2 < gone.all(-1).float().mean() < 0.8
    torch.testing.assert_close(dropped, torch.where(gone.all(-1)[..., None, None], 0, 2 * still.features))


def test_weclip_treats_patches_as_a_set_and_wtclip_does_not() -> None:
    tokens, order = random_tokens(3, 1, 12, 4, 6), torch.randperm(24)
    shuffle = lambda x: x.flatten(2)[..., order].view_as(x)  # noqa: E731
    for kind, alike in (("WeCLIP", True), ("WTCLIP", False)):
        decoder = small_decoder(kind)
        same = torch.allclose(decoder([shuffle(x) for x in tokens]).logits, shuffle(decoder(tokens).logits), atol=1e-4)
        assert same is alike


def test_pictures_of_a_batch_do_not_see_each_other() -> None:
    decoder, tokens = small_decoder("WTCLIP"), random_tokens(3, 3, 12, 5, 6)
    alone = [decoder([x[index:index + 1] for x in tokens]).logits for index in range(3)]
    torch.testing.assert_close(decoder(tokens).logits, torch.cat(alone), rtol=1e-4, atol=1e-5)


@settings(max_examples=20)
@given(height=st.integers(1, 11), breadth=st.integers(1, 11), levels=st.integers(1, 2), learn=st.booleans(),
       wavelet=st.sampled_from(["haar", "db2", "bior2.2"]))
def test_any_grid_any_wavelet_and_either_depth_work(height, breadth, levels, learn, wavelet) -> None:
    decoder = small_decoder("WTCLIP", levels=levels, wavelet=wavelet, learn_filters=learn)
    decoded = decoder(random_tokens(3, 2, 12, height, breadth))
    assert decoded.features.shape == (2, 16, height, breadth) and decoded.logits.shape == (2, 5, height, breadth)
    assert decoded.logits.isfinite().all()


@pytest.mark.parametrize(("given", "message"), [
    ([(1, 12, 4, 4)] * 2, "3 token maps"), ([(1, 11, 4, 4)] * 3, "12"), ([(1, 12, 16)] * 3, "12"),
    ([(1, 12, 4, 4)] * 2 + [(1, 12, 4, 5)], "4, 5"),
])
def test_tokens_that_do_not_fit_are_refused_with_their_shapes(given: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        small_decoder("WeCLIP")([torch.zeros(shape) for shape in given])


@pytest.mark.parametrize("options", [{"heads": 3}, {"levels": 0}, {"wavelet": "harr"}, {"classes": 0}])
def test_decoders_that_cannot_be_built_are_refused(options: dict) -> None:
    with pytest.raises(InputError):
        small_decoder("WTCLIP", **options)


# ---- precision, compilation, checkpoints ----------------------------------------------------------------------------

@kinds
def test_bfloat16_autocast_stays_close_and_trains_every_parameter(kind: str) -> None:
    decoder, tokens = small_decoder(kind), random_tokens(3, 2, 12, 7, 6)
    exact = decoder(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        decoded = decoder(tokens)
    assert decoded.features.dtype == torch.float32
    for ours, theirs in ((decoded.features, exact.features), (decoded.logits, exact.logits)):
        assert (ours - theirs).norm() < 0.03 * theirs.norm()
    decoded.logits.float().square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in decoder.parameters())


@kinds
def test_the_decoder_compiles_into_one_graph(kind: str) -> None:
    decoder, tokens = small_decoder(kind, levels=2) if kind == "WTCLIP" else small_decoder(kind), random_tokens(3, 2, 12, 6, 5)
    compiled = torch.compile(decoder, backend="eager", fullgraph=True)(tokens)
    torch.testing.assert_close(compiled.logits, decoder(tokens).logits)


@kinds
def test_a_state_dict_rebuilds_the_decoder_and_holds_parameters_only(kind: str) -> None:
    decoder, tokens = small_decoder(kind), random_tokens(3, 1, 12, 4, 4)
    fresh = KINDS[kind](12, 3, 5, dim=16, layers=2, heads=4).eval()
    fresh.load_state_dict(decoder.state_dict())
    assert torch.equal(fresh(tokens).logits, decoder(tokens).logits)
    assert set(decoder.state_dict()) == {name for name, _ in decoder.named_parameters()}


def test_the_tokens_of_the_embedded_clip_go_in_as_they_come() -> None:
    clip = load_clip("world")
    blocks = decoder_blocks(clip.depth)
    with torch.no_grad():
        found = clip.encode(torch.zeros(2, 3, 7 * clip.patch_size, 5 * clip.patch_size), tokens=blocks, joint=False)
    for build in KINDS.values():
        decoded = build(clip.width, len(blocks), 21)([found.tokens[index] for index in blocks])
        assert len(blocks) == 5 and decoded.logits.shape == (2, 21, 7, 5)
        decoded.logits.sum().backward()
    assert all(p.grad is None for p in clip.parameters())


@pytest.mark.cuda
def test_decoders_run_on_a_device_in_bfloat16() -> None:
    tokens = [x.cuda() for x in random_tokens(3, 2, 12, 7, 6)]
    for kind in KINDS:
        decoder = small_decoder(kind).cuda()
        with torch.autocast("cuda", torch.bfloat16):
            decoded = decoder(tokens)
        assert (decoded.logits - decoder(tokens).logits).norm() < 0.03 * decoded.logits.norm()


# ---- token affinity -------------------------------------------------------------------------------------------------

def test_the_affinity_equals_its_equation_pair_by_pair() -> None:
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    affinity, cosines = token_affinity(x), token_affinity(x, normalise=True)
    flat = x.flatten(2)
    for b, i, j in itertools.product(range(2), range(12), range(12)):
        dot = flat[b, :, i] @ flat[b, :, j]
        torch.testing.assert_close(affinity[b, i, j], torch.sigmoid(dot))
        torch.testing.assert_close(cosines[b, i, j], torch.sigmoid(dot / flat[b, :, i].norm() / flat[b, :, j].norm()))
    assert affinity.dtype == torch.float64 and torch.equal(affinity, affinity.mT)


def test_normalised_affinities_ignore_length_and_stay_between_two_sigmoids() -> None:
    x = torch.randn(2, 8, 4, 4)
    affinity = token_affinity(x, normalise=True)
    torch.testing.assert_close(token_affinity(7 * x, normalise=True), affinity)
    assert affinity.min() >= torch.sigmoid(torch.tensor(-1.0001)) and affinity.max() <= torch.sigmoid(torch.tensor(1.0001))


def test_affinities_are_float32_under_autocast_and_finite_for_large_features() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        affinity = token_affinity(1e4 * torch.randn(1, 8, 4, 4))
    assert affinity.dtype == torch.float32 and affinity.isfinite().all()


# ---- FFR's head -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("convolutions", [1, 2])
def test_the_two_heads_share_the_convolution_and_nothing_else(convolutions: int) -> None:
    head, x, high = DualHead(6, 4, hidden=8, convolutions=convolutions), torch.randn(2, 6, 9, 8), torch.randn(2, 6, 9, 8)
    both = head(x, high)
    torch.testing.assert_close(both.logits, head(x).logits)
    torch.testing.assert_close(both.high_logits, head.high_classifier(head(high).features))
    assert head(x).high_logits is None and both.features.shape == (2, 8, 9, 8)
    both.high_logits.sum().backward()
    assert head.shared[0].weight.grad.any() and head.classifier.weight.grad is None
    assert trainable(head) == (6 * 8 * 9 + 8) + (convolutions - 1) * (8 * 8 * 9 + 8) + 2 * (8 * 4 + 4)


def test_the_dilated_kernel_looks_as_many_patches_away_as_told() -> None:
    head, x = DualHead(3, 2, hidden=16, dilation=4), torch.zeros(1, 3, 11, 11)
    touched = x.clone()
    touched[0, :, 5, 5] = 5
    changed = (head(touched).logits - head(x).logits).abs().sum(1)[0] > 1e-6
    reach = torch.zeros(11, 11, dtype=torch.bool)
    reach[1::4, 1::4] = True
    assert torch.equal(changed, reach)


def test_a_convolution_near_the_identity_and_a_relu_lose_nothing() -> None:
    conv, x = torch.nn.Conv2d(3, 7, 3, padding=2, dilation=2), torch.randn(2, 3, 8, 9)
    before = conv.weight.detach().clone()
    pass_through(conv)
    handed = torch.zeros_like(conv.weight)
    for channel in range(3): handed[channel, channel, 1, 1], handed[channel + 3, channel, 1, 1] = 1, -1
    torch.testing.assert_close(conv.weight.detach(), before / 3 + handed)
    with torch.no_grad(): conv.weight.copy_(handed)
    passed = conv(x).relu()
    torch.testing.assert_close(passed[:, :3] - passed[:, 3:6], x)
    for narrow in (1, 4):   # fewer outputs than twice the inputs: as many as there are
        pass_through(conv := torch.nn.Conv2d(3, narrow, 3))
        assert conv.weight.abs().amax((1, 2, 3)).min() > .6
    with pytest.raises(InputError, match="start='zero'"): DualHead(3, 2, start="zero")


def test_a_dual_head_refuses_maps_that_differ_and_too_few_convolutions() -> None:
    with pytest.raises(InputError, match="do not fit"):
        DualHead(3, 2, hidden=4)(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 5))
    with pytest.raises(InputError, match="at least one"):
        DualHead(3, 2, convolutions=0)


def test_a_linear_decoder_is_the_special_case_without_layers() -> None:
    decoder, tokens = small_decoder("WeCLIP", layers=0), random_tokens(3, 1, 12, 4, 4)
    decoded = decoder(tokens)
    torch.testing.assert_close(decoded.logits, F.conv2d(decoded.features, decoder.classifier.weight, decoder.classifier.bias))
