"""What `import memformer_dist` gives, and what it does not load."""

import pytest

import memformer_dist
from tests.helpers.scripts import run_script

LAZY = """
import sys
import memformer_dist
assert memformer_dist.__version__
assert not {"torch", "numpy", "pydantic", "deepspeed"} & sys.modules.keys()
from memformer_dist import Segment
assert "torch" in sys.modules and "deepspeed" not in sys.modules
"""


def test_importing_the_package_imports_no_torch():
    done = run_script("-c", LAZY)
    assert done.returncode == 0, done.stderr


def test_its_names_are_those_of_the_modules():
    from memformer_dist.cells.base import RecurrentCell
    from memformer_dist.cells.check import check_cell
    from memformer_dist.config import RunConfig
    from memformer_dist.mrbp.replay import memory_replay
    from memformer_dist.segment import Segment

    found = {name: getattr(memformer_dist, name) for name in memformer_dist.__all__}
    assert found == {
        "RecurrentCell": RecurrentCell,
        "RunConfig": RunConfig,
        "Segment": Segment,
        "check_cell": check_cell,
        "memory_replay": memory_replay,
        "__version__": memformer_dist.__version__,
    }
    assert set(found) <= set(dir(memformer_dist))
    with pytest.raises(AttributeError, match="'memformer_dist' has no attribute 'Segmnt'"):
        memformer_dist.Segmnt  # noqa: B018
