"""The sizes and times that docs/report.md states, on runs of the size that people have."""

import time

import pytest
from support.run_folders import write

from opd.viewer.report import write_report


@pytest.mark.slow
def test_page_of_200_steps_is_below_two_megabytes(tmp_path):
    """20 files of 8 of 64 responses of 512 tokens, 43 metrics, a vocabulary of 152k."""
    folder = write(tmp_path / "run", steps=200, every=10, rows=64, tokens=512, vocabulary=152_000, prompts=40)
    start = time.perf_counter()
    found = write_report(folder)
    print(f"200 steps: {found.size / 1e6:.2f} MB in {time.perf_counter() - start:.1f} s of the wall")
    assert found.size < 2e6


@pytest.mark.slow
def test_page_of_200_steps_with_images_is_below_two_megabytes(tmp_path):
    """The same, with two images of noise for each prompt, which nothing compresses."""
    more = {"tokens": 512, "vocabulary": 152_000, "prompts": 40, "pictures": (320, 200)}
    folder = write(tmp_path / "run", steps=200, every=10, rows=64, **more)
    start = time.process_time()
    found = write_report(folder)
    print(f"200 steps with images: {found.size / 1e6:.2f} MB in {time.process_time() - start:.1f} s of a processor")
    assert found.size < 2e6


@pytest.mark.slow
def test_page_of_10_000_steps_takes_15_seconds(tmp_path):
    """100 files of 4 responses of 512 tokens and 2 followed prompts; 43 metrics."""
    folder = write(tmp_path / "run", steps=10_000, every=100, rows=4, picked=4, tokens=512, vocabulary=152_000)
    start = time.process_time()
    found = write_report(folder)
    took = time.process_time() - start
    print(f"10,000 steps: {found.size / 1e6:.2f} MB in {took:.1f} s of a processor")
    assert took < 15
    assert found.size < 4e6
