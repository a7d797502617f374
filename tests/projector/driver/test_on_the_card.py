"""Runs the tests that need a card in a process of their own, where there is a card."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(not Path("/dev/nvidiactl").exists(), reason="there is no NVIDIA device on this machine")
@pytest.mark.timeout(600)
def test_the_cuda_tests_pass_in_a_process_of_their_own() -> None:
    seen = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", "tests"],
        cwd=ROOT,
        env=seen,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_the_card_is_hidden_from_whatever_the_tests_fork() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
