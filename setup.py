"""The package `tossup`. In tossup/, kernels, autotune and supernet are links to their folders."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent
VERSION = re.compile(r'^__version__ = "(.+)"$', re.MULTILINE)

setup(
    name="tossup",
    version=VERSION.findall((ROOT / "tossup/__init__.py").read_text("utf-8"))[0],
    description="Supernets of sequence mixers, on ops that a mixer table routes",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_namespace_packages(
        include=["tossup", "tossup.*"], exclude=["*.__pycache__", "*.__pycache__.*"]
    ),
    package_data={"tossup.kernels.configs": ["*.json"]},
    entry_points={"console_scripts": ["tossup = tossup.supernet.cli:main"]},
    install_requires=[
        "torch>=2.11,<2.14",
        # A CUDA build of torch pins its own Triton within this range; a CPU build brings none.
        "triton>=3.6,<3.10; platform_system == 'Linux'",
        "numba",
        "numpy",
        "pydantic>=2",
        "pyyaml",
        "safetensors",
        "tqdm",
    ],
    extras_require={
        "report": ["matplotlib"],
        "dev": [
            "einops",  # mamba-ssm, the tests' oracle, imports it
            "hypothesis",
            "matplotlib",
            "mypy",
            "pytest",
            "pytest-benchmark",
            "pytest-xdist",
            "ruff",
            "scipy",
            "setuptools",
            "transformers",
            "types-PyYAML",
            "types-tqdm",
        ],
    },
)
