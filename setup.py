"""Packaging of t5x_like; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "t5x_like" / "__init__.py").read_text())[1]

setup(
    name="t5x_like",
    version=VERSION,
    description="Train transformers with JAX, from one device to a pod.",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    author="The t5x_like authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: GPU",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=[*find_packages(include=["t5x_like", "t5x_like.*"]), "t5x_like.gin_configs"],
    # In the repository the gin files stand at its top, where readers find them; installed, within the package.
    package_dir={"t5x_like.gin_configs": "gin_configs"},
    package_data={"t5x_like": ["py.typed"], "t5x_like.gin_configs": ["**/*.gin"]},
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.1",
        "etils[epath]>=1.12",
        "flax>=0.12.8,<0.13",
        "gin-config>=0.5,<0.6",
        "array-record>=0.8.1,<0.9",
        "fsspec>=2024.6",
        "jax>=0.10.2,<0.13",
        "jaxtyping>=0.3",
        "matplotlib>=3.9",
        "numpy>=2.0",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.4,<0.13",
        "rich>=14,<16",
        "sentencepiece>=0.2.1,<0.3",
        "tensorboardX>=2.6.4,<3",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "gpu": ["jax[cuda13]"],
        # The compiler of the TPU, which needs no TPU; jax pins the version that belongs to it.
        "plan": ["jax[tpu]"],
        "tfds": ["tensorflow-datasets>=4.9.9", "importlib-resources>=6"],
        # Metrics of tasks, conversations, Hugging Face's datasets and tokenizers.
        "tasks": [
            "datasets>=3,<6",
            "jinja2>=3.1,<4",
            "rouge-score>=0.1.2,<0.2",
            "sacrebleu>=2.4,<3",
            "scikit-learn>=1.5",
            "scipy>=1.14",
            "tokenizers>=0.22,<0.24",
        ],
        "beam": ["apache-beam>=2.70"],
        "gcs": ["gcsfs>=2024.6"],
        "hf": ["safetensors>=0.6", "tokenizers>=0.22", "transformers>=5,<6", "torch==2.13.0"],
        "wandb": ["wandb>=0.21"],
        # Web pages and archives, languages, and formats that the standard library lacks.
        "prepare": [
            "backports.zstd>=1; python_version < '3.14'",
            "lingua-language-detector>=2.1,<3",
            "lxml-html-clean>=0.4",
            "pyarrow>=20",
            "resiliparse>=1,<3",
            "trafilatura>=2,<3",
        ],
        "dev": [
            "beartype>=0.23",
            "datatrove>=0.10,<0.11",
            "gcp-storage-emulator>=2026.7",
            "gcsfs>=2024.6",
            "grain>=0.2.18,<0.3",
            "hypothesis>=6",
            "import-linter>=2",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "pyyaml>=6",
            "ruff>=0.17,<0.18",
            "scikit-learn>=1.5",
            "scipy>=1.14",
            "setuptools>=77",
        ],
    },
    entry_points={"console_scripts": ["t5x_like=t5x_like.commands.main:main"]},
)
