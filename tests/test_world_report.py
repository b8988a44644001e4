"""The world's report card: its parts against independent computations."""
import json

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from freqseg.clip import Backbone, load_clip
from freqseg.files import shipped
from freqseg.metrics import confusion_matrix, mean_iou
from freqseg.world.scenes import World
from freqseg.world.report import (SOURCES, THRESHOLDS, mean_interval, measure_world, pooled_ceiling, report_table, sampled_auc, seed_figures)


def test_sampled_auc_over_all_patches_is_sklearns():
    torch.manual_seed(0)
    related, labels = torch.rand(1, 12, 12), torch.randint(0, 3, (1, 12))
    both = related[0] + related[0].T
    i, j = np.triu_indices(12, 1)
    expected = roc_auc_score((labels[0][i] == labels[0][j]).numpy(), both[i, j].numpy())
    assert float(sampled_auc(related, labels, count=12)) == pytest.approx(expected, abs=1e-6)


def test_the_ceiling_of_a_grid_as_fine_as_the_mask_is_perfect():
    mask = torch.from_numpy(World(0, "test", 64)[3].mask).long()[None]
    same = pooled_ceiling(mask, (64, 64))
    assert (same == mask)[mask != 255].all()
    coarse = pooled_ceiling(mask, (8, 8))
    assert mean_iou(confusion_matrix(coarse, mask, 21)) < mean_iou(confusion_matrix(same, mask, 21))


def test_interval_holds_its_mean_and_forgets_nan():
    value, low, high = mean_interval(torch.tensor([1., 2., 3., float("nan")]))
    assert value == 2 and 1 <= low <= value <= high <= 3


def test_thresholds_come_from_the_tuning_scenes_alone():
    """On the tuning scenes threshold 3 is right, on the test scenes it would be threshold 5."""
    def perfect_at(index):
        counts = torch.ones(4, len(THRESHOLDS), 21, 21, dtype=torch.int32)
        counts[:, index] = torch.eye(21, dtype=torch.int32)*10
        return counts
    tuning, test = (dict(raw=perfect_at(index)) for index in (3, 5))
    figures = seed_figures(tuning, test)["raw"]
    assert figures["threshold"] == THRESHOLDS[3] and figures["miou"][0] < 50 and figures["gain"] == [0, 0, 0]


def test_every_scene_is_encoded_once(monkeypatch):
    seen, encode = [], Backbone.encode
    monkeypatch.setattr(Backbone, "encode", lambda self, images, **options: seen.append(len(images)) or encode(self, images, **options))
    report = measure_world(load_clip("world"), scenes=3, tuning_scenes=2, size=64, batch=2)
    assert seen == [2, 2, 1] and set(report["seeds"]) == {"raw", *SOURCES} and len(report["high_share"]) == 6


def test_the_report_that_ships_is_about_the_model_that_ships():
    report = json.loads(shipped("world_report.json").read_text())
    assert report["scenes"] >= 500 and report["model_sha256"] in shipped("world_clip.sha256").read_text()
    table = report_table(report)
    assert all(source in table for source in SOURCES) and "embedded world" in table


def test_the_world_is_a_worthy_opponent():
    """The figures that comparisons of methods rest on, as measured on 500 test scenes."""
    report = json.loads(shipped("world_report.json").read_text())
    source = report["source"]
    assert report["zero_shot_map"]["patches"][0] >= 85
    assert 30 <= report["seeds"]["raw"]["miou"][0] <= 60
    assert report["same_class_auc"][f"{source} used"][0] >= .75
    assert report["seeds"][source]["gain"][1] > 0  # the lower end of the interval
    assert report["ceiling"][0] >= 85
