"""The decoder room: the published sizes, equal to a plain reference with the same weights, any grid, any precision; masks by name never mix."""

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
    BlockFusion, BlockLinear, CrossAttention, CrossAttentionDecoder, DecoderBlock, DualHead, PooledAttention, QueryUpdate, RelationshipDescriptor,
    SpectralGuidedDecoder, SpectralGuidedLayer, TransformerDecoder, WindowAttention, decoder_blocks, pass_through, token_affinity,
    window_merge, window_partition, wtclip_decoder,
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


# ---- masks by name: sizes and starts --------------------------------------------------------------------------------

ASKING = {"ZegCLIP": CrossAttentionDecoder, "SPT-SEG": SpectralGuidedDecoder}
VARIANTS = [("ZegCLIP", {}), ("ZegCLIP", {"layers": 1}), ("SPT-SEG", {}), ("SPT-SEG", {"reads": "previous", "high_heads": 2}),
            ("SPT-SEG", {"similarity": "clamp", "mask_padding": False}), ("SPT-SEG", {"high_heads": 0}), ("SPT-SEG", {"high_heads": 4, "layers": 1})]
asking = pytest.mark.parametrize(("kind", "options"), VARIANTS)


def move_off_start(module: nn.Module, amount: float = 0.2) -> nn.Module:
    "Zero biases and small weights would hide mistakes."
    with torch.no_grad():
        for parameter in module.parameters(): parameter.add_(amount * torch.randn_like(parameter))
    return module


def asking_decoder(kind: str, dim: int = 16, **options) -> nn.Module:
    decoder = move_off_start(ASKING[kind](dim, **{"layers": 2, "heads": 4, "hidden": 24} | options)).eval()
    for layer in decoder.layers if options.get("similarity") == "clamp" else ():  # half of all xi would silence it
        layer.task.data.copy_(torch.cat([branch.out.bias for branch in (layer.high, layer.low) if branch is not None]))
    return decoder


def random_question(dim: int = 16, batch: int = 2, classes: int = 5, grid: tuple[int, int] = (5, 7), dtype=torch.float32) -> tuple[Tensor, Tensor]:
    "Queries and patches of unit norm that share a direction, as CLIP's do."
    queries, patches = torch.randn(batch, classes, dim, dtype=dtype), torch.randn(batch, dim, *grid, dtype=dtype) + 2 * torch.randn(1, dim, 1, 1, dtype=dtype)
    return queries, F.normalize(patches, dim=1)


def linear(inputs: int, outputs: int, bias: bool = True) -> int:
    return inputs * outputs + bias * outputs


def test_zegclip_has_the_published_number_of_parameters_once_what_it_never_uses_is_counted() -> None:
    attention, norm, mlp = 4 * linear(512, 512), 2 * 512, linear(512, 2048) + linear(2048, 512)
    published = CrossAttentionDecoder(self_attention=True, whole_last=True)
    head = linear(1024, 512)
    assert trainable(published) == 12_612_096 == 3 * (2 * attention + 3 * norm + mlp)
    assert trainable(CrossAttentionDecoder(whole_last=True)) == 9_457_152 == 3 * (attention + 2 * norm + mlp)
    assert trainable(CrossAttentionDecoder()) == 6_830_080 == 9_457_152 - (2 * linear(512, 512) + 2 * norm + mlp)
    assert trainable(RelationshipDescriptor(512)) == head
    for prompts, whole in ((10, 13_821_184), (100, 14_650_624)):
        assert trainable(published) + head + 12 * prompts * 768 + linear(768, 768) + 2 * 768 == whole


def test_the_spectral_decoder_has_the_parameters_of_its_parts() -> None:
    high = linear(512, 3 * 64, bias=False) + linear(64, 64)
    low = 3 * linear(512, 448, bias=False) + linear(448, 448)
    update = linear(512, 512) + linear(512, 2048) + linear(2048, 512) + 4 * 512
    assert trainable(SpectralGuidedDecoder()) == 3 * (high + low + 512 + 512 * 512) + 2 * update == 8_492_032


@pytest.mark.parametrize("kind", ASKING)
def test_linear_layers_start_small_with_zero_biases_norms_and_p_as_identities(kind: str) -> None:
    torch.manual_seed(0)
    whole = nn.Sequential(ASKING[kind](256, heads=4), RelationshipDescriptor(256))
    for module in whole.modules():
        if isinstance(module, nn.Linear):
            torch.testing.assert_close(module.weight.std().item(), 0.02, rtol=0.05, atol=0)
            assert module.bias is None or not module.bias.any()
        if isinstance(module, nn.LayerNorm): assert (module.weight == 1).all() and not module.bias.any()
        if isinstance(module, SpectralGuidedLayer):
            assert torch.equal(module.transform.detach(), torch.eye(256)) and 0.85 < module.task.std() < 1.15


def test_the_descriptor_equals_its_equation_class_by_class() -> None:
    describe = move_off_start(RelationshipDescriptor(6))
    text, cls = torch.randn(4, 6), torch.randn(3, 6)
    queries = describe(text, cls)
    assert queries.shape == (3, 4, 6)
    for b, c in itertools.product(range(3), range(4)):
        expected = describe.linear.weight @ torch.cat([cls[b] * text[c], text[c]]) + describe.linear.bias
        torch.testing.assert_close(queries[b, c], expected, rtol=1e-4, atol=1e-5)
    for wrong in ((torch.zeros(4, 5), cls), (text, torch.zeros(3, 7))):
        with pytest.raises(InputError, match="reads 6 channels"): describe(*wrong)


# ---- masks by name: equal to references -----------------------------------------------------------------------------

def torch_attention(attention: CrossAttention) -> nn.MultiheadAttention:
    "The same attention as torch's own module."
    theirs = nn.MultiheadAttention(attention.query.in_features, attention.heads, batch_first=True).to(attention.query.weight.dtype).eval()
    parts = (attention.query, attention.key, attention.value)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        theirs.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
    theirs.out_proj.load_state_dict(attention.out.state_dict())
    return theirs


def torch_layer(layer, hidden: int) -> nn.TransformerDecoderLayer:
    "A layer with self-attention as torch's own decoder layer."
    dim = layer.attention.query.in_features
    theirs = nn.TransformerDecoderLayer(dim, layer.attention.heads, hidden, batch_first=True).to(layer.attention.query.weight.dtype).eval()
    theirs.self_attn, theirs.multihead_attn = torch_attention(layer.among), torch_attention(layer.attention)
    pairs = ((theirs.norm1, layer.among_norm), (theirs.norm2, layer.update.norm_1), (theirs.norm3, layer.update.norm_2),
             (theirs.linear1, layer.update.mlp[0]), (theirs.linear2, layer.update.mlp[3]))
    for part, ours in pairs: part.load_state_dict(ours.state_dict())
    return theirs


def looped_scores(attention: CrossAttention, queries: Tensor, tokens: Tensor) -> Tensor:
    "Head by head, then the mean."
    query, key = attention.query(queries), attention.key(tokens)
    d = query.shape[-1] // attention.heads
    heads = [query[..., h * d:(h + 1) * d] @ key[..., h * d:(h + 1) * d].transpose(1, 2) / d**0.5 for h in range(attention.heads)]
    return sum(heads) / len(heads)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("layers", [1, 3])
def test_zegclip_with_self_attention_equals_torchs_decoder_layers(heads: int, layers: int) -> None:
    decoder = asking_decoder("ZegCLIP", layers=layers, heads=heads, self_attention=True, whole_last=True).double()
    queries, patches = random_question(dtype=torch.float64)
    answer, tokens = queries, patches.flatten(2).transpose(1, 2)
    for layer in decoder.layers[:-1]: answer = torch_layer(layer, 24)(answer, tokens)
    last = decoder.layers[-1]
    among = torch_attention(last.among)
    answer = last.among_norm(answer + among(answer, answer, answer, need_weights=True)[0])
    torch.testing.assert_close(decoder(queries, patches), looped_scores(last.attention, answer, tokens).reshape(2, 5, 5, 7))


@pytest.mark.parametrize("layers", [1, 3])
def test_zegclip_without_self_attention_equals_torchs_attention_and_post_norms(layers: int) -> None:
    decoder = asking_decoder("ZegCLIP", layers=layers).double()
    queries, patches = random_question(dtype=torch.float64)
    answer, tokens = queries, patches.flatten(2).transpose(1, 2)
    for layer in decoder.layers[:-1]:
        update = layer.update
        answer = update.norm_1(answer + torch_attention(layer.attention)(answer, tokens, tokens, need_weights=True)[0])
        answer = update.norm_2(answer + update.mlp[3](update.mlp[0](answer).clamp_min(0)))
    torch.testing.assert_close(decoder(queries, patches), looped_scores(decoder.layers[-1].attention, answer, tokens).reshape(2, 5, 5, 7))


@pytest.mark.parametrize("self_attention", [False, True])
def test_the_rest_of_the_last_layer_changes_no_mask(self_attention: bool) -> None:
    lean, whole = (asking_decoder("ZegCLIP", self_attention=self_attention, whole_last=flag) for flag in (False, True))
    unused = whole.load_state_dict(lean.state_dict(), strict=False).missing_keys
    assert unused and all(name.startswith(("layers.1.attention.value", "layers.1.attention.out", "layers.1.update")) for name in unused)
    queries, patches = random_question()
    assert torch.equal(lean(queries, patches), whole(queries, patches))
    whole(queries, patches).square().sum().backward()
    assert {name for name, p in whole.named_parameters() if p.grad is None} == set(unused)


def test_scores_are_written_down_once_and_earlier_layers_are_fused(monkeypatch) -> None:
    decoder, calls = asking_decoder("ZegCLIP", layers=4), {"scores": 0, "fused": 0}
    scores, fused = CrossAttention.scores, F.scaled_dot_product_attention
    monkeypatch.setattr(CrossAttention, "scores", lambda *given: calls.update(scores=calls["scores"] + 1) or scores(*given))
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *given, **o: calls.update(fused=calls["fused"] + 1) or fused(*given, **o))
    decoder(*random_question())
    assert calls == {"scores": 1, "fused": 3}


def looped_windows(branch: WindowAttention, patches: Tensor) -> Tensor:
    "The high branch window by window, head by head, with padding built by hand."
    dim, (h, w), s = patches.shape[1], patches.shape[2:], branch.window
    width = branch.out.in_features
    d, found = width // branch.heads, torch.zeros(len(patches), h, w, width, dtype=patches.dtype)
    for b, top, left in itertools.product(range(len(patches)), range(0, h, s), range(0, w, s)):
        places = [(i, j) for i in range(top, top + s) for j in range(left, left + s)]
        inside = [i < h and j < w for i, j in places]
        x = torch.stack([patches[b, :, i, j] if real else patches.new_zeros(dim) for (i, j), real in zip(places, inside, strict=True)])
        query, key, value = (x @ part.T for part in branch.query_key_value.weight.split(width))
        keep = torch.tensor(inside) if branch.mask_padding else torch.ones(s * s, dtype=torch.bool)
        heads = []
        for at in range(0, width, d):
            scores = query[:, at:at + d] @ key[keep, at:at + d].T / d**0.5
            heads.append(scores.softmax(-1) @ value[keep, at:at + d])
        answer = torch.cat(heads, -1)
        for (i, j), real, row in zip(places, inside, answer, strict=True):
            if real: found[b, i, j] = row
    return branch.out(found).flatten(1, 2)


def looped_means(branch: PooledAttention, patches: Tensor, mask_padding: bool) -> Tensor:
    "The low branch head by head, with means taken by hand."
    (h, w), s, width = patches.shape[2:], branch.window, branch.out.in_features
    means = []
    for top, left in itertools.product(range(0, h, s), range(0, w, s)):
        cells = patches[:, :, top:top + s, left:left + s].flatten(2)
        means.append(cells.sum(-1) / (cells.shape[-1] if mask_padding else s * s))
    means, d = torch.stack(means, 1), width // branch.heads
    query, (key, value) = branch.query(patches.flatten(2).transpose(1, 2)), (means @ part.T for part in branch.key_value.weight.split(width))
    parts = [slice(at, at + d) for at in range(0, width, d)]
    heads = [(query[..., p] @ key[..., p].transpose(1, 2) / d**0.5).softmax(-1) @ value[..., p] for p in parts]
    return branch.out(torch.cat(heads, -1))


@settings(max_examples=20)
@given(height=st.integers(1, 7), breadth=st.integers(1, 7), window=st.integers(1, 4), high_heads=st.integers(0, 4), mask_padding=st.booleans(),
       similarity=st.sampled_from(["shifted", "clamp"]))
def test_the_spectral_layer_equals_loops_over_windows_heads_and_patches(height, breadth, window, high_heads, mask_padding, similarity) -> None:
    layer = SpectralGuidedLayer(8, 4, high_heads, window, mask_padding, similarity, hidden=12)
    layer = move_off_start(layer, 0.5).double().eval()
    queries, patches = random_question(8, 2, 3, (height, breadth), torch.float64)
    parts = [looped_windows(layer.high, patches)] if high_heads else []
    if high_heads < 4: parts.append(looped_means(layer.low, patches, mask_padding))
    z = torch.cat(parts, -1)
    torch.testing.assert_close(layer.branches(patches), z)
    expected, task = torch.empty_like(z), layer.task
    for b, n in itertools.product(range(2), range(height * breadth)):
        cosine = z[b, n] @ task / (z[b, n].norm() * task.norm())
        kept = (1 + cosine) / 2 if similarity == "shifted" else max(cosine, cosine * 0)
        expected[b, n] = layer.transform @ (kept * z[b, n])
    filtered = layer(patches)
    torch.testing.assert_close(filtered, expected.transpose(1, 2).reshape(2, 8, height, breadth))
    weights = (queries @ expected.transpose(1, 2)).softmax(-1)
    update = layer.update
    answer = update.norm_1(queries + layer.out(weights @ expected))
    answer = update.norm_2(answer + update.mlp[3](update.mlp[0](answer).clamp_min(0)))
    torch.testing.assert_close(layer.read(queries, filtered), answer)


@pytest.mark.parametrize("reads", ["tower", "previous"])
def test_the_spectral_decoder_is_its_layers_in_a_row(reads: str) -> None:
    decoder = asking_decoder("SPT-SEG", layers=3, reads=reads).double()
    queries, patches = random_question(dtype=torch.float64)
    first, second, third = decoder.layers
    one = first(patches)
    two = second(patches if reads == "tower" else one)
    three = third(patches if reads == "tower" else two)
    asked = second.read(first.read(queries, one), two)
    torch.testing.assert_close(decoder(queries, patches), torch.einsum("bce,behw->bchw", asked, three))
    assert third.out is None and third.update is None


# ---- masks by name: classes never mix -------------------------------------------------------------------------------

@asking
def test_masks_follow_the_order_of_the_classes_and_ignore_other_classes(kind: str, options: dict) -> None:
    decoder, describe = asking_decoder(kind, **options).double(), move_off_start(RelationshipDescriptor(16)).double()
    patches, cls = random_question(dtype=torch.float64)[1], F.normalize(torch.randn(2, 16, dtype=torch.float64), dim=1)
    text, order = F.normalize(torch.randn(9, 16, dtype=torch.float64), dim=1), torch.randperm(9)
    masks = decoder(describe(text, cls), patches)
    assert masks.shape == (2, 9, 5, 7) and masks.std() > 1e-4
    torch.testing.assert_close(decoder(describe(text[order], cls), patches), masks[:, order])
    for chosen in ([0], [7, 2, 5]): torch.testing.assert_close(decoder(describe(text[chosen], cls), patches), masks[:, chosen])
    assert decoder(describe(text[:0], cls), patches).shape == (2, 0, 5, 7)


def test_self_attention_mixes_classes_and_keeps_to_their_order() -> None:
    decoder = asking_decoder("ZegCLIP", self_attention=True).double()
    queries, patches = random_question(dtype=torch.float64)
    masks, order = decoder(queries, patches), torch.randperm(5)
    torch.testing.assert_close(decoder(queries[:, order], patches), masks[:, order])
    assert (decoder(queries[:, :4], patches) - masks[:, :4]).abs().max() > 1e-3


@asking
def test_pictures_that_are_asked_together_do_not_see_each_other(kind: str, options: dict) -> None:
    decoder = asking_decoder(kind, **options)
    queries, patches = random_question(batch=3)
    alone = [decoder(queries[i:i + 1], patches[i:i + 1]) for i in range(3)]
    torch.testing.assert_close(decoder(queries, patches), torch.cat(alone), rtol=1e-4, atol=1e-5)


# ---- windows --------------------------------------------------------------------------------------------------------

@given(height=st.integers(1, 9), breadth=st.integers(1, 9), side=st.integers(1, 5))
def test_windows_come_apart_and_together_and_padding_never_fills_one(height: int, breadth: int, side: int) -> None:
    x = torch.randn(2, height, breadth, 3)
    windows = window_partition(x, side)
    assert windows.shape == (2, -(-height // side) * -(-breadth // side), side**2, 3)
    assert torch.equal(window_merge(windows, side, (height, breadth)), x)
    assert torch.equal(windows[0, 0, 0], x[0, 0, 0]) and window_partition(torch.ones_like(x), side).any(2).all()


@pytest.mark.parametrize("mask_padding", [True, False])
def test_editing_one_window_changes_the_high_branch_only_there_and_the_low_branch_everywhere(mask_padding: bool) -> None:
    layer = move_off_start(SpectralGuidedLayer(16, 4, 2, mask_padding=mask_padding, hidden=8)).eval()
    patches = torch.randn(1, 16, 8, 7)
    edited = patches.clone()
    edited[..., 3:6, 6:] += torch.randn(16, 3, 1)  # a window of one column
    changed = (layer.branches(edited) != layer.branches(patches)).unflatten(1, (8, 7))[0]
    window = torch.zeros(8, 7, dtype=torch.bool)
    window[3:6, 6:] = True
    assert torch.equal(changed[..., :8].any(-1), window) and changed[..., 8:].any(-1).all()


def test_windows_of_one_patch_hand_on_its_value_and_make_the_low_branch_plain_attention() -> None:
    patches = torch.randn(2, 16, 4, 5, dtype=torch.float64)
    tokens = patches.flatten(2).transpose(1, 2)
    high = move_off_start(WindowAttention(16, 2, 8, window=1)).double()
    torch.testing.assert_close(high(patches), high.out(tokens @ high.query_key_value.weight[16:].T))
    layer = move_off_start(SpectralGuidedLayer(16, 4, high_heads=0, window=1, hidden=8)).double()  # the authors' case of window 1
    plain = nn.MultiheadAttention(16, 4, bias=False, batch_first=True).double()
    with torch.no_grad():
        plain.in_proj_weight.copy_(torch.cat([layer.low.query.weight, layer.low.key_value.weight]))
        plain.out_proj.weight.copy_(layer.low.out.weight)
    torch.testing.assert_close(layer.branches(patches), plain(tokens, tokens, tokens, need_weights=True)[0] + layer.low.out.bias)


def test_one_window_over_the_whole_grid_makes_the_high_branch_plain_attention() -> None:
    high, patches = move_off_start(WindowAttention(16, 4, 16, window=6)).double(), torch.randn(2, 16, 4, 6, dtype=torch.float64)
    plain, tokens = nn.MultiheadAttention(16, 4, bias=False, batch_first=True).double(), patches.flatten(2).transpose(1, 2)
    with torch.no_grad():
        plain.in_proj_weight.copy_(high.query_key_value.weight)
        plain.out_proj.weight.copy_(high.out.weight)
    torch.testing.assert_close(high(patches), plain(tokens, tokens, tokens, need_weights=True)[0] + high.out.bias)


def test_padding_matters_only_where_there_is_some() -> None:
    queries = torch.randn(1, 3, 16)
    for grid, same in (((6, 9), True), ((6, 8), False), ((7, 9), False)):
        masked, counted = (asking_decoder("SPT-SEG", mask_padding=flag) for flag in (True, False))
        counted.load_state_dict(masked.state_dict())
        patches = torch.randn(1, 16, *grid)
        assert torch.allclose(masked(queries, patches), counted(queries, patches), atol=1e-6) is same


# ---- the similarity -------------------------------------------------------------------------------------------------

def dead_heads(similarity: str, starts: int = 20) -> int:
    "Among fresh decoders: those whose masks and gradients are all 0."
    torch.manual_seed(100)
    queries, patches = random_question(32, 2, 4, (9, 8))
    dead = 0
    for seed in range(starts):
        torch.manual_seed(seed)
        decoder = SpectralGuidedDecoder(32, layers=2, heads=4, hidden=8, similarity=similarity).eval()
        masks = decoder(queries, patches)
        masks.square().sum().backward()
        silent = not masks.any()
        assert silent == (not any(p.grad is not None and p.grad.any() for p in decoder.parameters()))
        dead += silent
    return dead


def test_no_head_starts_dead_unless_cosines_are_clamped() -> None:
    assert dead_heads("shifted") == 0
    assert 5 <= dead_heads("clamp") <= 15  # a coin each, as nearly all patches lie on one side of xi


def test_a_zero_patch_passes_without_nan() -> None:
    layer = SpectralGuidedLayer(8, 4, 2, hidden=8)
    patches = torch.zeros(1, 8, 4, 4, requires_grad=True)
    layer(patches).sum().backward()
    assert patches.grad.isfinite().all() and not layer(patches).any()


# ---- masks by name: gradients, dropout, precision -------------------------------------------------------------------

@pytest.mark.parametrize(("kind", "options"), [*VARIANTS, ("ZegCLIP", {"self_attention": True})])
def test_every_parameter_is_trained_but_biases_of_keys_before_a_softmax(kind: str, options: dict) -> None:
    decoder, describe = asking_decoder(kind, **options).double(), RelationshipDescriptor(16).double()
    patches = random_question(dtype=torch.float64)[1]
    masks = decoder(describe(torch.randn(5, 16).double(), torch.randn(2, 16).double()), patches)
    (masks * torch.randn_like(masks)).sum().backward()
    grads = {name: p.grad.norm().item() for name, p in [*decoder.named_parameters(), *describe.named_parameters()]}
    # A constant added to all keys adds one number to all scores of a query, which a softmax takes away again.
    shifts = {name for name in grads if name.endswith("key.bias")} - {f"layers.{len(decoder.layers) - 1}.attention.key.bias"}
    assert all(grads[name] < 1e-12 for name in shifts)
    assert all(grad > 1e-7 for name, grad in grads.items() if name not in shifts), {n: g for n, g in grads.items() if g <= 1e-7}


@asking
def test_masks_have_right_gradients(kind: str, options: dict) -> None:
    decoder = asking_decoder(kind, dim=8, **{**options, "hidden": 6}).double()
    queries, patches = random_question(8, 1, 2, (4, 2), torch.float64)
    assert torch.autograd.gradcheck(decoder, (queries.requires_grad_(), patches.requires_grad_()), atol=1e-4)


@pytest.mark.parametrize("kind", ASKING)
def test_dropout_acts_in_training_only(kind: str) -> None:
    decoder, question = asking_decoder(kind, dropout=0.5), random_question()
    still = decoder(*question)
    assert torch.equal(decoder(*question), still)
    decoder.train()
    assert not torch.allclose(decoder(*question), decoder(*question))
    sober = asking_decoder(kind, dropout=0.0)
    torch.testing.assert_close(sober.train()(*question), sober.eval()(*question))


def test_a_query_update_is_a_post_norm_layer_with_a_relu() -> None:
    update = QueryUpdate(8).eval()
    assert update.mlp[0].out_features == 32 and isinstance(update.mlp[1], nn.ReLU)
    x = update(torch.randn(2, 3, 8), torch.randn(2, 3, 8))
    torch.testing.assert_close(x.mean(-1), torch.zeros(2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(-1, correction=0), torch.ones(2, 3), atol=1e-3, rtol=0)


@settings(max_examples=15)
@given(kind=st.sampled_from(list(ASKING)), height=st.integers(1, 9), breadth=st.integers(1, 9), window=st.integers(1, 5))
def test_any_grid_gives_finite_masks_in_bfloat16_too(kind: str, height: int, breadth: int, window: int) -> None:
    decoder = asking_decoder(kind, **({"window": window} if kind == "SPT-SEG" else {}))
    queries, patches = random_question(grid=(height, breadth))
    exact = decoder(queries, patches)
    with torch.autocast("cpu", torch.bfloat16): masks = decoder(queries, patches)
    assert exact.shape == (2, 5, height, breadth) and exact.isfinite().all()
    assert (masks.float() - exact).norm() < 0.05 * exact.norm()


@asking
def test_bfloat16_autocast_trains_every_parameter(kind: str, options: dict) -> None:
    decoder = asking_decoder(kind, **options)
    queries, patches = random_question()
    with torch.autocast("cpu", torch.bfloat16): masks = decoder(queries, patches)
    masks.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())


@asking
def test_asking_decoders_compile_into_one_graph_and_store_parameters_only(kind: str, options: dict) -> None:
    decoder, question = asking_decoder(kind, **options), random_question()
    compiled = torch.compile(decoder, backend="eager", fullgraph=True)(*question)
    torch.testing.assert_close(compiled, decoder(*question))
    assert set(decoder.state_dict()) == {name for name, _ in decoder.named_parameters()}
    fresh = asking_decoder(kind, **options)
    fresh.load_state_dict(decoder.state_dict())
    assert torch.equal(fresh(*question), decoder(*question))


@pytest.mark.parametrize(("kind", "options", "message"), [
    ("ZegCLIP", {"heads": 3}, "3 heads"), ("ZegCLIP", {"layers": 0}, "layers=0"), ("ZegCLIP", {"hidden": 0}, "hidden=0"),
    ("ZegCLIP", {"dropout": 1.0}, "dropout=1"), ("SPT-SEG", {"heads": 5}, "5 heads"), ("SPT-SEG", {"layers": 0}, "layers=0"),
    ("SPT-SEG", {"high_heads": 5}, "high_heads=5"), ("SPT-SEG", {"high_heads": -1}, "high_heads=-1"), ("SPT-SEG", {"window": 0}, "window=0"),
    ("SPT-SEG", {"similarity": "cosine"}, "'clamp'"), ("SPT-SEG", {"reads": "both"}, "'previous'"), ("SPT-SEG", {"dropout": -0.1}, "dropout=-0.1"),
])
def test_asking_decoders_that_cannot_be_built_are_refused(kind: str, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message): asking_decoder(kind, **options)


@pytest.mark.parametrize("kind", ASKING)
@pytest.mark.parametrize("shapes", [((2, 5, 16), (1, 16, 4, 4)), ((2, 5, 8), (2, 16, 4, 4)), ((2, 5, 16), (2, 8, 4, 4)), ((5, 16), (2, 16, 4, 4)), ((2, 5, 16), (2, 16, 16))])
def test_questions_that_do_not_fit_are_refused_with_their_shapes(kind: str, shapes: tuple) -> None:
    with pytest.raises(InputError, match=r"queries \(B, C, 16\) and patches \(B, 16, h, w\)"):
        asking_decoder(kind)(*map(torch.zeros, shapes))


@pytest.mark.cuda
@asking
def test_asking_decoders_on_a_device_equal_those_on_the_cpu(kind: str, options: dict) -> None:
    decoder, question = asking_decoder(kind, **options), random_question()
    expected = decoder(*question)
    decoder, question = decoder.cuda(), [x.cuda() for x in question]
    torch.testing.assert_close(decoder(*question).cpu(), expected, rtol=1e-3, atol=1e-4)
    with torch.autocast("cuda", torch.bfloat16): masks = decoder(*question)
    assert (masks.float().cpu() - expected).norm() < 0.05 * expected.norm()


def test_a_residual_adds_the_patches_to_both_branches() -> None:
    torch.manual_seed(0)
    plain, added, patches = SpectralGuidedLayer(32, 4), SpectralGuidedLayer(32, 4, residual=True), torch.randn(2, 32, 5, 7)
    added.load_state_dict(plain.state_dict())
    torch.testing.assert_close(added.branches(patches), plain.branches(patches) + patches.flatten(2).mT)
    moved = SpectralGuidedDecoder(32, heads=4, residual=True).eval()(torch.randn(2, 3, 32), patches)
    assert moved.std((2, 3)).min() > 10*SpectralGuidedDecoder(32, heads=4).eval()(torch.randn(2, 3, 32), patches).std((2, 3)).max()   # places differ from the start
