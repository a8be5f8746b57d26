"""Installation of minicpm_megatron; settings of the tools around it are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
LINES = (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines()
REQUIREMENTS = [line for line in LINES if line and not line.startswith("#")]

setup(
    name="minicpm_megatron",
    version="0.1.0",
    description="MiniCPM (arXiv 2404.06395) trained at scale: Megatron-Core models, DeepSpeed engine",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["minicpm_megatron", "minicpm_megatron.*"]),
    package_data={"minicpm_megatron.data": ["sample_texts/*"], "minicpm_megatron.windtunnel.report": ["*.j2"]},
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
        ],
        "eval": ["lm-eval==0.4.13"],
    },
    entry_points={
        # other packages add to these: see examples/my_plugin
        "minicpm_megatron.presets": [],
        "minicpm_megatron.decay_shapes": [],
        "minicpm_megatron.observers": [],
        "minicpm_megatron.objectives": [],
    },
)
