"""Ten-line programs as somebody writes them who has read help() and nothing else: each works at the first try, or says what to write."""

import numpy as np
import pytest
import torch
from PIL import Image

import freqseg
from freqseg.files import InputError


@pytest.fixture(scope="module")
def clip():
    "The CLIP that ships."
    return freqseg.load_clip("world")


@pytest.fixture(scope="module")
def features(clip):
    "A scene, encoded for whatever follows."
    return clip.encode(clip.preprocess(freqseg.scene(48).image), tokens=range(5), attention=range(6))


def test_maps_of_a_photograph(tmp_path) -> None:
    picture = tmp_path / "photo.png"
    Image.fromarray(freqseg.scene(48).image).save(picture)
    maps = freqseg.cam(str(picture), "star, wheel", model="world")
    assert maps["gradcam"].shape[0] == 2 and maps.save(tmp_path / "out")


def test_frequency_cams_and_their_panel(clip) -> None:
    from freqseg.faces.plots import cam_panel
    from freqseg.maps import frequency_cams
    image = freqseg.scene(48).image
    images, text = clip.preprocess(image), clip.encode_text(["star", "wheel"])
    assert images.shape[-2:] == (224, 224)  # twice the native 112, as the command shows it
    maps = frequency_cams(clip, images, text, torch.ones(1, 2, dtype=torch.bool), methods=("gradcam", "low", "high"))
    assert cam_panel(image, maps, ["star", "wheel"])._repr_png_()


def test_a_photograph_keeps_its_shape(clip) -> None:
    wide = np.zeros((300, 400, 3), np.uint8)
    assert clip.preprocess(wide).shape == (1, 3, 168, 224)
    assert clip.preprocess([wide, wide[:, :100]]).shape == (2, 3, 224, 224)


def test_bands_of_tokens(features) -> None:
    low, high = freqseg.split_bands(features.tokens[4], mu=.2)
    assert torch.allclose(low + high, features.tokens[4], atol=1e-4)


def test_sinkhorn_of_attention(features) -> None:
    from freqseg.sinkhorn import doubly_stochastic
    smooth = doubly_stochastic(features.patch_attention(5), symmetric="average")
    assert torch.allclose(smooth.sum(-1), torch.ones(()), atol=1e-3)


def test_transport_of_scores() -> None:
    from freqseg.sinkhorn import transport
    plan = transport(torch.rand(2, 196, 3), torch.ones(2, 3) / 3)
    assert torch.allclose(plan.sum((1, 2)), torch.ones(2), atol=1e-3)


def test_the_wavelet_decoder_reads_what_the_tower_gives(clip, features) -> None:
    from freqseg.decoders import wtclip_decoder
    decoder = wtclip_decoder(clip.width, 5, 21, levels=2).eval()
    logits = decoder(features.tokens).logits
    assert logits.shape == (1, 21, *features.grid)
    assert torch.equal(logits, decoder([features.tokens[block] for block in range(5)]).logits)
    with pytest.raises(InputError, match="5 token maps"): decoder({0: features.tokens[0]})


def test_a_spectral_prompt_takes_the_cls_token_in_either_shape() -> None:
    from freqseg.spectral_prompts import SpectralPrompts
    grid, x = (14, 14), torch.randn(2, 196, 128)
    prompts = SpectralPrompts(128, grid)
    prompted = prompts(0, x, x[:, :1], grid)
    assert prompted.shape == x.shape and torch.equal(prompted, prompts(0, x, x[:, 0], grid))
    with pytest.raises(InputError, match=r"cls \(2, 64\) .* expected \(2, 128\)"): prompts(0, x, x[:, 0, :64], grid)


def test_metrics_of_a_prediction() -> None:
    from freqseg.metrics import boundary_iou, class_iou, confusion_matrix, mean_iou
    truth = np.array([[0, 0, 1, 1], [0, 255, 1, 3]], np.uint8)
    pred = np.array([[0, 1, 1, 1], [0, 2, 1, 1]])
    assert mean_iou(pred, truth) == mean_iou(confusion_matrix(pred, truth, 4))
    assert torch.equal(class_iou(torch.tensor(pred), truth).nan_to_num(9), class_iou(confusion_matrix(pred, truth, 4)).nan_to_num(9))
    assert mean_iou(pred, truth, average=[0, 1]) == pytest.approx((2 / 3 + 3 / 5) / 2)
    assert boundary_iou(pred, truth, 4).miou > 0
    with pytest.raises(InputError, match="a prediction and its ground truth"): mean_iou(pred)


def test_dfa_masks_of_a_picture(tmp_path) -> None:
    mask = freqseg.segment(freqseg.scene(48), model="dfa")
    assert mask.save(tmp_path) and "star" in repr(mask)


def test_dfa_own_predictions(clip) -> None:
    system = freqseg.load_system("dfa")
    images = system.backbone.preprocess(freqseg.scene(48).image)
    assert system.predict(images).shape[:2] == (1, 21)


def test_a_misspelt_parameter_of_a_training_is_refused() -> None:
    with pytest.raises(InputError, match="iterations"): freqseg.train("dfa", iteration=5)
