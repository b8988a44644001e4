"""Builds the package from settings.ini, so that a requirement is written in one place only."""

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent


def lines(value: str) -> list[str]:
    "The non-empty lines of a settings.ini value."
    return [line.strip() for line in value.splitlines() if line.strip()]


def version() -> str:
    "`__version__` of the package, read without importing it (its requirements are not installed yet)."
    source = (HERE / "freqseg" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__\s*=\s*"([^"]+)"', source, re.MULTILINE).group(1)


parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(HERE / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]

setup(
    name=settings["lib_name"],
    version=version(),
    description=settings["description"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    keywords=settings["keywords"],
    python_requires=f">={settings['min_python']}",
    install_requires=lines(settings["requirements"]),
    extras_require={extra: lines(settings[f"{extra}_requirements"]) for extra in ("dev", "docs", "crf")},
    entry_points={"console_scripts": lines(settings["console_scripts"])},
    # The files of data/ travel in the wheel as freqseg/assets, where freqseg.files.shipped looks first.
    packages=[*find_packages(include=["freqseg", "freqseg.*"]), "freqseg.assets"],
    package_dir={"freqseg.assets": "data"},
    package_data={"freqseg": ["py.typed"], "freqseg.assets": ["*", "*/*", "*/*/*"]},
    include_package_data=False,
)
