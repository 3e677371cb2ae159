"""Engines of tests: the section `mrbp` given by its fields."""

from memformer_dist.mrbp.settings import MrbpConfig


def make_engine(cell, optimizer, world, *, settings, precision="fp32", gradient_clipping=0.0, seed=0, **mrbp):
    """memformer_dist.zero.engine.Engine, imported here because deepspeed wants to know the device."""
    from memformer_dist.zero.engine import Engine

    return Engine(
        cell,
        optimizer,
        world,
        MrbpConfig(window=1, **mrbp),
        settings=settings,
        precision=precision,
        gradient_clipping=gradient_clipping,
        seed=seed,
    )
