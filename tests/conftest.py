"""What holds for every test."""

import os
import signal

from hypothesis import HealthCheck, settings

os.environ.pop("COLUMNS", None)  # pytest-xdist tells its workers a width, and our commands would keep to it

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell that starts us in the background has it so
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what the tests start would inherit that

# A busy machine is no fault: no test asserts how long anything takes, and hypothesis does by default.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
