"""Packaging of memformer_dist. `pip install -e . -c constraints.txt` gives the set-up that the tests run on."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
PROGRAMS = ("train", "evaluate", "generate", "prove", "continual", "prepare", "train-tokenizer", "corpus")

setup(
    name="memformer_dist",
    version=re.search(r'^__version__ = "(.+)"$', (ROOT / "memformer_dist/__init__.py").read_text(), re.MULTILINE)[1],
    description="Distributed training of segment-recurrent memory transformers by exact memory replay back-propagation",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=[*find_packages(include=["memformer_dist", "memformer_dist.*"]), "memformer_dist.configs"],
    package_dir={"memformer_dist.configs": "configs"},
    package_data={"memformer_dist.configs": ["*.json"]},
    entry_points={
        "console_scripts": [
            f"memformer-{name} = memformer_dist.commands:run_{name.replace('-', '_')}" for name in PROGRAMS
        ]
    },
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.8",
        "deepspeed==0.19.8",  # memformer_dist/zero/ relies on its internals; tests/test_engine.py shows when to move
        "webdataset>=1.0",
        "sentencepiece>=0.2.1",
        "protobuf",  # sentencepiece's description of its models
        "tensorboard",
        "mpi4py",
        "pydantic>=2",
        "annotated-types",
        "typing_extensions",
        "safetensors",
        "tqdm",
        "numpy",
        "fsspec",
        "backports.zstd; python_version < '3.14'",  # later Pythons have it as compression.zstd
    ],
    extras_require={
        "parquet": ["pyarrow"],
        "remote": ["fsspec[http]"],
        "tokenizers": ["tokenizers>=0.21"],  # Hugging Face's, for files tokenizer.json
        "plot": ["matplotlib"],
        "test": ["pytest", "pytest-xdist", "hypothesis", "pyarrow", "fsspec[http]", "tokenizers", "mpich", "psutil"],
        "dev": ["ruff", "mypy", "types-tqdm", "build", "pre-commit"],
    },
)
