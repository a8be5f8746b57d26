"""Installation of minicpm_megatron; settings of the tools around it are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
LINES = (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines()
# read, not imported: the package may not be installed yet, nor what it needs
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "minicpm_megatron" / "__init__.py").read_text(), re.M)[1]
REQUIREMENTS = [line for line in LINES if line and not line.startswith("#")]

setup(
    name="minicpm_megatron",
    version=VERSION,
    description="MiniCPM (arXiv 2404.06395) trained at scale: Megatron-Core models, DeepSpeed engine",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["minicpm_megatron", "minicpm_megatron.*"]),
    package_data={
        "minicpm_megatron": ["py.typed"],
        "minicpm_megatron.data": ["sample_texts/*"],
        "minicpm_megatron.windtunnel.report": ["*.j2"],
    },
    python_requires=">=3.12,<3.13",
    install_requires=REQUIREMENTS,
    extras_require={
        # optional accelerators on CUDA; NVIDIA's apex, if wanted, is built from its own repository
        "gpu": ["flash-attn>=2.7"],
        "dev": [
            "pytest==9.2.0",
            "pytest-timeout==2.4.0",
            "pytest-xdist==3.8.0",
            "hypothesis==6.170.17",
            "ruff==0.17.5",
            "mypy==2.4.1",
            "types-PyYAML",
            "pre-commit==4.7.0",
            "pre-commit-hooks==6.0.0",
        ],
        # what `make docs` builds the pages with
        "docs": [
            "mkdocs==1.6.1",
            "mkdocs-material==9.8.2",
            "mkdocstrings[python]==1.0.8",
            "mkdocstrings-python==2.0.11",
        ],
        "eval": ["lm-eval==0.4.13"],
    },
    entry_points={
        "console_scripts": ["minicpm = minicpm_megatron.__main__:script"],
        # other packages add to these: see examples/my_plugin
        "minicpm_megatron.presets": [],
        "minicpm_megatron.decay_shapes": [],
        "minicpm_megatron.schedules": [],
        "minicpm_megatron.optimizers": [],
        "minicpm_megatron.attention_kernels": [],
        "minicpm_megatron.formats": [],
        "minicpm_megatron.tokenizers": [],
        "minicpm_megatron.observers": [],
        "minicpm_megatron.objectives": [],
    },
)
