"""The Dockerfile, as far as it can be looked at without Docker."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_its_linter_finds_nothing():
    linter = shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint is not installed here; it has no wheel for this machine")
    found = subprocess.run(
        [linter, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 0 and found.stdout == ""


def test_it_has_two_stages_of_one_pinned_base_and_no_root():
    text = (ROOT / "Dockerfile").read_text()
    assert re.search(r"^ARG PYTHON=\d+\.\d+\.\d+-slim-\w+$", text, re.M)
    assert re.findall(r"^FROM (\S+) AS (\w+)$", text, re.M) == [
        ("python:${PYTHON}", "build"),
        ("python:${PYTHON}", "server"),
    ]
    assert re.findall(r"^USER (\S+)$", text, re.M) == ["1000:1000"]


def test_its_python_is_supported():
    minor = re.search(r"^ARG PYTHON=3\.(\d+)\.", (ROOT / "Dockerfile").read_text(), re.M)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    low, high = re.findall(r"3\.(\d+)", project["requires-python"])
    assert int(low) <= int(minor[1]) < int(high)


def test_all_that_it_copies_is_there_and_nothing_else_is_sent():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    sent = {line[1:] for line in lines if line.startswith("!")}
    copied = set()
    for line in re.findall(r"^COPY (?!--from)(.*)$", (ROOT / "Dockerfile").read_text(), re.M):
        words = [word for word in line.split() if not word.startswith("--")]
        copied.update(words[:-1])
    assert copied == sent
    assert all((ROOT / name).exists() for name in copied)
