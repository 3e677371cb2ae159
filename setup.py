"""Packaging of memformer_dist. `pip install -e . -c constraints.txt` gives the set-up that the tests run on."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="memformer_dist",
    version="0.1.0",
    description="Distributed training of segment-recurrent memory transformers by exact memory replay back-propagation",
    long_description=(Path(__file__).parent / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["memformer_dist", "memformer_dist.*"]),
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.8",
        "deepspeed==0.19.8",  # memformer_dist/zero/engine.py leans on its internals; tests/test_engine.py says when to move
        "webdataset>=1.0",
        "sentencepiece>=0.2.1",
        "protobuf",  # sentencepiece's description of its models
        "tensorboard",
        "mpi4py",
        "pydantic>=2",
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
        "test": ["pytest", "hypothesis", "pyarrow", "fsspec[http]", "mpich", "psutil"],
        "dev": ["ruff", "mypy", "types-tqdm", "build", "pre-commit"],
    },
)
