"""Test the properties that every system, filter, mixer, task and reader must have.

Each function is a conformance suite. It receives one part, of the library or your own, and compares
it with an independent definition. If a property fails, it raises an `AssertionError`. The message
is one sentence that names the property, the argument and the size of the error. The suites are
plain functions, so they work with any test runner:

    from gramian.testing import check_filter

    def test_my_filter():
        check_filter(MyFilter(channels=4, max_length=64))

Random inputs depend only on the argument `seed`, and the global random generators do not change.
"""

from gramian.testing.device import check_device
from gramian.testing.filter import check_filter
from gramian.testing.mixer import check_mixer
from gramian.testing.reader import check_reader
from gramian.testing.simulated import Wait, recorded_waits, simulated_device, without_float64
from gramian.testing.system import check_system
from gramian.testing.task import check_task

__all__ = [
    "Wait",
    "check_device",
    "check_filter",
    "check_mixer",
    "check_reader",
    "check_system",
    "check_task",
    "recorded_waits",
    "simulated_device",
    "without_float64",
]
