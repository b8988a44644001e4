"""The wavelet room: equal to PyWavelets, invertible, energy preserving, differentiable, and WTCLIP's block as stated."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
import pywt
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import freqseg.wavelet as wavelet_room
from freqseg.wavelet import (
    LearnableWavelet, WaveletConv2d, coefficient_count, dwt2, filter_bank, idwt2, merge_sub_bands,
    reconstruction_penalty, sub_bands, wavedec2, waverec2,
)

MODES = {"periodic": "periodization", "symmetric": "symmetric"}
DISCRETE = pywt.wavelist(kind="discrete")
# dmey is a truncated approximation: PyWavelets does not reconstruct it better either.
EXACT = [name for name in DISCRETE if name != "dmey"]
SHORT = [name for name in EXACT if pywt.Wavelet(name).dec_len <= 12]

paths = pytest.mark.parametrize("limit", [256, 0], ids=["matrix", "convolution"])
modes = pytest.mark.parametrize("mode", MODES)


def random_map(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@paths
@modes
def test_every_discrete_wavelet_equals_pywavelets_both_ways(monkeypatch, limit: int, mode: str) -> None:
    monkeypatch.setattr(wavelet_room, "MATRIX_LIMIT", limit)
    x = random_map(2, 13, 10)
    for name in DISCRETE:
        ll, details = dwt2(x, name, mode)
        expected_ll, expected_details = pywt.dwt2(x.numpy(), name, MODES[mode])
        np.testing.assert_allclose(ll, expected_ll, atol=1e-10, err_msg=name)
        np.testing.assert_allclose(details, np.stack(expected_details, -3), atol=1e-10, err_msg=name)
        expected = pywt.idwt2((expected_ll, expected_details), name, MODES[mode])
        np.testing.assert_allclose(idwt2(ll, details, name, mode), expected, atol=1e-10, err_msg=name)


@settings(max_examples=60)
@given(height=st.integers(1, 40), width=st.integers(1, 40), name=st.sampled_from(SHORT), mode=st.sampled_from(list(MODES)),
       levels=st.integers(1, 3))
def test_decompositions_of_any_size_equal_pywavelets_and_invert(height, width, name, mode, levels) -> None:
    x = random_map(height, width)
    coefficients = wavedec2(x, name, levels, mode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyWavelets warns that deep levels are all boundary
        expected = pywt.wavedec2(x.numpy(), name, MODES[mode], level=levels)
    np.testing.assert_allclose(coefficients[0], expected[0], atol=1e-9)
    for details, triple in zip(coefficients[1:], expected[1:], strict=True):
        np.testing.assert_allclose(details, np.stack(triple), atol=1e-9)
    np.testing.assert_allclose(waverec2(coefficients, name, mode, (height, width)), x, atol=1e-7)


@paths
@modes
@pytest.mark.parametrize("size", [(16, 16), (17, 23), (1, 9)])
def test_every_wavelet_reconstructs_perfectly_at_even_and_odd_sizes(monkeypatch, limit, mode, size) -> None:
    monkeypatch.setattr(wavelet_room, "MATRIX_LIMIT", limit)
    x = random_map(1, 2, *size)
    for name in EXACT:
        restored = waverec2(wavedec2(x, name, 2, mode), name, mode, size)
        np.testing.assert_allclose(restored, x, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("name", [name for name in EXACT if pywt.Wavelet(name).orthogonal])
def test_orthogonal_periodic_transforms_preserve_energy(name: str) -> None:
    x = random_map(3, 16, 24)
    energy = sum(band.square().sum() for band in wavedec2(x, name, levels=2))
    torch.testing.assert_close(energy, x.square().sum(), rtol=1e-7, atol=0)


def test_biorthogonal_transforms_do_not_preserve_energy() -> None:
    x = random_map(16, 16)
    assert abs(sub_bands(x, "bior2.2").square().sum() / x.square().sum() - 1) > 1e-3


@modes
def test_constant_maps_have_no_details(mode: str) -> None:
    ll, details = dwt2(torch.full((1, 9, 12), 3.0, dtype=torch.float64), "db3", mode)
    assert details.abs().max() < 1e-10
    torch.testing.assert_close(ll, torch.full_like(ll, 6.0))


def test_transform_is_linear_and_matrix_path_equals_convolution_path(monkeypatch) -> None:
    x, y = random_map(2, 19, 14), random_map(2, 19, 14).flip(0)
    by_matrix = sub_bands(2 * x - y, "coif1", "symmetric")
    monkeypatch.setattr(wavelet_room, "MATRIX_LIMIT", 0)
    torch.testing.assert_close(by_matrix, 2 * sub_bands(x, "coif1", "symmetric") - sub_bands(y, "coif1", "symmetric"))


def test_large_maps_take_the_convolution_path_and_still_equal_pywavelets() -> None:
    x = random_map(1, 300, 21)
    ll, details = dwt2(x, "sym4")
    expected_ll, expected_details = pywt.dwt2(x.numpy(), "sym4", "periodization")
    np.testing.assert_allclose(ll, expected_ll, atol=1e-10)
    np.testing.assert_allclose(details, np.stack(expected_details, -3), atol=1e-10)
    torch.testing.assert_close(idwt2(ll, details, "sym4", size=(300, 21)), x)


def test_even_shifts_of_the_map_shift_the_periodic_coefficients() -> None:
    x = random_map(16, 12)
    shifted = sub_bands(x.roll((4, 2), (0, 1)), "db2")
    torch.testing.assert_close(shifted, sub_bands(x, "db2").roll((2, 1), (-2, -1)))


@given(n=st.integers(1, 50), name=st.sampled_from(SHORT), mode=st.sampled_from(list(MODES)))
def test_coefficient_counts_equal_pywavelets(n: int, name: str, mode: str) -> None:
    length = pywt.Wavelet(name).dec_len
    assert coefficient_count(n, length, mode) == pywt.dwt_coeff_len(n, length, MODES[mode])


@paths
@modes
@pytest.mark.parametrize("name", ["haar", "bior1.3"])
def test_gradients_of_map_and_taps_are_right(monkeypatch, limit, mode, name) -> None:
    monkeypatch.setattr(wavelet_room, "MATRIX_LIMIT", limit)
    x, taps = random_map(1, 2, 5, 6).requires_grad_(), filter_bank(name).clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, t: sub_bands(x, t, mode), (x, taps))
    bands = sub_bands(x.detach(), name, mode).requires_grad_()
    assert torch.autograd.gradcheck(lambda b, t: merge_sub_bands(b, t, mode, (5, 6)), (bands, taps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_keeps_the_dtype_of_the_map(dtype: torch.dtype) -> None:
    x = random_map(1, 1, 8, 8).to(dtype)
    restored = waverec2(wavedec2(x, "db2"), "db2")
    assert restored.dtype == dtype
    torch.testing.assert_close(restored, x, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)


def test_taps_first_used_in_inference_mode_serve_training_later() -> None:
    filter_bank.cache_clear()
    with torch.inference_mode():
        dwt2(torch.ones(1, 4, 4), "db5")
    x = torch.ones(1, 4, 4, requires_grad=True)
    sub_bands(x, "db5").sum().backward()
    assert x.grad is not None


# --- learnable filters -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", EXACT)
def test_penalty_vanishes_for_every_wavelet(name: str) -> None:
    assert reconstruction_penalty(filter_bank(name)) < 1e-12


def test_penalty_is_zero_only_with_perfect_reconstruction() -> None:
    x, taps = random_map(1, 8, 8), filter_bank("db2").clone()
    for row in range(4):
        broken = taps.clone()
        broken[row, 1] += 0.1
        error = (merge_sub_bands(sub_bands(x, broken), broken) - x).abs().max()
        assert error > 1e-3 and reconstruction_penalty(broken) > 1e-3


def test_penalty_is_invariant_to_moving_gain_from_analysis_to_synthesis() -> None:
    taps = filter_bank("bior2.2") * torch.tensor([[2.0], [3.0], [1 / 2], [1 / 3]], dtype=torch.float64)
    assert reconstruction_penalty(taps) < 1e-12
    x = random_map(1, 9, 7)
    torch.testing.assert_close(merge_sub_bands(sub_bands(x, taps), taps, size=(9, 7)), x)


def test_learnable_wavelet_starts_as_the_named_wavelet_and_all_taps_learn() -> None:
    module, x = LearnableWavelet("db3", "symmetric"), torch.randn(2, 3, 11, 8)
    torch.testing.assert_close(module(x)[1], dwt2(x, "db3", "symmetric")[1])
    torch.testing.assert_close(module.inverse(*module(x), size=(11, 8)), x, atol=1e-5, rtol=0)
    ll, details = module(x)
    (module.inverse(0.5 * ll, details, (11, 8)).square().sum() + module.reconstruction_penalty()).backward()
    assert module.taps.grad.abs().sum(1).min() > 0
    assert filter_bank("db3").requires_grad is False


def test_two_learnable_wavelets_do_not_share_their_taps() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        first, second = LearnableWavelet(), LearnableWavelet()
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        first.taps.zero_()
    assert second.taps.abs().min() > 0 and filter_bank("haar").abs().min() > 0


# --- the wavelet convolution of WTCLIP ---------------------------------------------------------------------------

def test_parameter_count_closes_the_sum_of_the_published_decoder() -> None:
    trainable = sum(p.numel() for p in WaveletConv2d(256).parameters())
    assert trainable == 256 * 9 + 256 + 256 + 4 * 256 * 9 + 4 * 256 + 256 * 256
    assert 5_985_045 + (2816 + 1) + trainable + 2 * (4 * 256 * 1 * 2 * 2) == 6_074_646
    assert sum(p.numel() for p in WaveletConv2d(256, learn_filters=True).parameters()) == trainable + 8
    assert sum(p.numel() for p in WaveletConv2d(256, levels=2).parameters()) == trainable + 4 * 256 * 10


def written_out(block: WaveletConv2d, x: torch.Tensor) -> torch.Tensor:
    "The published equation, Haar written as sums over 2 x 2 blocks and levels as a plain recursion."
    def haar(x):
        a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
        return torch.stack([a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d], 2) / 2

    def inverse(bands):
        ll, lh, hl, hh = bands.unbind(2)
        top = torch.stack([ll + lh + hl + hh, ll + lh - hl - hh], -1).flatten(-2)
        bottom = torch.stack([ll - lh + hl - hh, ll - lh - hl + hh], -1).flatten(-2)
        return torch.stack([top, bottom], -2).flatten(-3, -2) / 2

    def branch(x, level):
        h, w = x.shape[-2:]
        bands = haar(F.pad(x, (0, w % 2, 0, h % 2)))
        conv, scale = block.bands[level].conv, block.bands[level].scale
        mixed = (scale * F.conv2d(bands.flatten(1, 2), conv.weight, padding=1, groups=conv.groups)).view_as(bands)
        if level + 1 < len(block.bands):
            mixed = torch.cat([mixed[:, :, :1] + branch(bands[:, :, 0], level + 1)[:, :, None], mixed[:, :, 1:]], 2)
        return inverse(mixed)[..., :h, :w]

    base = block.base.scale * F.conv2d(x, block.base.conv.weight, block.base.conv.bias, padding=1, groups=x.shape[1])
    return F.conv2d(base + branch(x, 0), block.pointwise.weight)


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("size", [(8, 8), (7, 10), (5, 13)])
def test_block_equals_the_published_equation(levels: int, size: tuple[int, int]) -> None:
    block, x = WaveletConv2d(3, levels=levels), torch.randn(2, 3, *size)
    for p in block.parameters():
        torch.nn.init.normal_(p)
    torch.testing.assert_close(block(x), written_out(block, x), rtol=1e-4, atol=1e-4)


def test_block_starts_with_the_published_scales() -> None:
    block = WaveletConv2d(4, levels=2)
    assert torch.equal(block.base.scale, torch.ones(4, 1, 1))
    assert all(torch.equal(b.scale, torch.full((16, 1, 1), 0.1)) and b.conv.bias is None for b in block.bands)
    assert block.base.conv.bias is not None and block.pointwise.bias is None


@pytest.mark.parametrize("name", ["haar", "db2", "bior2.2"])
@pytest.mark.parametrize("learn", [False, True])
def test_every_parameter_of_the_block_receives_gradient(name: str, learn: bool) -> None:
    block = WaveletConv2d(4, levels=2, wavelet=name, learn_filters=learn)
    (block(torch.randn(2, 4, 9, 6)).square().sum() + block.reconstruction_penalty()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters())
    assert block.reconstruction_penalty().item() == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("name", ["haar", "db2"])
def test_block_trains_under_bfloat16_autocast(name: str) -> None:
    block, x = WaveletConv2d(4, levels=2, wavelet=name, learn_filters=True), torch.randn(2, 4, 9, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    y.float().square().sum().backward()
    torch.testing.assert_close(y.float(), block(x), atol=0.1, rtol=0.1)
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in block.parameters())


def test_block_treats_images_of_a_batch_independently() -> None:
    block, x = WaveletConv2d(4, levels=2), torch.randn(3, 4, 7, 7)
    torch.testing.assert_close(block(x)[1:2], block(x[1:2]))


@pytest.mark.parametrize("name", ["haar", "bior2.2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("db2", "sym4", "coif1", "rbio1.3", "dmey"))])
@pytest.mark.parametrize("learn", [False, True], ids=["fixed", "learned"])
def test_block_compiles_into_one_graph(name: str, learn: bool) -> None:
    torch.compiler.reset()
    block, x = WaveletConv2d(4, levels=2, wavelet=name, learn_filters=learn), torch.randn(2, 4, 9, 6)
    torch.testing.assert_close(torch.compile(block, backend="aot_eager", fullgraph=True)(x), block(x))


def test_fixed_taps_follow_the_block_and_stay_out_of_its_checkpoints() -> None:
    block, x = WaveletConv2d(3, wavelet="db2").double(), random_map(1, 3, 9, 6)
    assert block.taps.dtype == torch.float64 and block(x).dtype == torch.float64
    assert not [name for name in block.state_dict() if "taps" in name] and "filters.taps" in WaveletConv2d(3, learn_filters=True).state_dict()
    block.taps.zero_()
    assert WaveletConv2d(3, wavelet="db2").taps.abs().min() > 0, "two blocks share their taps"


# --- mistakes and imports ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["dbb2", "morl", "", "db39"])
def test_unknown_wavelet_names_the_choices(name: str) -> None:
    with pytest.raises(ValueError, match="choose one of .*haar"):
        WaveletConv2d(4, wavelet=name)


def test_mistakes_are_value_errors_that_say_what_is_wrong() -> None:
    x = torch.zeros(1, 6, 6)
    with pytest.raises(ValueError, match="'zero'.*'periodic' or 'symmetric'"):
        dwt2(x, mode="zero")
    with pytest.raises(ValueError, match="'zero'.*'periodic' or 'symmetric'"):
        merge_sub_bands(sub_bands(x), mode="zero")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        wavedec2(x, levels=0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        WaveletConv2d(4, levels=0)
    with pytest.raises(ValueError, match=r"\(4, even length\), got \(4, 3\)"):
        dwt2(x, torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"at most \(6, 6\), not \(7, 6\)"):
        idwt2(*dwt2(x), size=(7, 6))


def test_room_imports_torch_only_and_haar_runs_without_pywavelets() -> None:
    code = """
import sys
sys.modules["pywt"] = None
import torch
before = set(sys.modules)
from freqseg.wavelet import dwt2
new = {m.split(".")[0] for m in set(sys.modules) - before} - {"freqseg"} - set(sys.stdlib_module_names)
assert not new - {"torch"}, new
dwt2(torch.ones(1, 4, 4))
try: dwt2(torch.ones(1, 4, 4), "db2")
except ImportError as error: assert "pip install PyWavelets" in str(error)
else: raise AssertionError("db2 without PyWavelets should say what to install")
print("fine")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "fine", result.stderr
