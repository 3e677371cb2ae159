"""What the warm server of helpers/forks.py imports once, for all its forks. Nothing else imports this module.

Imports and nothing more: a fork must find itself as a new interpreter would be. deepspeed wants DS_ACCELERATOR before it is
imported; forks.py sets it. The first optimizer imports torch._dynamo, the first engine torch._inductor by way of its Muon.
"""

import sys

import torch._dynamo  # noqa: F401

import tests.helpers.scripts  # noqa: F401

sys.stdout.flush()  # what deepspeed has printed: otherwise every fork would print it again
sys.stderr.flush()
