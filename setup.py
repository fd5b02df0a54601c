"""Which packages the wheel has: also conf/, as lowrank_lab.conf. All else is in pyproject.toml."""

from setuptools import find_namespace_packages, setup

setup(packages=[*find_namespace_packages(include=["lowrank_lab*", "hydra_plugins*"]), "lowrank_lab.conf"])
