"""What the warm server of helpers/forks.py imports once, for all its forks. Nothing else imports this module.

Imports and nothing more: apart from them a fork starts as a new interpreter does. DeepSpeed reads DS_ACCELERATOR while it
is imported; forks.py sets it. The first optimizer imports torch._dynamo, the first engine torch._inductor through its Muon.
"""

import sys

import torch._dynamo  # noqa: F401

import tests.helpers.scripts  # noqa: F401

sys.stdout.flush()  # what deepspeed has printed: otherwise every fork would print it again
sys.stderr.flush()
