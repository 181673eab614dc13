"""Which tests share a worker of pytest-xdist, and which come first; `conftest` hands it to xdist.

Not `--dist loadgroup`, whose group names pytest-xdist 3.8 writes where pytest 9.2 no longer reads
them: its groups are then split over the workers, and nothing says so.
"""

from functools import cache
from pathlib import Path

from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).resolve().parents[1]
RAY = "ray"
KERNELS = "tests/kernels/"


class GroupScheduling(LoadScopeScheduling):
    """Gives a worker one group after another, in the order in which they were collected."""

    def __init__(self, config, log=None) -> None:
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


def group_of(nodeid: str) -> str:
    """Tests that start Ray are one group, for their cluster; a module is one, for its fixtures.

    A kernel test shares nothing, and is a group of its own.
    """
    if nodeid.startswith(KERNELS):
        return nodeid
    path = nodeid.partition("::")[0]
    return RAY if _starts_ray(path) else path


def order_of(nodeid: str) -> int:
    """For sorting: the longest group first, the smallest last, so that workers end together."""
    group = group_of(nodeid)
    return 0 if group == RAY else 2 if group == nodeid else 1


@cache
def _starts_ray(path: str) -> bool:
    # The process that schedules has no items to ask for their markers.
    return "pytest.mark.serve" in (ROOT / path).read_text()
