"""Conformance suites: what every system, filter, mixer, task and reader must keep.

Each function takes one part, of the library or of one's own, compares it with an independent
definition, and raises an `AssertionError` whose sentence says which property failed, for which
argument and by how much. They are plain functions, so that any test runner takes them:

    from gramian.testing import check_filter

    def test_my_filter():
        check_filter(MyFilter(channels=4, max_length=64))

Random inputs are drawn from a seed of their own; the global generators stay as they are.
"""

from gramian.testing.filter import check_filter
from gramian.testing.mixer import check_mixer
from gramian.testing.reader import check_reader
from gramian.testing.system import check_system
from gramian.testing.task import check_task

__all__ = ["check_filter", "check_mixer", "check_reader", "check_system", "check_task"]
