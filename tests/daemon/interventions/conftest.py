"""The home of the rebuild's tests: heads main (opcm) and soup (mean), at version 4."""

from tests.daemon.rebuild.conftest import merged, merged_root, model, quiet_environment

__all__ = ["merged", "merged_root", "model", "quiet_environment"]
