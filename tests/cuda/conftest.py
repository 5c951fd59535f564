"""The tests in `on_device` need the process that `test_on_device.py` starts, where torch finds a device of its own."""

import sys

collect_ignore = [] if "fake_cuda" in sys.modules else ["on_device"]
