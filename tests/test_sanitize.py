"""That ``python -m tests.sanitize`` runs every CUDA test but graphs' once, and hides nothing that the tool says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import sanitize

ROOT = Path(__file__).parent.parent
SEVEN_TESTS = """
import pytest

@pytest.mark.cuda
@pytest.mark.parametrize("number", range(7))
def test_one(number):
    assert number != {failing}

@pytest.mark.cuda
def test_graph_replay():
    raise AssertionError

def test_not_for_a_gpu():
    raise AssertionError
"""
# Runs the program behind compute-sanitizer's own options.
TOOL = """#!/bin/sh
while [ "$1" != "{python}" ]; do shift; done
"$@" || exit $?
{after}
"""


def run_share(tests: Path, *options: str) -> tuple[int, list[str]]:
    """The exit status, and the numbers of the tests that ran."""
    command = [sys.executable, "-m", "pytest", "-v", "-k", "test_one", "-p", "no:cacheprovider", "-p", "tests.share"]
    run = subprocess.run([*command, *options, tests], cwd=ROOT, capture_output=True, text=True)
    return run.returncode, re.findall(r"test_one\[(\d)\] PASSED", run.stdout)


@pytest.fixture
def seven_tests(tmp_path: Path) -> Path:
    return write_tests(tmp_path)


def write_tests(folder: Path, failing: int = -1) -> Path:
    path = folder / "test_seven.py"
    path.write_text(SEVEN_TESTS.format(failing=failing))
    return path


@pytest.fixture
def fake_tool(tmp_path, monkeypatch):
    """``fake_tool(after)`` puts a compute-sanitizer on the PATH that ends with the command ``after``."""

    def write(after: str = "true") -> None:
        tool = tmp_path / "compute-sanitizer"
        tool.write_text(TOOL.format(python=sys.executable, after=after))
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return write


def test_shares_are_the_tests_at_equal_distances(seven_tests):
    assert [run_share(seven_tests, "--share", f"{share}/3") for share in (1, 2, 3)] == [
        (0, ["0", "3", "6"]),
        (0, ["1", "4"]),
        (0, ["2", "5"]),
    ]


def test_no_test_begins_when_the_time_is_up(seven_tests):
    assert run_share(seven_tests, "--seconds", "-1") == (sanitize.INTERRUPTED, [])


@pytest.mark.parametrize("share", ["0/3", "4/3"])
def test_shares_that_are_none(seven_tests, share):
    status, passed = run_share(seven_tests, "--share", share)
    assert status == pytest.ExitCode.USAGE_ERROR
    assert not passed


@pytest.mark.parametrize(("jobs", "every", "passed"), [(3, 1, 7), (2, 2, 4), (9, 1, 7)])
def test_clean(tmp_path, seven_tests, fake_tool, capsys, jobs, every, passed):
    fake_tool()
    assert sanitize.run("memcheck", [str(seven_tests)], jobs, every, float("inf"), tmp_path)
    assert f"memcheck: {passed} tests passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("failing", "after", "seconds", "said"),
    [
        (
            -1,
            f"echo '========= ERROR SUMMARY: 3 errors'; exit {sanitize.FOUND}",
            1e9,
            "errors ========= ERROR SUMMARY: 3",
        ),
        (-1, "kill -SEGV $$", 1e9, "exit status -11"),
        (4, "true", 1e9, "exit status 1"),
        (-1, "true", -1, "time was up"),
    ],
)
def test_not_clean(tmp_path, fake_tool, capsys, failing, after, seconds, said):
    fake_tool(after)
    assert not sanitize.run("racecheck", [str(write_tests(tmp_path, failing))], 2, 1, seconds, tmp_path)
    assert said in capsys.readouterr().out


def test_nothing_to_run_is_not_clean(tmp_path, fake_tool):
    fake_tool()
    assert not sanitize.run("memcheck", ["tests/test_sanitize.py"], 1, 1, 1e9, tmp_path)
