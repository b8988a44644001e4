"""Spectral prompts: the filter against complex FFTs, every invariant of the equation, and a tower in which only prompts learn."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from freqseg.clip import Backbone, ClosedVocabulary, build_closed_clip, load_clip
from freqseg.files import InputError
from freqseg.spectra import SpectralFilter, radial_frequency, resize_response
from freqseg.spectral_prompts import (
    DeepPrompts, Prompted, PromptedTower, SpectralPrompts, filter_magnitude, prompt_blocks, radial_gain, spectral_prompt,
)

few = settings(max_examples=15)
sides, seeds = st.integers(1, 9), st.integers(0, 2**31)
GRIDS = ((6, 6), (5, 7), (4, 9), (7, 4), (1, 6), (3, 1))
grids = pytest.mark.parametrize("grid", GRIDS)

WORDS = ("red", "blue", "circle")
LITTLE = {"embed_dim": 24, "vision_cfg": {"image_size": 32, "layers": 3, "width": 48, "head_width": 16, "patch_size": 8},
          "text_cfg": {"context_length": 10, "vocab_size": len(WORDS) + 3, "width": 32, "heads": 2, "layers": 2}}


def little(**vision) -> Backbone:
    return Backbone(build_closed_clip(LITTLE | {"vision_cfg": LITTLE["vision_cfg"] | vision}), "little", ClosedVocabulary(WORDS, 10))


@pytest.fixture
def frozen() -> Backbone:
    return little()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))   # 4 x 6 patches


def problem(grid: tuple[int, int], batch: int = 2, width: int = 3, seed: int = 0, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    "Tokens, CLS and a gain that is nothing special, not even conjugate-symmetric where it could be."
    rng = torch.Generator().manual_seed(seed)
    tokens, cls = (torch.randn(*shape, generator=rng, dtype=dtype) for shape in ((batch, width, *grid), (batch, width)))
    kind = torch.complex128 if dtype == torch.float64 else torch.complex64
    return tokens, cls, torch.randn(grid[0], grid[1] // 2 + 1, width, generator=rng, dtype=kind)


def whole_plane(gain: Tensor, grid: tuple[int, int]) -> Tensor:
    "The gain (h, w, D) of every frequency, by its symmetry: mirror images are conjugates, and those that are stored twice are averaged."
    h, w = grid
    found = torch.zeros(h, w, gain.shape[-1], dtype=gain.dtype)
    for y in range(h):
        for x in range(w):
            stored = [gain[y, x]] if x <= w // 2 else []
            if (w - x) % w <= w // 2: stored.append(gain[-y % h, (w - x) % w].conj())
            found[y, x] = sum(stored) / len(stored)
    return found


def complex_reference(tokens: Tensor, cls: Tensor, gain: Tensor) -> Tensor:
    "F^-1(F(H * g) w_f) with complex FFTs of the whole plane."
    spectrum = torch.fft.fft2(tokens * cls[:, :, None, None], norm="ortho") * whole_plane(gain, tuple(tokens.shape[2:])).permute(2, 0, 1)
    filtered = torch.fft.ifft2(spectrum, norm="ortho")
    assert filtered.imag.abs().max() < 1e-10
    return filtered.real


def learning(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


# ---- which blocks -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("text", "blocks"), [("1-2", (0, 1)), ("1-6", range(6)), ("6-12", range(5, 12)), ("11-12", (10, 11)), ("3", (2,)),
                                              (" 12 ", (11,)), ("4-4", (3,)), ("all", range(12)), ((1, 0, 1), (0, 1)), ([11], (11,)), ((), ())])
def test_a_depth_as_papers_write_it(text, blocks):
    assert prompt_blocks(text, 12) == tuple(blocks) == prompt_blocks(prompt_blocks(text, 12), 12)


@pytest.mark.parametrize("text", ["2-1", "0", "0-2", "13", "12-13", "-1", "1-", "1,2", "one", "", "1--2",
                                  (12,), (-1,), (True,), (0.5,), ["1-2"], 3, None])
def test_other_depths_are_refused_by_name(text):
    with pytest.raises(InputError) as error: prompt_blocks(text, 12)
    assert repr(text) in str(error.value) and "1 to 12" in str(error.value) and "'1-2'" in str(error.value)


# ---- fresh tokens -----------------------------------------------------------------------------------------------------

def test_the_published_number_of_parameters():
    for tokens in (10, 100):
        assert sum(p.numel() for p in DeepPrompts(768, 16, 12, tokens).parameters()) == tokens * 12 * 768 + 768 * 768 + 768
    assert not learning(DeepPrompts(768, 16, 12, tokens=0)) and DeepPrompts(8, 4, 2, tokens=0)(1, 3).shape == (3, 0, 8)
    with pytest.raises(InputError, match="tokens=-1"): DeepPrompts(8, 4, 2, tokens=-1)


def test_the_published_start():
    prompts = DeepPrompts(192, 16, 12, tokens=50)
    reach = math.sqrt(6 / (3 * 256 + 192))
    assert 0.99 * reach < prompts.tokens.max() <= reach and -reach <= prompts.tokens.min() < -0.99 * reach
    assert float(prompts.tokens.std()) == pytest.approx(reach / math.sqrt(3), rel=0.02)
    assert float(prompts.projection.weight.std()) == pytest.approx(math.sqrt(2 / 192), rel=0.02) and not prompts.projection.bias.any()


def test_each_block_has_its_own_tokens_and_each_picture_its_own_dropout():
    prompts = DeepPrompts(16, 8, 3, tokens=4, dropout=0.5)
    many = prompts(0, pictures=2)
    dropped = (many == 0).float().mean()
    assert 0.2 < dropped < 0.8 and not torch.equal(many[0], many[1])
    prompts.eval()
    assert torch.equal(prompts(1), F.linear(prompts.tokens[1], prompts.projection.weight)) and not torch.equal(prompts(0), prompts(1))
    assert torch.equal(prompts(2, pictures=2), prompts(2).expand(2, -1, -1))
    assert torch.allclose(many[many != 0], 2 * prompts(0).expand(2, -1, -1)[many != 0])


# ---- the equation -----------------------------------------------------------------------------------------------------

@few
@given(sides, sides, seeds)
def test_equals_complex_ffts_of_the_whole_plane(h, w, seed):
    given_ = problem((h, w), seed=seed)
    torch.testing.assert_close(spectral_prompt(*given_), complex_reference(*given_))


@grids
def test_gradients_equal_those_of_the_reference_and_finite_differences(grid):
    leaves = [x.requires_grad_() for x in problem(grid)]
    upstream = torch.randn(2, 3, *grid, dtype=torch.float64)
    found = torch.autograd.grad(spectral_prompt(*leaves), leaves, upstream)
    expected = torch.autograd.grad(complex_reference(*leaves), leaves, upstream)
    for ours, theirs in zip(found, expected, strict=True): torch.testing.assert_close(ours, theirs)
    small = [x.requires_grad_() for x in problem(grid, batch=2, width=1)]
    assert torch.autograd.gradcheck(spectral_prompt, small)


def test_gradients_are_computed_for_what_asks():
    for asking in ((0,), (1,), (2,), (0, 2), (1, 2)):
        leaves = [x.requires_grad_(index in asking) for index, x in enumerate(problem((4, 5)))]
        spectral_prompt(*leaves).square().sum().backward()
        assert [x.grad is not None for x in leaves] == [index in asking for index in range(3)]


@grids
def test_a_gain_of_one_is_the_product_and_of_zero_nothing(grid):
    tokens, cls, gain = problem(grid)
    torch.testing.assert_close(spectral_prompt(tokens, cls, torch.ones_like(gain)), tokens * cls[..., None, None])
    assert not spectral_prompt(tokens, cls, torch.zeros_like(gain)).any()


@grids
def test_the_constant_alone_is_the_spatial_mean(grid):
    tokens, cls, gain = problem(grid)
    gain = torch.zeros_like(gain)
    gain[0, 0] = 1
    mean = (tokens * cls[..., None, None]).mean((2, 3), keepdim=True)
    torch.testing.assert_close(spectral_prompt(tokens, cls, gain), mean.expand_as(tokens))


@few
@given(sides, sides, st.integers(-9, 9), st.integers(-9, 9), seeds)
def test_circular_shifts_go_through(h, w, dy, dx, seed):
    tokens, cls, gain = problem((h, w), seed=seed)
    torch.testing.assert_close(spectral_prompt(tokens.roll((dy, dx), (2, 3)), cls, gain), spectral_prompt(tokens, cls, gain).roll((dy, dx), (2, 3)))


@few
@given(sides, sides, seeds)
def test_a_unimodular_hermitian_filter_keeps_the_energy(h, w, seed):
    tokens, cls, _ = problem((h, w), seed=seed)
    phases = torch.fft.rfft2(torch.randn(h, w, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=(0, 1))
    found = spectral_prompt(tokens, cls, phases / phases.abs())
    torch.testing.assert_close(found.square().sum((2, 3)), (tokens * cls[..., None, None]).square().sum((2, 3)))


def test_linear_in_the_tokens_and_every_picture_for_itself():
    (tokens, cls, gain), other = problem((5, 6), batch=3), torch.randn(3, 3, 5, 6, dtype=torch.float64)
    both = spectral_prompt(tokens, cls, gain) + 2 * spectral_prompt(other, cls, gain)
    torch.testing.assert_close(spectral_prompt(tokens + 2 * other, cls, gain), both)
    torch.testing.assert_close(spectral_prompt(tokens, cls, gain)[1:2], spectral_prompt(tokens[1:2], cls[1:2], gain))


def test_any_memory_order_any_precision():
    tokens, cls, gain = problem((5, 6), dtype=torch.float32)
    expected = spectral_prompt(tokens, cls, gain)
    torch.testing.assert_close(spectral_prompt(tokens.contiguous(memory_format=torch.channels_last), cls, gain), expected)
    half = spectral_prompt(tokens.bfloat16(), cls.bfloat16(), gain)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, spectral_prompt(tokens.bfloat16().float(), cls.bfloat16().float(), gain).bfloat16())   # fp32 inside
    with pytest.raises(InputError, match=r"\(5, 6\)"): spectral_prompt(tokens, cls, gain[:4])


# ---- filters of a tower -----------------------------------------------------------------------------------------------

def in_a_row(maps: Tensor) -> Tensor:
    return maps.flatten(2).mT


def test_only_prompted_blocks_change_and_sharing_is_an_option():
    tokens, cls, _ = problem((4, 6), dtype=torch.float32)
    for shared in (True, False):
        filters = SpectralPrompts(3, (4, 6), blocks=(0, 2), shared=shared)
        assert len(filters.filters) == 2 - shared and sum(p.numel() for p in filters.parameters()) == (2 - shared) * 4 * 4 * 3 * 2
        added = {block: filters(block, in_a_row(tokens), cls, (4, 6)) - in_a_row(tokens) for block in range(4)}
        assert not added[1].any() and not added[3].any() and torch.equal(added[0], added[2]) == shared
        for block in (0, 2):
            torch.testing.assert_close(added[block], in_a_row(spectral_prompt(tokens, cls, filters.gain(block))), atol=1e-6, rtol=1e-4)


def test_starts_of_the_filters():
    torch.manual_seed(0)
    weight = SpectralPrompts(64, (8, 8)).filters[0].weight
    assert float(weight.std()) == pytest.approx(0.02, rel=0.03) and abs(float(weight.mean())) < 1e-3
    tokens, cls, _ = problem((8, 8), width=64, dtype=torch.float32)
    zero = SpectralPrompts(64, (8, 8), init="zero")
    assert torch.equal(zero(0, in_a_row(tokens), cls, (8, 8)), in_a_row(tokens))
    zero(0, in_a_row(tokens), cls, (8, 8)).square().sum().backward()
    assert zero.filters[0].weight.grad.any()   # a start at zero is no dead end
    with pytest.raises(InputError, match="init='ones'"): SpectralPrompts(64, (8, 8), init="ones")
    for wrong in ((), "1-2", (-1,)):
        with pytest.raises(InputError, match="blocks="): SpectralPrompts(64, (8, 8), blocks=wrong)


def test_carried_to_another_grid_frequency_by_frequency():
    tokens, cls, _ = problem((7, 10), dtype=torch.float32)
    filters = SpectralPrompts(3, (4, 6))
    carried = resize_response(filters.filters[0].response(), (4, 6), (7, 10))
    torch.testing.assert_close(filters(0, in_a_row(tokens), cls, (7, 10)), in_a_row(tokens + spectral_prompt(tokens, cls, carried)))
    same = SpectralPrompts(3, (4, 6), init="identity")
    torch.testing.assert_close(same(1, in_a_row(tokens), cls, (7, 10)), in_a_row(tokens) * (1 + cls[:, None]))
    with pytest.raises(InputError, match=r"\(2, 71, 3\) are no \(B, 7 x 10, D\)"): filters(0, torch.zeros(2, 71, 3), cls, (7, 10))
    with pytest.raises(InputError, match=r"cls \(1, 3\) does not fit tokens"): filters(0, in_a_row(tokens), cls[:1], (7, 10))


# ---- looking at a filter ----------------------------------------------------------------------------------------------

@grids
def test_magnitude_over_the_whole_plane(grid):
    gain = problem(grid)[2]
    found = filter_magnitude(gain, grid)
    assert found.shape == grid
    torch.testing.assert_close(found, torch.fft.fftshift(whole_plane(gain, grid).abs().mean(-1)))
    constant = torch.zeros_like(gain)
    constant[0, 0] = 1
    assert filter_magnitude(constant, grid)[grid[0] // 2, grid[1] // 2] == pytest.approx(1)
    with pytest.raises(InputError, match="expected"): filter_magnitude(gain, (grid[0], grid[1] + 2))


@grids
def test_radial_profile_of_groups_of_channels(grid):
    gain = problem(grid, width=4)[2]
    frequencies, profile = radial_gain(gain, grid, groups=2)
    assert profile.shape == (2, len(frequencies)) and frequencies[0] == 0 and torch.isfinite(profile).all() and (frequencies.diff() > 0).all()
    magnitude, ring = whole_plane(gain, grid).abs(), np.rint(radial_frequency(*grid).numpy() * max(grid))
    for group in range(2):
        expected = [magnitude[..., 2 * group:2 * group + 2][torch.from_numpy(ring == r)].mean() for r in np.unique(ring)]
        torch.testing.assert_close(profile[group], torch.stack(expected))
    for wrong in (3, 0):
        with pytest.raises(InputError, match=f"groups={wrong}"): radial_gain(gain, grid, groups=wrong)


def test_profile_of_a_known_filter():
    filter_ = SpectralFilter(6, (8, 8), init="identity")
    with torch.no_grad(): filter_.weight[..., 0] = radial_frequency(8, 8, half=True)[..., None]
    frequencies, profile = radial_gain(filter_.response(), (8, 8), groups=3)
    assert (profile - frequencies).abs().max() < 0.5 / 8 and (profile.std(0) < 1e-6).all() and not profile.requires_grad


# ---- the tower --------------------------------------------------------------------------------------------------------

def written_out(tower: PromptedTower, backbone: Backbone, images: Tensor, carry: bool = False) -> Tensor:
    "ZegCLIP's sequence as published, [CLS, M prompts, patches] into every block; with `carry`, prompts that are never replaced."
    x, (h, w), spectral = backbone.embed(images), backbone.grid_of(images), tower.spectral
    prompts = tower.prompts(0).expand(len(x), -1, -1)
    for index in range(backbone.depth):
        cls, patches = x[:, :1], x[:, -h * w:]
        if spectral is not None and index in spectral.blocks:
            maps = patches.mT.unflatten(2, (h, w))
            patches = patches + complex_reference(maps, cls[:, 0], spectral.gain(index, (h, w))).flatten(2).mT
        if not (carry and index): prompts = tower.prompts(index).expand(len(x), -1, -1)
        x = backbone.block(index, torch.cat([cls, prompts, patches], 1))
        prompts = x[:, 1:-h * w]
    return F.normalize(backbone.project(tower.norm(torch.cat([x[:, :1], x[:, -h * w:]], 1))), dim=-1)


def as_rows(found: Prompted) -> Tensor:
    return torch.cat([found.cls[:, None], found.patches.flatten(2).mT], 1)


@pytest.mark.parametrize("shape", [(32, 32), (32, 48), (56, 16)])
@pytest.mark.parametrize("spectral", [(), "1-2", "3", "all"])
def test_equals_the_sequence_written_out(frozen, shape, spectral):
    frozen, images = frozen.double(), torch.randn(2, 3, *shape, dtype=torch.float64)
    tower = PromptedTower(frozen, tokens=5, spectral=spectral, shared=False).double().eval()
    with torch.no_grad():
        for parameter in tower.parameters(): parameter.add_(0.3 * torch.randn_like(parameter))
        found = tower(frozen, images)
        torch.testing.assert_close(as_rows(found), written_out(tower, frozen, images))
        # the test would see prompts that are carried along
        assert (as_rows(found) - written_out(tower, frozen, images, carry=True)).abs().max() > 1e-3
    assert found.patches.shape == (2, 24, shape[0] // 8, shape[1] // 8) and found.cls.shape == (2, 24)


def test_without_prompts_it_is_the_frozen_tower_and_a_layer_norm(frozen, images):
    tower = PromptedTower(frozen, tokens=0, spectral=()).eval()
    assert {name for name, _ in tower.named_parameters() if _.requires_grad} == {"norm.weight", "norm.bias"}
    assert tower.norm.eps == 1e-6
    theirs = frozen.encode(images, tokens=(-1,))
    last = F.layer_norm(theirs.tokens[2].flatten(2).mT, (48,), eps=1e-6)
    torch.testing.assert_close(tower(frozen, images).patches.flatten(2).mT, F.normalize(frozen.project(last), dim=-1))
    tower.norm = nn.Identity()
    found = tower(frozen, images)
    torch.testing.assert_close(found.patches, F.normalize(theirs.patch_embedding, dim=1))
    torch.testing.assert_close(found.cls, F.normalize(theirs.cls_embedding, dim=-1))


def test_only_prompts_filters_and_the_layer_norm_learn(frozen, images):
    before, tower = copy.deepcopy(frozen.state_dict()), PromptedTower(frozen, tokens=3)
    names = {name for name, _ in tower.named_parameters()}
    assert names == {"prompts.tokens", "prompts.projection.weight", "prompts.projection.bias",
                     "spectral.filters.0.weight", "norm.weight", "norm.bias"}
    assert not any(isinstance(module, Backbone) for module in tower.modules())
    optimiser = torch.optim.AdamW(tower.parameters(), lr=0.1)
    start = {name: p.detach().clone() for name, p in tower.named_parameters()}
    for _ in range(2):
        optimiser.zero_grad()
        found = tower(frozen, images)
        (found.patches[:, 0].sum() + found.cls[:, 1].sum()).backward()
        assert all(p.grad is not None and p.grad.any() and torch.isfinite(p.grad).all() for p in tower.parameters())
        assert all(tower.prompts.tokens.grad[block].any() for block in range(3))
        optimiser.step()
    assert all(not torch.equal(p, start[name]) for name, p in tower.named_parameters())
    assert all(p.grad is None for p in frozen.parameters()) and not frozen.training
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())


@pytest.mark.parametrize(("options", "first"), [({}, 0), ({"tokens": 0}, 0), ({"tokens": 0, "spectral": "2"}, 1), ({"tokens": 0, "spectral": "3"}, 2),
                                                ({"tokens": 0, "spectral": ()}, 3)])
def test_nothing_before_the_first_prompt_carries_a_graph(frozen, images, options, first):
    graph = [None] * 4
    hooks = [block.register_forward_hook(lambda module, inputs, output, index=index: graph.__setitem__(index, output.requires_grad))
             for index, block in enumerate([*(block.mlp for block in frozen.blocks), frozen.model.visual.ln_post])]
    PromptedTower(frozen, **options)(frozen, images.requires_grad_())
    for hook in hooks: hook.remove()
    assert graph == [False] * first + [True] * (4 - first)


def test_a_start_at_zero_adds_nothing(frozen, images):
    plain, zero = PromptedTower(frozen, spectral=()).eval(), PromptedTower(frozen, init="zero").eval()
    zero.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(as_rows(zero(frozen, images)), as_rows(plain(frozen, images)))


def test_saved_and_loaded(frozen, images, tmp_path):
    tower = PromptedTower(frozen, tokens=3, shared=False, grid=(6, 4)).eval()
    torch.save(tower.state_dict(), tmp_path / "prompts.pt")
    other = PromptedTower(frozen, tokens=3, shared=False, grid=(6, 4)).eval()
    assert not torch.equal(as_rows(other(frozen, images)), as_rows(tower(frozen, images)))
    other.load_state_dict(torch.load(tmp_path / "prompts.pt", weights_only=True))
    assert torch.equal(as_rows(other(frozen, images)), as_rows(tower(frozen, images)))
    assert tower.spectral.filters[0].weight.shape == (6, 3, 48, 2)


def test_bf16_autocast_is_close_and_learns(frozen, images):
    tower = PromptedTower(frozen, dropout=0.0)
    exact = as_rows(tower(frozen, images))
    exact[..., 0].sum().backward()
    wanted = {name: p.grad.clone() for name, p in tower.named_parameters()}
    tower.zero_grad()
    with torch.autocast("cpu", torch.bfloat16): found = tower(frozen, images)
    assert found.patches.dtype == found.cls.dtype == torch.float32
    assert F.cosine_similarity(as_rows(found), exact, dim=-1).min() > 0.999
    torch.testing.assert_close(as_rows(found).norm(dim=-1), torch.ones(2, 25))
    as_rows(found)[..., 0].sum().backward()
    for name, p in tower.named_parameters(): assert F.cosine_similarity(p.grad.flatten(), wanted[name].flatten(), dim=0) > 0.97, name


def test_embeddings_have_length_one_and_pictures_do_not_mix(frozen, images):
    tower = PromptedTower(frozen).eval()
    both = as_rows(tower(frozen, images))
    torch.testing.assert_close(both.norm(dim=-1), torch.ones(2, 25))
    torch.testing.assert_close(both[1:], as_rows(tower(frozen, images[1:])))


def test_other_attention_blocks(images):
    scaled = little(ls_init_value=0.1, qk_norm=True)
    tower = PromptedTower(scaled, tokens=2).double().eval()
    scaled, images = scaled.double(), images.double()
    with torch.no_grad(): torch.testing.assert_close(as_rows(tower(scaled, images)), written_out(tower, scaled, images))


def test_stochastic_depth_rises_and_drops_whole_branches_of_single_pictures(frozen):
    images = torch.randn(1, 3, 32, 32).repeat(64, 1, 1, 1)
    tower = PromptedTower(frozen, dropout=0.0, drop_path=0.5)
    assert tower.drop_path == pytest.approx([0, 0.25, 0.5])
    with torch.no_grad():
        drawn = tower(frozen, images).cls
        kinds = {tuple(row) for row in (drawn * 1e3).round().int().tolist()}
        assert 5 < len(kinds) <= 16   # two branches in each of two blocks, there or not
        assert torch.equal(tower.eval()(frozen, images).cls[:1], PromptedTower.forward(_without_drops(tower), frozen, images[:1]).cls)
    for wrong in (-0.1, 1.0):
        with pytest.raises(InputError, match="drop_path="): PromptedTower(frozen, drop_path=wrong)


def _without_drops(tower: PromptedTower) -> PromptedTower:
    calm = copy.deepcopy(tower).eval()
    calm.drop_path = [0.0] * len(calm.drop_path)
    return calm


def test_stochastic_depth_keeps_the_mean_of_a_branch(frozen):
    tower = PromptedTower(frozen, tokens=0, spectral=(), drop_path=0.4)
    block, x = frozen.blocks[2], torch.randn(1, 17, 48)
    nn.init.zeros_(block.mlp.c_proj.weight), nn.init.zeros_(block.mlp.c_proj.bias)   # the first branch alone
    with torch.no_grad():
        drawn = tower._block(2, block, x.repeat(4000, 1, 1)) - x
        branch = tower.eval()._block(2, block, x) - x
    kept = drawn.flatten(1).any(1)
    assert float(kept.float().mean()) == pytest.approx(0.6, abs=0.03)
    torch.testing.assert_close(drawn[kept], (branch / 0.6).expand(int(kept.sum()), -1, -1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{"spectral": "3-4"}, {"spectral": (5,)}, {"tokens": -2}, {"init": "one"}])
def test_what_cannot_be_built_is_refused(frozen, options):
    with pytest.raises(InputError): PromptedTower(frozen, **options)


def test_a_tower_of_another_size_is_refused(frozen, images):
    tower = PromptedTower(frozen)
    with pytest.raises(InputError, match="3 blocks of width 48, little has 2 of 48"): tower(little(layers=2), images)
    with pytest.raises(InputError, match="nearest valid size"): tower(frozen, torch.zeros(1, 3, 30, 32))


def test_the_embedded_world_and_the_size_of_vit_b():
    world = load_clip("world")
    found = PromptedTower(world)(world, torch.randn(1, 3, 64, 112))
    assert found.patches.shape == (1, 128, 8, 14)


@pytest.mark.slow
def test_vit_b_16_at_a_size_that_it_was_not_trained_for():
    backbone = load_clip("ViT-B-16", None)
    tower = PromptedTower(backbone, grid=(32, 32))
    assert sum(p.numel() for p in tower.parameters()) == 684_288 + 835_584
    found = tower(backbone, torch.randn(1, 3, 96, 160))
    assert found.patches.shape == (1, 512, 6, 10)
    found.patches[:, 0].sum().backward()
    assert all(p.grad.any() for p in tower.parameters())
