"""Options: every one is declared with its meaning and its range, and no door lets a value without meaning pass."""

import importlib
import json
import math
import pkgutil
import types
import warnings
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st

import freqseg
from freqseg.faces.cli import main
from freqseg.faces.explorer import View
from freqseg.files import InputError
from freqseg.options import Options, declared, described, kinds, option, parsed, same_option
from freqseg.systems.segmenter import System
from freqseg.systems.segmenter import known_systems, system_named
from freqseg.work.checkpoints import SHIPPED, load_system
from freqseg.work.experiments import Preset, experiment, known_parameters, parse_parameters, plan
from freqseg.work.inference import Inference
from freqseg.work.train import TrainSettings, require_own_folder
from freqseg.world.scenes import World

for _module in pkgutil.walk_packages(freqseg.__path__, "freqseg."): importlib.import_module(_module.name)
NOTEBOOKS = Path(__file__).resolve().parent.parent / "nbs" / "train"


def below(kind: type) -> list[type]:
    "A class's subclasses of every generation."
    return [one for child in kind.__subclasses__() for one in (child, *below(child))]


KINDS = sorted({kind for kind in below(Options) if kind.__module__.startswith("freqseg.")}, key=lambda kind: kind.__name__)
EVERY = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def user_options(kind: type) -> list[tuple[str, Any, Any]]:
    "Name, annotation and declaration of every option that a user gives."
    return [(name, hint, one) for name, (hint, one) in declared(kind).items() if name not in ("settings", "options")]


def parts(hint: Any) -> set[Any]:
    "The plain kinds in an annotation, those inside of tuples, too."
    return {inner for kind in kinds(hint) for inner in (get_args(kind) if get_origin(kind) is tuple else (kind,))} - {Ellipsis}


def made(kind: type, **values: Any) -> Any:
    "Options of a kind; what has no default is given."
    lacking = {one.name: "folder" for one in fields(kind) if one.default is MISSING and one.default_factory is MISSING}
    return kind(**{**lacking, **values})


# ---- how they are declared ------------------------------------------------------------------------------------------

def test_there_are_the_classes_that_are_meant() -> None:
    assert {"DFAOptions", "FFROptions", "Preset", "RunOptions", "TrainSettings", "Inference", "View", "CRFSettings", "DualAffinitySettings",
            *(system.Options.__name__ for system in map(system_named, known_systems()))} <= {kind.__name__ for kind in KINDS}


@EVERY
def test_an_option_says_what_it_means_and_a_number_what_it_may_be(kind: type) -> None:
    for name, hint, one in user_options(kind):
        words = described(one.metadata)
        assert len(words) > 8 and "=" not in words and words[0] in words.lower() + "GLSW2", words   # papermill reads no line with two equals signs
        if parts(hint) & {int, float}: assert {"low", "above", "choices"} & one.metadata.keys(), f"{name}: a number without a least value"
        if one.default is not MISSING: assert getattr(made(kind), name) == one.default


# ---- values without meaning -----------------------------------------------------------------------------------------

NASTY = [math.nan, math.inf, -math.inf, -1, 10**500, -10**500, 99_999_999_999, "", "a\0b", [], {}, {"a": 1}, [[1, 2]], [{}], [math.nan], "nonsense", True, 1j, b"x", object()]
MEANT = {   # values that look nasty and are not: words that name something on a disk or a data set, and where nothing has a meaning
    "nonsense": {"data", "model", "pretrained", "train_split", "val_split", "test_split", "out", "preset"},
    "": {"data", "pretrained"}, "[]": {"background"}, "99999999999": {"seed"}}


def means_something(hint: Any, about: Any, name: str, value: Any) -> bool:
    "May this value be taken?"
    if isinstance(value, bool): return bool in parts(hint)
    if str(value) in MEANT and name in MEANT[str(value)]: return True
    number = isinstance(value, int) and abs(value) < 10**12 and parts(hint) & {int, float}
    low, high = about.get("low", -math.inf), about.get("high", math.inf)
    return bool(number and get_origin(kinds(hint)[0]) is not tuple and "choices" not in about and low <= value <= high and value > about.get("above", -math.inf)
                and value < about.get("below", math.inf))


@EVERY
def test_a_value_without_meaning_is_refused_by_name(kind: type) -> None:
    for name, hint, one in user_options(kind):
        for value in NASTY:
            try: taken = getattr(made(kind, **{name: value}), name)
            except InputError as error: assert name in str(error) and len(str(error)) < 700
            else: assert means_something(hint, one.metadata, name, value), f"{name} took {taken!r}"


@pytest.mark.parametrize(("system", "values"), [
    ("dfa", dict(lambda_l=math.nan)), ("dfa", dict(lambda_h=math.nan)), ("dfa", dict(background_power=math.nan)), ("dfa", dict(background_power=-1)),
    ("dfa", dict(box=math.nan)), ("dfa", dict(epsilon=math.inf)), ("dfa", dict(eps=math.inf)), ("dfa", dict(walk_steps=-1)), ("dfa", dict(par_iterations=-1)),
    ("dfa", dict(decoder_layers=-1)), ("dfa", dict(lambda_relation=-1)), ("weclip", dict(dropout=math.inf)), ("weclip", dict(dropout=-1)),
    ("ffr", dict(lambda_head=math.nan)), ("zegclip", dict(prompts=99_999)), ("sptseg", dict(filter_size=99_999)), ("dfa", dict(dim=99_999)), ("dfa", dict(dim=65)),
    ("dfa", dict(lambda_l=0., lambda_h=0.)), ("wtclip", dict(wavelet="haarr")), ("sptseg", dict(spectral="2-1")), ("ffr", dict(unfreeze="some")),
    ("dfa", dict(vote_window=8))], ids=str)
def test_what_would_train_to_nothing_is_refused_at_every_door(system: str, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = next(iter(values))
    said = system_named(system).Options.renamed.get(name, name)
    out = tmp_path / "run"
    with pytest.raises(InputError, match=said): system_named(system).build(None, (), **values)
    with pytest.raises(InputError, match=said): experiment(system, {**values, "out": str(out)})
    with pytest.raises(InputError, match=said): experiment(system, {**values, "out": str(out), "__name__": "__main__"})   # what papermill has put among a notebook's variables
    words = [word for one, value in values.items() for word in ("-p", f"{one}={value}")]
    for command in (["train", system, "--out", str(out), *words], ["run", str(NOTEBOOKS / f"{system}.ipynb"), "--out", str(out), *words]):
        assert main(command) == 2
        assert f"{name}=" in capsys.readouterr().err   # as it was typed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("values", [dict(scales=[]), dict(scales=None, crop=-5), dict(out=-1), dict(out=""), dict(iterations=10**500), dict(batch=10**500), dict(scales=[[1.]]),
                                    dict(betas={}), dict(data="a\0b"), dict(limit=True), dict(preset=3), dict(crop=99_999), dict(window=9), dict(scenes=(0, 1, 1))], ids=str)
def test_what_belongs_to_a_run_is_refused_too(values: dict[str, Any], tmp_path: Path) -> None:
    name = next(one for one, value in values.items() if value is not None)
    with pytest.raises(InputError, match=name): experiment("dfa", values)


@given(st.sampled_from(sorted({(system, name) for system in known_systems() for names in known_parameters(system).values() for name in names})),
       st.one_of(st.text(max_size=30), st.sampled_from(["nan", "inf", "-inf", "-1", "0", "1e999", "1"*5000, "none", "None", "true", "", ",", "[]", "()", "{}", "[[1]]", "1,2", "1,,2",
                                                        "all", "-1,-2", "0x10", "1_0", "'a'", "٣", "{[]: 1}", "1if 2else 3", "\\d"])))
def test_any_text_is_a_value_of_the_option_or_refused(parameter: tuple[str, str], text: str) -> None:
    system, name = parameter
    try:
        values = parse_parameters(system, [f"{name}={text}"])
        plan(system, {"data": "somewhere", **values})
    except InputError as error: assert len(str(error)) < 1000
    else: assert list(values) == [name]


# ---- names ----------------------------------------------------------------------------------------------------------

def test_a_name_with_a_typo_is_refused_and_not_dropped() -> None:
    with pytest.raises(InputError, match="'iteration'. Did you mean 'iterations'"): experiment("dfa", dict(iteration=5))
    with pytest.raises(InputError, match="'lambda_hh'"): experiment("dfa", dict(lambda_hh=5))


def test_a_notebook_is_told_of_a_name_that_is_nearly_a_parameter() -> None:
    with pytest.warns(UserWarning, match="iteration is no parameter of dfa.*Did you mean iterations"):
        run = experiment("dfa", dict(iteration=5, __name__="__main__"))
    assert run.plan.chosen.settings.iterations == 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        experiment("dfa", dict(path=Path("x"), total=3, iterations=7, warmup=None, __name__="__main__", iteration=object()))


OLDER = {"dfa": dict(blocks=6, eps=.2, walks=3, nothing="prompts", momentum=.99), "weclip": dict(walks=2, radius=8), "wtclip": dict(walks=2, edge_floor=.5, edge_levels=3),
         "ffr": dict(lambda_h=3., pool="max", dilation=5), "zegclip": dict(window=2, self_from=.5), "sptseg": dict(window=2, filter_init="normal")}


@pytest.mark.parametrize("system", known_systems())
def test_older_names_mean_what_they_meant(system: str) -> None:
    kind = system_named(system).Options
    options = kind.read(OLDER[system])
    for old, value in OLDER[system].items():
        if old in kind.renamed: assert getattr(options, kind.renamed[old]) == value
        else:
            with pytest.raises(InputError, match=f"{old}=7: this option is gone"): kind.read({old: 7})
    if system == "dfa": assert kind.read(dict(window=5)).vote_window == 5
    assert TrainSettings.read(dict(power=.9)).lr_power == .9 and View.read(dict(scale="shared")).colour_scale == "shared"


def test_older_names_are_understood_on_the_command_line_with_a_notice() -> None:
    with pytest.warns(UserWarning, match="eps is called epsilon now"): values = parse_parameters("dfa", ["eps=0.2"])
    assert values == dict(epsilon=.2) and plan("dfa", values).options["epsilon"] == .2
    with pytest.warns(UserWarning, match="scale is called resize_range now"): assert parse_parameters("dfa", ["scale=0.5,1"]) == dict(resize_range=(.5, 1.))
    with pytest.warns(UserWarning, match="slide is called window now"): assert parse_parameters("zegclip", ["slide=none"]) == dict(window="none")
    with pytest.warns(UserWarning, match="power is called lr_power now"): assert parse_parameters("ffr", ["power=1"]) == dict(lr_power=1.)
    with pytest.warns(UserWarning, match="edge_floor is gone"): assert parse_parameters("wtclip", ["edge_floor=0.5"]) == {}
    with pytest.warns(UserWarning, match="window is now: side of a sliding window.*vote_window"): assert parse_parameters("dfa", ["window=64"]) == dict(window=64)
    with pytest.raises(InputError, match="edge_floor=0.3: this option is gone"): parse_parameters("wtclip", ["edge_floor=0.3"])
    with pytest.raises(InputError, match="epsilon is given twice"), pytest.warns(UserWarning): parse_parameters("dfa", ["epsilon=0.2", "eps=0.1"])
    with pytest.raises(InputError, match="given twice"): plan("dfa", dict(epsilon=.2, eps=.1))


def test_lambda_h_stays_what_it_is_where_transport_weighs_by_it() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parse_parameters("dfa", ["lambda_h=0.2"]) == dict(lambda_h=.2)
    assert "lambda_h" in known_parameters("dfa")["system"] and "lambda_h" not in known_parameters("ffr")["system"]


@dataclass(frozen=True)
class OldOptions(Options):
    renamed: ClassVar = {"eps": "epsilon"}
    retired: ClassVar = {"floor": .5}
    epsilon: float = option(.1, "sharpness", above=0)
    younger: tuple[int, ...] = option((1, 2), "came later", low=0)


def test_a_run_that_was_begun_under_older_names_goes_on(tmp_path: Path) -> None:
    class Old(System, abstract=True):
        Options = OldOptions
    import torch
    clip = types.SimpleNamespace(recipe={}, named_parameters=lambda: [])
    class Pictures(list):
        ids, classes, labels = ("a",), ("dog",), torch.zeros(1, 1)
    system, its, pictures = Old.__new__(Old), TrainSettings(iterations=9, warmup=2, lr_power=.9), Pictures([0])
    torch.nn.Module.__init__(system)
    object.__setattr__(system, "backbone", clip); system.classes, system.options = ("dog",), OldOptions(epsilon=.2)
    from freqseg.work.train import describe_run
    there = describe_run(system, pictures, its, 4, dict(crop=96, resize_range=[.5, 2.]))
    there["settings"]["power"] = there["settings"].pop("lr_power")
    there["identity"]["scale"] = there["identity"].pop("resize_range")
    there["system"]["config"]["options"] = dict(eps=.2, floor=.5)
    (tmp_path / "run.json").write_text(json.dumps(there))
    require_own_folder(system, pictures, tmp_path, its, dict(crop=96, resize_range=(.5, 2.)))
    there["system"]["config"]["options"] = dict(eps=.3, floor=.4)
    (tmp_path / "run.json").write_text(json.dumps(there))
    with pytest.raises(InputError, match=r"(?s)options.epsilon: 0.3 there, 0.2 now.*options.floor: 0.4 there"):
        require_own_folder(system, pictures, tmp_path, its, dict(crop=96, resize_range=(.5, 2.)))


PREDICTED = {   # of the weights that ship, on the first test scene at 128 pixels: mean and deviation of the logits, pixels by label
    "weclip": (-0.25311, 1.72216, {0: 250, 1: 6}),
    "wtclip": (-0.21044, 1.76722, {0: 251, 1: 5}),
    "dfa": (-0.24138, 1.63602, {0: 247, 1: 9}),
    "ffr": (-0.64071, 1.70649, {0: 250, 1: 6}),
    "zegclip": (-3.70391, 0.43737, {1: 16, 12: 16, 20: 224}),
    "sptseg": (-4.75834, 0.77547, {1: 13, 4: 243}),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_weights_that_were_saved_under_older_names_predict_as_before(name: str) -> None:
    system = load_system(name)
    logits = system.predict(system.backbone.preprocess([World(0, "test")[0].image], 128))
    mean, deviation, counts = PREDICTED[name]
    assert (logits.mean().item(), logits.std().item()) == pytest.approx((mean, deviation), abs=2e-3)
    found = dict(zip(*(values.tolist() for values in system.labels(logits).unique(return_counts=True))))
    assert sum(abs(found.get(label, 0) - counts.get(label, 0)) for label in {*found, *counts}) <= 4


# ---- the parts ------------------------------------------------------------------------------------------------------

def test_an_option_can_be_declared_as_in_another_class() -> None:
    @dataclass(frozen=True)
    class Mine(Options):
        window: int | None = same_option(Inference, "window", 64, low=32)
    assert Mine().window == 64 and described(declared(Mine)["window"][1].metadata) == Inference.explain()["window"]
    with pytest.raises(InputError, match="from 32 to 16384"): Mine(window=8)
    assert same_option(Inference, "flip").default is True


@pytest.mark.parametrize(("text", "hint", "value"), [("8", int | tuple[int, ...], 8), ("3,5", int | tuple[int, ...], (3, 5)), ("-1", tuple[int, ...] | str | None, (-1,)),
                                                     ("all", tuple[int, ...] | str | None, "all"), ("none", str | None, None), ("none", str, "none"), ("1e3", float, 1000.),
                                                     ("(0.5, 2)", tuple[float, float], (.5, 2.)), ("'a b', c", tuple[str, ...] | None, ("a b", "c")), ("No", bool, False)])
def test_a_text_means_what_the_annotation_says(text: str, hint: Any, value: Any) -> None:
    found = parsed("x", text, hint, {})
    assert found == value and type(found) is type(value)


def test_a_preset_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(InputError, match="stride=64 leaves gaps"): Preset("somewhere", window=32, stride=64)
    with pytest.raises(InputError, match="give one of them"): Preset("somewhere", side=512, short=512)


def test_a_sweep_takes_older_names_and_refuses_what_cannot_be(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from freqseg.faces.training_cli import grid_axes
    with pytest.warns(UserWarning, match="eps is called epsilon now"): assert grid_axes("dfa", ["eps=0.1,0.2", "lambda_l,lambda_h=1,0.1;1,0.2"]) == {
        "epsilon": [.1, .2], "lambda_l,lambda_h": [[1., .1], [1., .2]]}
    with pytest.warns(UserWarning), pytest.raises(InputError, match="gone cannot vary"): grid_axes("wtclip", ["edge_floor=0.5"])
    with pytest.warns(UserWarning), pytest.raises(InputError, match="names epsilon twice"): grid_axes("dfa", ["epsilon=0.1", "eps=0.2"])
    assert main(["sweep", "dfa", "--grid", "lambda_h=0.1,nan", "--out", str(tmp_path / "sweep")]) == 2
    assert "lambda_h=nan" in capsys.readouterr().err and not list(tmp_path.iterdir())
