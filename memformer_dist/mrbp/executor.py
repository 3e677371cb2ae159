"""How memory replay runs a cell: with which random state, on which device, and how gradients are accumulated."""

import numpy as np
import torch


def reseed(device: torch.device, *coordinates: int) -> None:
    """Set the device's random state from integers that say where in the run we are, so that no state need be stored.

    Not by torch.manual_seed: without a GPU that queues a call for CUDA's late start, with a stack trace, every time.
    """
    generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    generator.manual_seed(int(np.random.SeedSequence(coordinates).generate_state(1, np.uint64)[0]))
