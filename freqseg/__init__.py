"""See what a CLIP segmenter knows at each frequency.

    import freqseg
    freqseg.cam(freqseg.scene(48))                              # a drawn scene: where is what, and at which frequencies
    freqseg.cam("photo.jpg", ["dog", "grass"], model="ViT-B-16")
    freqseg.segment("photo.jpg", model="sptseg", classes="dog, grass")

`help(freqseg.segment)` explains one of the functions that `dir(freqseg)` lists. Nothing is loaded before it is used;
modules are attributes, too, such as `freqseg.spectra`."""

import importlib
import inspect
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "faces.api": ("cam", "segment", "seeds", "evaluate", "train", "explore"),
    "faces.explorer": ("scene", "open_model"),
    "clip": ("load_clip",),
    "work.checkpoints": ("load_system",),
    "spectra": ("split_bands",),
    "files": ("InputError",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:  # what editors and type checkers read
    from .clip import load_clip
    from .faces.api import evaluate, explore, seeds, segment, train
    from .faces.explorer import open_model, scene
    from .files import InputError
    from .spectra import split_bands
    from .work.checkpoints import load_system


def _verb(name: str) -> Any:
    "The function of that name, from its room."
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __getattr__(name: str) -> Any:
    if name in _HOME and name != "cam":
        return globals().setdefault(name, _verb(name))
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return __all__


class _CamRoom(ModuleType):
    "The room `freqseg.cam`, which is a function, too: a package has one attribute for both of one name."

    def __call__(self, *args: Any, **options: Any) -> Any:
        return _verb("cam")(*args, **options)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(_verb("cam"))

    @property
    def __doc__(self) -> str:  # type: ignore[override]
        called = ", ".join(self.__signature__.parameters)
        first, _, rest = (inspect.getdoc(_verb("cam")) or "").partition("\n")
        return f"{first}\n\nfreqseg.cam({called})\n{rest}\n\nThe room of the same name: {vars(self).get('__doc__')}"


class _Package(ModuleType):
    "Sees when the room `cam` is imported, by whichever way."

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "cam" and isinstance(value, ModuleType):
            value.__class__ = _CamRoom
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
