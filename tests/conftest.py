"""What holds for every test."""

import os

os.environ.pop("COLUMNS", None)  # pytest-xdist tells its workers a width, and our commands would keep to it
