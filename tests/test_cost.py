"""What a system costs: counts against hand counts and other formulas, memory against known arrays, and a system that is left as it was."""

import json
import math
from dataclasses import fields
from functools import partial

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

import freqseg.work.cost as room
from freqseg.systems.segmenter import SYSTEMS, known_systems, system_named
from freqseg.faces.cli import main
from freqseg.clip import Backbone, build_clip, load_clip, named_config
from freqseg.work.cost import FORMULAS, FlopTally, conditions, cost_classes, cost_markdown, measure_cost, measure_costs, parts_markdown, peak_memory, wall_clock
from freqseg.lists import COCO_CLASSES, VOC_CLASSES, VOC_ZERO_SHOT, Domain
from freqseg.files import InputError
from freqseg.systems.segmenter import Segmenter, System
from freqseg.systems.weclip import WeCLIP
from freqseg.world.scenes import WORLD_CLASSES, WORLD_DOMAIN

CPU = torch.device("cpu")


def flops(work) -> int:
    "Operations of a call by the room's formulas."
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        work()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def backbone():
    return load_clip("world")


@pytest.fixture
def system(backbone) -> Segmenter:
    torch.manual_seed(0)
    return system_named("wtclip").build(backbone, WORLD_CLASSES, dim=32)


# ---- formulas -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("call, points, real, maps", [
    (lambda: torch.fft.rfft2(torch.randn(2, 3, 8, 12)), 96, True, 6),
    (lambda: torch.fft.irfft2(torch.randn(5, 8, 7, dtype=torch.complex64), s=(8, 12)), 96, True, 5),
    (lambda: torch.fft.fft2(torch.randn(4, 16, 16, dtype=torch.complex64)), 256, False, 4),
    (lambda: torch.fft.fft(torch.randn(3, 64, dtype=torch.complex64)), 64, False, 3),
    (lambda: torch.fft.rfft(torch.randn(3, 64)), 64, True, 3)])
def test_a_fourier_transform_counts_five_n_log_n_and_half_of_it_for_real_values(call, points: int, real: bool, maps: int) -> None:
    assert flops(call) == round(maps * 5 * points * math.log2(points) / (2 if real else 1))


def test_the_gradient_of_a_fourier_transform_is_one_more_transform() -> None:
    x = torch.randn(2, 16, 16, requires_grad=True)
    assert flops(lambda: torch.fft.rfft2(x).abs().sum().backward()) >= 2 * flops(lambda: torch.fft.rfft2(x))


@pytest.mark.parametrize("queries, keys", [(50, 50), (17, 5)])
def test_fused_attention_counts_what_it_counts_written_out(queries: int, keys: int) -> None:
    query, key = torch.randn(2, 4, queries, 16), torch.randn(2, 4, keys, 16)
    fused = flops(lambda: F.scaled_dot_product_attention(query, key, key))
    assert fused == flops(lambda: (query @ key.mT).softmax(-1) @ key) == 2 * 2 * 2 * 4 * queries * keys * 16
    # Backward: the scores once more, and four products for three gradients.
    query, key = query.requires_grad_(), key.requires_grad_()
    assert flops(lambda: F.scaled_dot_product_attention(query, key, key).sum().backward()) == fused // 2 * (2 + 5)


@pytest.mark.parametrize("shape, weight, options", [
    ((2, 6, 9, 7), (8, 6, 3, 3), dict(padding=1)), ((2, 6, 9, 7), (6, 1, 2, 2), dict(groups=6, stride=2)), ((1, 4, 8), (8, 2, 3), dict(groups=2))])
def test_the_gradients_of_a_convolution_count_as_much_as_itself_each(shape, weight, options) -> None:
    convolve = {3: F.conv1d, 4: F.conv2d}[len(shape)]
    x, taps = torch.randn(shape, requires_grad=True), torch.randn(weight, requires_grad=True)
    out = convolve(x, taps, **options)
    forward = flops(lambda: convolve(x, taps, **options))
    assert forward == conv_flop_count(list(shape), list(weight), list(out.shape)) == 2 * out.numel() * math.prod(weight[1:])
    assert flops(lambda: convolve(x, taps, **options).sum().backward()) == 3 * forward
    assert flops(lambda: convolve(x.detach(), taps, **options).sum().backward()) == 2 * forward


def test_the_gradients_of_a_transposed_convolution_count_as_much_as_itself_each() -> None:
    x, taps = torch.randn(2, 6, 5, 5, requires_grad=True), torch.randn(6, 1, 2, 2, requires_grad=True)
    forward = flops(lambda: F.conv_transpose2d(x, taps, stride=2, groups=6))
    assert forward == 2 * x.numel() * 4
    assert flops(lambda: F.conv_transpose2d(x, taps, stride=2, groups=6).sum().backward()) == 3 * forward


def test_formulas_of_ungrouped_convolutions_agree_with_pytorch_s() -> None:
    x, taps = torch.randn(2, 6, 9, 7, requires_grad=True), torch.randn(8, 6, 3, 3, requires_grad=True)
    with FlopCounterMode(display=False) as theirs:
        F.conv2d(x, taps).sum().backward()
    assert flops(lambda: F.conv2d(x, taps).sum().backward()) == theirs.get_total_flops()


# ---- a whole system -------------------------------------------------------------------------------------------------

def test_weclip_on_a_vit_b_16_against_a_hand_count() -> None:
    side, width, blocks = 64, 768, 11   # a prediction reads the outputs of all blocks but the last
    config = named_config("ViT-B-16", quick_gelu=True)
    config["text_cfg"] |= {"width": 64, "heads": 1, "layers": 1}   # the prompts are embedded when a system is built, and need no large tower here
    backbone = Backbone(build_clip(config), "ViT-B-16", open_clip.get_tokenizer("ViT-B-16"), recipe={"name": "ViT-B-16"})
    system = WeCLIP.build(backbone, VOC_CLASSES)
    cost = measure_cost(system, side, repeats=1)
    patches = (side // 16) ** 2
    tokens = patches + 1
    embedding = 2 * patches * (3 * 16 * 16) * width
    block = 2 * tokens * width * (3 * width + width + 4 * width + 4 * width) + 2 * 2 * tokens * tokens * width
    assert cost.predict.parts["tower"] == embedding + blocks * block
    assert cost.predict.kinds["fused attention"] >= blocks * 2 * 2 * tokens * tokens * width
    assert cost.trainable == 5_985_045 and cost.parameters == cost.trainable + sum(p.numel() for p in backbone.parameters())
    assert cost.classes == 21 and cost.model == "ViT-B-16, random weights"


def small(name: str, backbone: Backbone) -> System:
    "A system for the world's classes, its decoder small where that is an option."
    options = {"dim": 16} if "dim" in {option.name for option in fields(system_named(name).Options)} else {}
    return system_named(name).build(backbone, WORLD_CLASSES, **options)


@pytest.mark.parametrize("name", known_systems())
def test_parts_and_kinds_add_up_and_pictures_of_a_batch_cost_alike(backbone, name: str) -> None:
    system = small(name, backbone)
    alone, together = (measure_cost(system, 64, batch, repeats=1, training=batch == 1) for batch in (1, 3))
    for effort in (alone.predict, alone.step):
        assert sum(effort.parts.values()) == sum(effort.kinds.values()) == effort.flops > 0
        assert min(effort.parts.values()) > 0 and effort.memory > 0 and effort.milliseconds.low <= effort.milliseconds.median <= effort.milliseconds.high
    if system.supervision == "labels":   # prompts are made once a pass, for however many pictures
        assert alone.predict.parts["tower"] == together.predict.parts["tower"]
    assert .98 * alone.predict.flops < together.predict.flops <= alone.predict.flops   # a decoder may fold its weights once a pass
    assert alone.step.parts["backward"] > 0 and alone.step.flops > alone.predict.flops and alone.step.memory > alone.predict.memory
    assert {"tower", "decoder"} <= set(alone.predict.parts)


def test_a_part_inside_another_counts_once() -> None:
    def product(n: int) -> None:
        torch.randn(n, n) @ torch.randn(n, n)
    tally = FlopTally()
    with tally.counter, tally.within("outer"):
        product(4)
        with tally.within("inner"):
            product(8)
        product(4)
    assert tally.parts == {"outer": 4 * 4**3, "inner": 2 * 8**3} and tally.kinds == {"matrix products": 4 * 4**3 + 2 * 8**3}


def test_attention_grows_with_the_fourth_power_of_the_side(system) -> None:
    small, large = (measure_cost(system, side, repeats=1).predict.kinds["fused attention"] for side in (64, 128))
    assert 14 < large / small < 16.1


def test_bf16_costs_as_many_operations(system) -> None:
    short, full = (measure_cost(system, 64, repeats=1, precision=precision) for precision in ("bf16", "fp32"))
    assert short.predict.flops == full.predict.flops and short.precision == "bf16" and full.precision == "fp32"
    assert short.predict.memory < full.predict.memory


# ---- the system afterwards ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, mode", [(name, bool(place % 2)) for place, name in enumerate(known_systems())])
def test_measuring_leaves_the_system_as_it_was(backbone, name: str, mode: bool) -> None:
    system = small(name, backbone).train(mode)
    before, numbers = {key: value.clone() for key, value in system.state_dict().items()}, torch.get_rng_state()
    measure_cost(system, 64, repeats=1, training=True)
    assert all(torch.equal(value, before[key]) for key, value in system.state_dict().items())
    assert torch.equal(torch.get_rng_state(), numbers) and system.training is mode and not system.backbone.training
    assert all(parameter.grad is None for parameter in system.parameters())
    assert not {*room.TOWER_STEPS} & {*vars(system.backbone)} and not any("forward" in vars(module) for module in system.modules())


def test_a_failure_leaves_the_system_as_it_was(system, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: object, **options: object) -> None:
        raise torch.OutOfMemoryError("no more")
    monkeypatch.setattr(type(system), "decode", fails)
    with pytest.raises(InputError, match="wtclip runs out of memory on cpu with 2 pictures of 64 x 64: lower batch or size"):
        measure_cost(system.train(), 64, 2)
    assert system.training and not {"forward", *room.TOWER_STEPS} & {*vars(system.backbone), *vars(system.decoder)}


# ---- memory and time ------------------------------------------------------------------------------------------------

def test_the_peak_is_that_of_arrays_alive_together() -> None:
    def work() -> torch.Tensor:
        first = torch.zeros(1000)
        second = first.clone()
        del first
        third = second.clone()
        del second
        return third
    assert peak_memory(work, CPU) == 8000
    assert peak_memory(lambda: [torch.zeros(1000) for _ in range(5)], CPU) == 20_000
    assert peak_memory(lambda: None, CPU) == 0


def test_the_peak_is_the_same_every_time_and_grows_with_the_batch(system) -> None:
    peaks = [peak_memory(partial(system.eval().predict, torch.zeros(batch, 3, 64, 64)), CPU) for batch in (1, 1, 4)]
    assert peaks[0] == peaks[1] and 3 < peaks[2] / peaks[0] < 5


@pytest.mark.cuda
def test_the_peak_on_cuda_is_the_allocator_s() -> None:
    device = torch.device("cuda")
    assert peak_memory(lambda: torch.zeros(2**20, device=device), device) == 4 * 2**20


def test_time_is_a_median_with_quartiles(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0., 1., 10., 12., 20., 23., 30., 34., 40., 45.])
    monkeypatch.setattr(room.Stopwatch, "now", lambda self: next(ticks))
    assert wall_clock(lambda: None, CPU, 5) == (3000, 2000, 4000)


# ---- several, tables, errors ----------------------------------------------------------------------------------------

def test_systems_come_from_the_registry(own_registry: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Newcomer(WeCLIP): "Known by being defined."
    assert SYSTEMS["newcomer"] is Newcomer and "newcomer" in known_systems()
    monkeypatch.setattr(room, "known_systems", lambda: ["newcomer"])
    cost, = measure_costs(model="world", device="cpu", size=64, repeats=1)
    assert cost.system == "newcomer" and cost.model == "the CLIP of the embedded world" and cost.classes == len(WORLD_CLASSES) + 1
    with pytest.raises(InputError, match="Did you mean 'newcomer'"):
        measure_costs(["newcommer"], "no model is opened for a misspelt system")


def test_tables_have_a_row_for_each_and_say_what_differs(backbone) -> None:
    systems = [system_named(name).build(backbone, WORLD_CLASSES, dim=16) for name in ("weclip", "ffr")]
    costs = [measure_cost(systems[0], 64, repeats=1), measure_cost(systems[1], 64, repeats=1, training=True)]
    table = cost_markdown(costs)
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("|")]
    assert [row[0].strip("| ") for row in rows] == ["system", "---", "weclip", "ffr"] and {len(row) for row in rows} == {9}
    assert rows[2][6] == "–" and "two FLOP" in table and "random" not in table
    assert "head" in parts_markdown(costs) and "weclip" not in parts_markdown(costs, "step")
    other = measure_cost(systems[0], 96, repeats=1)
    assert ("Figures per picture: the CLIP of the embedded world, 20 classes and background, fp32 on CPU" in (told := cost_markdown([costs[1], other]))
            and "; ffr: 1 picture of 64 x 64 at a time; weclip: 1 picture of 96 x 96 at a time; PyTorch" in told)
    assert "backward: gradients" in parts_markdown(costs, "step") and "backward" not in parts_markdown(costs)
    assert json.loads(json.dumps(costs[1].as_dict()))["step"]["milliseconds"].keys() == {"median", "low", "high"}


@pytest.mark.parametrize("options, message", [
    (dict(size=65), "size=65.*Take 64 or 72"), (dict(size=3), r"Take 8\."), (dict(batch=0), "batch=0"), (dict(repeats=0), "repeats=0"), (dict(size=0), "size=0"),
    (dict(precision="fp8"), "use 'fp32' or 'bf16'")])
def test_what_cannot_be_measured_is_said(system, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        measure_cost(system, **{"size": 64, **options})


def test_tables_of_nothing_are_refused(system) -> None:
    for table in (cost_markdown, conditions):
        with pytest.raises(InputError, match="at least one system"):
            table([])
    with pytest.raises(InputError, match="training=True"):
        parts_markdown([measure_cost(system, 64, repeats=1)], "step")


def test_class_lists_have_names_and_others_are_spelt_out() -> None:
    assert cost_classes(None) == cost_classes(["voc"], WORLD_DOMAIN) == VOC_CLASSES and cost_classes(None, WORLD_DOMAIN) == WORLD_CLASSES
    assert cost_classes(["dog", "grass"]) == ("dog", "grass") and len(cost_classes(["coco"])) == 80
    assert len(cost_classes(["cocostuff"])) == 171 and cost_classes(["VOC"]) == VOC_CLASSES
    with pytest.raises(InputError, match="give a list of names"): cost_classes("dog")


def test_a_system_of_one_class_can_be_measured(backbone) -> None:
    assert measure_cost(system_named("dfa").build(backbone, ("fish",), dim=16), 64, 2, repeats=1, training=True).step.flops > 0


# ---- classes without masks ------------------------------------------------------------------------------------------

@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    "Whoever measures fails."
    def measured(*given: object, **options: object) -> None:
        raise AssertionError("a system was measured")
    monkeypatch.setattr(room, "measure_cost", measured)


def test_the_last_class_is_unseen_where_no_split_is_published() -> None:
    costs = measure_costs(["weclip", "zegclip", "sptseg", "weclip"], "world", ["fish", "tree", "moon"], "cpu", size=64, repeats=1)
    assert [(cost.system, cost.classes, cost.background, cost.unseen) for cost in costs] == [
        ("weclip", 4, True, None), ("zegclip", 3, False, "moon"), ("sptseg", 3, False, "moon")]
    told = cost_markdown(costs)
    assert "zegclip, sptseg: no split of these classes is published, so the last, moon, is taken as unseen" in told
    assert "weclip: 3 classes and background; zegclip, sptseg: 3 classes;" in told and costs[1].as_dict()["unseen"] == "moon"
    published, = measure_costs(["zegclip"], "world", device="cpu", size=64, repeats=1)
    assert published.unseen is None and "unseen" not in cost_markdown([published])


def test_coco_has_no_published_split_and_can_be_measured() -> None:
    assert [room._class_without_masks(system_named("zegclip"), classes, Domain()) for classes in (COCO_CLASSES, VOC_CLASSES)] == ["toothbrush", None]


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("options, message", [
    (dict(classes=["fish"]), "needs two classes or more; 'fish' is one.*image labels: .*weclip"),
    (dict(classes=["fish", "fihs"]), "Did you mean 'fish'"), (dict(size=70), "Take 64 or 72"), (dict(repeats=0), "repeats=0")])
def test_nothing_is_measured_where_one_of_the_systems_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        measure_costs(model="world", device="cpu", **options)


def test_no_system_is_measured_before_all_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    measure, build = room.measure_cost, System.build.__func__
    monkeypatch.setattr(System, "build", classmethod(lambda kind, *given, **options: done.append("build") or build(kind, *given, **options)))
    monkeypatch.setattr(room, "measure_cost", lambda *given, **options: done.append("measure") or measure(*given, **options))
    measure_costs(["weclip", "zegclip"], "world", ["fish", "moon"], "cpu", size=64, repeats=1)
    assert done == ["build", "build", "measure", "measure"]


def test_training_pictures_show_two_classes_that_have_masks(backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    zegclip = system_named("zegclip")
    def present(system: System, batch: int = 16) -> list[set[int]]:
        pictures = room._pictures(system, 16, batch)
        assert all(set(row.nonzero()[:, 0].tolist()) == set((mask.unique() - system.num_classes + len(system.classes)).tolist())
                   for row, mask in zip(pictures.labels, pictures.masks))
        return [set(mask.unique().tolist()) for mask in pictures.masks]
    world = zegclip.build(backbone, WORLD_CLASSES)
    assert all(len(shown) == 2 and shown <= set(world.split.seen_index) for shown in present(world)) and len(set.union(*present(world))) > 8
    assert present(zegclip.build(backbone, ("fish", "moon"), unseen=("moon",)), 2) == [{0}, {0}]
    assert present(system_named("weclip").build(backbone, ("fish", "moon"), dim=16), 2) == [{1, 2}, {1, 2}]
    monkeypatch.setattr(world, "split", VOC_ZERO_SHOT)   # 20 classes, too
    assert all(len(shown) == 2 and shown <= set(VOC_ZERO_SHOT.seen_index) for shown in present(world))


def test_a_prediction_for_names_that_were_never_seen_can_be_measured(backbone) -> None:
    system = system_named("zegclip").build(backbone, ("fish", "moon"), unseen=("moon",)).with_vocabulary(("tree", "moon"))
    assert not system.split.seen and measure_cost(system, 64, repeats=1).classes == 2


# ---- the command ----------------------------------------------------------------------------------------------------

def test_the_command_prints_tables_and_writes_json(tmp_path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["cost", "weclip", "ffr", "--model", "world", "--device", "cpu", "--size", "64", "--repeats", "1", "--training", "--out", str(tmp_path / "cost.json")]
    assert main(words) == 0
    said = capfd.readouterr()   # what libraries say in C++, too
    assert "GFLOP, predict" in said.out and "GFLOP, step" in said.out and not said.err
    assert [cost["system"] for cost in json.loads((tmp_path / "cost.json").read_text())] == ["weclip", "ffr"]


@pytest.mark.parametrize("words, message", [
    (["wecilp"], "Did you mean 'weclip'"), (["dfa", "--size", "100"], "Take 96 or 104"), (["dfa", "--classes", "fihs"], "Did you mean 'fish'"),
    (["zegclip", "--classes", "fish"], "needs two classes or more")])
def test_what_the_command_cannot_do_is_said(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--size", "64"] if "--size" not in words else []
    assert main(["cost", *words, "--model", "world", "--device", "cpu", "--repeats", "1", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("path, message", [
    ("file/cost.json", "cannot write into file"),
    ("/dev/null/cost.json", "cannot write into /dev/null"), ("/dev/null", "no ordinary file"), ("/proc/cost/cost.json", "cannot write into /proc/cost")])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, monkeypatch, capsys, path: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(["cost", "dfa", "--model", "world", "--device", "cpu", "--size", "64", "--out", path]) == 2
    assert message in capsys.readouterr().err and [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_trained_system_is_measured_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "weclip", "--device", "cpu", "--size", "64", "--repeats", "1"]
    assert main(["cost", *words]) == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith(("weclip ", "dfa "))]
    assert rows == ["weclip", "weclip"]
    assert main(["cost", "dfa", *words]) == 2
    assert "weclip is a trained system: measure it alone" in capsys.readouterr().err


def test_json_of_your_own_classes_goes_into_a_new_folder_or_over_an_old_file(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "cost.json"
    for out in (path, path, path.parent):   # of a folder cost.json
        assert main(["cost", "zegclip", "--model", "world", "--device", "cpu", "--size", "64", "--repeats", "1", "--training", "--classes", "fish,moon", "--out", str(out)]) == 0
        assert json.loads(path.read_text())[0]["unseen"] == "moon" and [entry.name for entry in path.parent.iterdir()] == ["cost.json"]
    assert "so the last, moon, is taken as unseen" in " ".join(capsys.readouterr().out.split())
