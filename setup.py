"""Adds the folders beside the package to the wheel; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["jaxvid*"]), "jaxvid.configs", "jaxvid.convert"])
