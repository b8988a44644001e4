"""Spectra: bands, filters, power, the learned filter and inverse attention."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from freqseg.spectra import (
    SpectralFilter,
    band_stack,
    butterworth_transfer,
    centre_on_query,
    complement,
    from_spectrum,
    gaussian_transfer,
    high_frequency_share,
    invert_attention,
    low_pass,
    lowpass_mask,
    radial_filter,
    radial_frequency,
    radial_power_spectrum,
    resize_response,
    spectral_energy,
    split_bands,
    to_spectrum,
)

sides = st.integers(1, 17)
mus = st.floats(0.0, 0.7)
shapes = st.sampled_from(["square", "disc"])
quick = settings(max_examples=40)


def maps(h: int, w: int, *lead: int) -> torch.Tensor:
    "Random fp64 maps."
    return torch.randn(*lead, h, w, dtype=torch.float64)


def attention(h: int, w: int, *lead: int) -> torch.Tensor:
    "A random row-stochastic matrix."
    return torch.softmax(2 * torch.randn(*lead, h * w, h * w), -1)


def enlarge(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    "Band-limited enlarging by zero padding of the full spectrum, Nyquist coefficients shared between both signs."
    for axis, new in ((-2, size[0]), (-1, size[1])):
        old = x.shape[axis]
        spectrum = torch.fft.fft(x, dim=axis).movedim(axis, 0)
        padded = torch.zeros(new, *spectrum.shape[1:], dtype=spectrum.dtype)
        for u in range(-(old // 2), old // 2 + 1):
            share = 0.5 if 2 * abs(u) == old and new > old else 1.0
            padded[u % new] = share * spectrum[u % old]
        x = torch.fft.ifft(padded, dim=0).movedim(0, axis) * new / old
    return x.real


# ---- bands ----------------------------------------------------------------------------------------------------------

@quick
@given(sides, sides, mus, shapes)
def test_low_and_high_sum_to_the_map(h: int, w: int, mu: float, shape: str) -> None:
    x = maps(h, w, 2, 3)
    low, high = split_bands(x, mu, shape)
    torch.testing.assert_close(low + high, x, atol=1e-14, rtol=0)


@quick
@given(sides, sides, mus, shapes)
def test_low_pass_is_the_complex_fft_with_the_shifted_mask(h: int, w: int, mu: float, shape: str) -> None:
    x = maps(h, w)
    u, v = np.meshgrid(np.arange(h) - h // 2, np.arange(w) - w // 2, indexing="ij")
    inside = (np.abs(u) <= mu * h + 1e-6) & (np.abs(v) <= mu * w + 1e-6)
    if shape == "disc" and mu < 0.5:
        inside = np.hypot(u / h, v / w) <= mu + 1e-6
    spectrum = np.fft.fftshift(np.fft.fft2(x.numpy())) * (inside | (mu >= 0.5))
    expected = np.fft.ifft2(np.fft.ifftshift(spectrum))
    np.testing.assert_allclose(low_pass(x, mu, shape).numpy(), expected.real, atol=1e-12)
    np.testing.assert_allclose(expected.imag, 0, atol=1e-12)


@given(sides, sides, st.floats(0.5, 3), shapes)
def test_full_pass_leaves_no_high_band(h: int, w: int, mu: float, shape: str) -> None:
    x = torch.randn(2, h, w)
    low, high = split_bands(x, mu, shape)
    assert torch.equal(low, x) and not high.any()
    assert lowpass_mask(h, w, mu, shape).all()


@given(sides, sides, mus, shapes)
def test_constant_maps_have_no_high_band(h: int, w: int, mu: float, shape: str) -> None:
    high = split_bands(torch.full((h, w), 7.0), mu, shape)[1]
    assert high.abs().max() < 1e-5


def test_bands_are_linear() -> None:
    x, y = maps(9, 12), maps(9, 12)
    torch.testing.assert_close(low_pass(2 * x - 3 * y, 0.2), 2 * low_pass(x, 0.2) - 3 * low_pass(y, 0.2))


@quick
@given(st.integers(0, 11), st.integers(0, 8), shapes)
def test_bands_follow_circular_shifts(down: int, right: int, shape: str) -> None:
    x = maps(12, 9, 4)
    moved = torch.roll(x, (down, right), (-2, -1))
    for part, moved_part in zip(split_bands(x, 0.22, shape), split_bands(moved, 0.22, shape), strict=True):
        torch.testing.assert_close(torch.roll(part, (down, right), (-2, -1)), moved_part)


def test_low_pass_is_a_projection() -> None:
    x = maps(14, 14)
    once = low_pass(x, 0.3)
    torch.testing.assert_close(low_pass(once, 0.3), once)


def test_larger_mu_keeps_more() -> None:
    kept = [lowpass_mask(20, 30, mu, shape).sum() for shape in ("square", "disc") for mu in (0, 0.1, 0.2, 0.3, 0.4, 0.5)]
    assert kept[:6] == sorted(kept[:6]) and kept[6:] == sorted(kept[6:]) and kept[0] == kept[6] == 1


@quick
@given(sides, sides, st.lists(st.floats(0.01, 0.7), max_size=4, unique=True), shapes)
def test_bands_sum_to_the_map_and_carry_its_energy(h: int, w: int, edges: list[float], shape: str) -> None:
    x = maps(h, w, 2)
    bands = band_stack(x, sorted(edges), shape)
    assert bands.shape == (len(edges) + 1, 2, h, w)
    torch.testing.assert_close(bands.sum(0), x, atol=1e-13, rtol=0)
    torch.testing.assert_close(bands.square().sum(), x.square().sum())


def test_band_stack_of_one_edge_is_the_split() -> None:
    x = torch.randn(3, 10, 11)
    torch.testing.assert_close(band_stack(x, (0.3,)), torch.stack(split_bands(x, 0.3)))


@pytest.mark.parametrize("call", [
    lambda x: low_pass(x, -0.1), lambda x: low_pass(x, 0.1, "hexagon"), lambda x: band_stack(x, (0.3, 0.2)),
    lambda x: radial_power_spectrum(x, bins=1), lambda x: SpectralFilter(3, (4, 4), init="ones"),
    lambda x: SpectralFilter(3, (4, 4), beyond="wrap"), lambda x: SpectralFilter(3, (4, 4))(x[None, :2]),
    lambda x: invert_attention(torch.eye(17), (4, 4)), lambda x: invert_attention(torch.eye(16), (4, 4), filtered="both"),
])
def test_wrong_arguments_are_named(call) -> None:
    with pytest.raises(ValueError, match=r"\w+"):
        call(torch.randn(3, 4, 4))


# ---- filters --------------------------------------------------------------------------------------------------------

def test_radial_filter_equals_the_full_complex_transform() -> None:
    x, transfer = maps(7, 10, 3), butterworth_transfer(0.2)
    expected = torch.fft.ifft2(torch.fft.fft2(x) * transfer(radial_frequency(7, 10))).real
    torch.testing.assert_close(radial_filter(x, transfer), expected)


@given(sides, sides, st.floats(0.02, 0.6))
def test_a_filter_and_its_complement_sum_to_the_map(h: int, w: int, cutoff: float) -> None:
    x, transfer = maps(h, w), gaussian_transfer(cutoff)
    torch.testing.assert_close(radial_filter(x, transfer) + radial_filter(x, complement(transfer)), x)


@pytest.mark.parametrize("transfer", [gaussian_transfer(0.2), butterworth_transfer(0.2, 3)])
def test_smooth_filters_pass_the_mean_and_half_the_power_at_cutoff(transfer) -> None:
    gain = transfer(torch.tensor([0.0, 0.2, 0.5]))
    torch.testing.assert_close(gain[:2], torch.tensor([1.0, 0.5**0.5]))
    assert gain[2] < 0.25


def test_gradients_of_bands_and_filters() -> None:
    x, cutoff = maps(5, 6).requires_grad_(), torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: split_bands(m, 0.2), x)
    assert torch.autograd.gradcheck(lambda m: band_stack(m, (0.1, 0.3)), x)
    assert torch.autograd.gradcheck(lambda m, c: radial_filter(m, lambda r: (-(r.double() / c).square()).exp()), (x, cutoff))
    assert torch.autograd.gradcheck(lambda m: radial_power_spectrum(m, 5)[1], x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_comes_back_as_it_went_in(dtype: torch.dtype) -> None:
    x = torch.randn(2, 6, 7, 9).to(dtype)
    layer = SpectralFilter(6, (7, 9), init="identity")
    w = attention(3, 4).to(dtype)
    results = [*split_bands(x, 0.2), band_stack(x), radial_filter(x, gaussian_transfer(0.2)), layer(x), layer.to(dtype)(x),
               invert_attention(w, (3, 4)), invert_attention(w, (3, 4), gaussian_transfer(0.2))]
    assert all(y.dtype == dtype and y.isfinite().all() for y in results)
    torch.testing.assert_close(low_pass(x, 0.2).double(), low_pass(x.double(), 0.2), atol=2e-2, rtol=2e-2)


# ---- power ----------------------------------------------------------------------------------------------------------

@given(sides, sides)
def test_parseval(h: int, w: int) -> None:
    x = maps(h, w, 2, 3)
    torch.testing.assert_close(spectral_energy(x).sum((-2, -1)), x.square().sum((-2, -1)))
    torch.testing.assert_close(from_spectrum(to_spectrum(x), x), x)


@given(st.integers(2, 17), st.integers(2, 17), st.one_of(st.none(), st.integers(2, 30)))
def test_power_spectrum_sums_to_the_energy(h: int, w: int, bins: int | None) -> None:
    x = maps(h, w, 2, 3)
    frequency, power = radial_power_spectrum(x, bins)
    torch.testing.assert_close(power.sum(-1), x.square().mean(1).sum((-2, -1)))
    assert frequency.shape == power.shape[-1:] and frequency[0] == 0
    assert abs(frequency[-1] - 0.5**0.5) < 1e-6


@pytest.mark.parametrize("cycles", [1, 3, 7])
def test_a_wave_shows_up_at_its_frequency(cycles: int) -> None:
    wave = torch.cos(2 * torch.pi * cycles * torch.arange(28) / 28).expand(28, 28)
    frequency, power = radial_power_spectrum(wave)
    assert abs(frequency[power.argmax()] - cycles / 28) <= 0.5 / 28
    assert high_frequency_share(wave, cutoff=cycles / 28 - 0.01) > 0.999
    assert high_frequency_share(wave, cutoff=cycles / 28 + 0.01) < 0.001


def test_the_first_ring_is_the_mean() -> None:
    power = radial_power_spectrum(torch.full((3, 14, 14), 2.0))[1]
    torch.testing.assert_close(power[0], torch.tensor(4.0 * 14 * 14))
    assert power[1:].abs().max() < 1e-3


def test_high_frequency_share_ignores_the_mean_and_survives_constants() -> None:
    x = torch.randn(4, 5, 8, 9)
    torch.testing.assert_close(high_frequency_share(x + 10), high_frequency_share(x), atol=1e-4, rtol=1e-4)
    constant = torch.zeros(8, 9, requires_grad=True)
    share = high_frequency_share(constant)
    share.backward()
    assert share == 0 and constant.grad.isfinite().all()


# ---- the learned filter ---------------------------------------------------------------------------------------------

@given(st.integers(2, 17), st.integers(2, 17), sides, sides)
def test_identity_zero_and_mean_stay_themselves_on_any_grid(h: int, w: int, h2: int, w2: int) -> None:
    x = torch.randn(1, 2, h2, w2)
    torch.testing.assert_close(SpectralFilter(2, (h, w), "identity")(x), x, atol=1e-5, rtol=1e-4)
    nothing = SpectralFilter(2, (h, w), "zero")
    assert not nothing(x).any()
    with torch.no_grad():
        nothing.weight[0, 0, :, 0] = 1
    torch.testing.assert_close(nothing(x), x.mean((-2, -1), keepdim=True).expand_as(x), atol=1e-5, rtol=1e-4)


@quick
@given(sides, sides, st.integers(0, 9), st.integers(0, 9), st.sampled_from(["hold", "zero"]))
def test_filtering_commutes_with_enlarging(h: int, w: int, more_h: int, more_w: int, beyond: str) -> None:
    x, size = maps(h, w, 1, 2), (h + more_h, w + more_w)
    layer = SpectralFilter(2, (h, w), std=1.0, beyond=beyond).double()
    torch.testing.assert_close(layer(enlarge(x, size)), enlarge(layer(x), size), atol=1e-10, rtol=0)


@quick
@given(sides, sides, sides, sides)
def test_resizing_a_filter_treats_up_and_down_alike(h: int, w: int, h2: int, w2: int) -> None:
    def flip(maps_: torch.Tensor) -> torch.Tensor:
        return torch.roll(maps_.flip(-2), 1, -2)

    x, layer = maps(h2, w2, 1, 2), SpectralFilter(2, (h, w), std=1.0).double()
    mirrored = SpectralFilter(2, (h, w)).double()
    mirrored.load_state_dict({"weight": layer.weight.detach()[-torch.arange(h) % h]})
    torch.testing.assert_close(mirrored(flip(x)), flip(layer(x)), atol=1e-10, rtol=0)


def test_resizing_to_the_same_grid_changes_nothing() -> None:
    response = torch.randn(6, 5, 3, dtype=torch.complex64)
    assert torch.equal(resize_response(response, (6, 8), (6, 8)), response)


def test_enlarged_then_reduced_response_acts_as_before() -> None:
    x, layer = maps(6, 7, 1, 2), SpectralFilter(2, (6, 7), std=1.0).double()
    back = resize_response(resize_response(layer.response(), (6, 7), (13, 15)), (13, 15), (6, 7))
    torch.testing.assert_close(from_spectrum(to_spectrum(x) * back.permute(2, 0, 1), x), layer(x))


def test_learned_filter_follows_circular_shifts() -> None:
    x, layer = torch.randn(2, 5, 8, 9), SpectralFilter(5, (8, 9), std=1.0)
    torch.testing.assert_close(layer(x.roll((3, 2), (-2, -1))), layer(x).roll((3, 2), (-2, -1)), atol=1e-5, rtol=1e-4)


def test_a_unimodular_hermitian_filter_preserves_energy() -> None:
    phase = torch.fft.rfft2(torch.randn(4, 8, 9))
    layer = SpectralFilter(4, (8, 9))
    layer.load_state_dict({"weight": torch.view_as_real(phase / phase.abs()).permute(1, 2, 0, 3)})
    x = torch.randn(2, 4, 8, 9)
    torch.testing.assert_close(layer(x).square().sum(), x.square().sum())


def test_normal_initialisation_has_the_stated_spread() -> None:
    weight = SpectralFilter(64, (14, 14), std=0.02).weight
    assert weight.shape == (14, 8, 64, 2) and abs(weight.std() - 0.02) < 1e-3


def test_gradients_reach_the_learned_filter_on_every_grid() -> None:
    layer = SpectralFilter(1, (4, 4), std=1.0).double()
    for size in [(4, 4), (5, 6), (3, 2)]:
        x = maps(*size, 1, 1).requires_grad_()
        assert torch.autograd.gradcheck(lambda w, m: torch.func.functional_call(layer, {"weight": w}, (m,)),
                                        (layer.weight.detach().clone().requires_grad_(), x))


# ---- inverse attention ----------------------------------------------------------------------------------------------

@quick
@given(st.integers(1, 7), st.integers(1, 7), st.sampled_from(["difference", "identity"]))
def test_the_all_pass_gives_identity_minus_attention(h: int, w: int, filtered: str) -> None:
    matrix = attention(h, w, 2)
    expected = torch.eye(h * w) - matrix
    assert torch.equal(invert_attention(matrix, (h, w)), expected)
    spectral = invert_attention(matrix, (h, w), torch.ones_like, filtered)
    torch.testing.assert_close(spectral, expected, atol=1e-6, rtol=0)


def test_attention_and_its_inverse_sum_to_identity() -> None:
    matrix = attention(5, 6, 2, 3)
    total = matrix + invert_attention(matrix, (5, 6))
    torch.testing.assert_close(total, torch.eye(30).expand_as(total))


@pytest.mark.parametrize("transfer", [None, gaussian_transfer(0.2), complement(gaussian_transfer(0.2)), lambda r: 1 + r])
def test_constant_features_give_nothing(transfer) -> None:
    inverse = invert_attention(attention(5, 6, 2), (5, 6), transfer)
    assert inverse.sum(-1).abs().max() < 1e-5
    assert (inverse @ torch.full((30, 4), 3.0)).abs().max() < 1e-4


def test_the_printed_form_sums_to_the_gain_at_zero_minus_one() -> None:
    inverse = invert_attention(attention(5, 6), (5, 6), complement(gaussian_transfer(0.2)), filtered="identity")
    torch.testing.assert_close(inverse.sum(-1), torch.full((30,), -1.0), atol=1e-5, rtol=0)


def test_centred_rows_keep_their_values_and_start_at_the_query() -> None:
    matrix = attention(4, 5, 2)
    rows = centre_on_query(matrix, (4, 5))
    assert torch.equal(rows[..., 0, 0], matrix.diagonal(dim1=-2, dim2=-1))
    assert torch.equal(rows[0, 7, 1, 2], matrix[0, 7, 14])  # query (1, 2), key (2, 4)
    torch.testing.assert_close(rows.flatten(-2).sort(-1).values, matrix.sort(-1).values)


def test_filtering_centred_rows_is_the_same_as_filtering_rows_in_place() -> None:
    matrix, transfer = attention(5, 6), butterworth_transfer(0.2)
    pulse = centre_on_query(torch.eye(30), (5, 6))
    centred = radial_filter(pulse - centre_on_query(matrix, (5, 6)), transfer)
    torch.testing.assert_close(centre_on_query(invert_attention(matrix, (5, 6), transfer), (5, 6)), centred)


def test_gradients_of_inverse_attention() -> None:
    matrix = attention(2, 3).double().requires_grad_()
    for filtered in ("difference", "identity"):
        assert torch.autograd.gradcheck(lambda m, f=filtered: invert_attention(m, (2, 3), gaussian_transfer(0.3), f), matrix)
    assert torch.autograd.gradcheck(lambda m: invert_attention(m, (2, 3)), matrix)


@pytest.mark.cuda
def test_cuda_equals_cpu() -> None:
    x, layer = torch.randn(2, 5, 9, 12), SpectralFilter(5, (7, 7), std=1.0)
    torch.testing.assert_close(low_pass(x.cuda(), 0.2).cpu(), low_pass(x, 0.2), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.cuda()(x.cuda()).cpu(), layer.cpu()(x), atol=1e-5, rtol=1e-4)
    w = attention(3, 4)
    inverse = invert_attention(w.cuda(), (3, 4), gaussian_transfer(0.2))
    torch.testing.assert_close(inverse.cpu(), invert_attention(w, (3, 4), gaussian_transfer(0.2)), atol=1e-5, rtol=1e-4)
