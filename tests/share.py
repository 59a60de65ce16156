"""A pytest plugin, ``-p tests.share``: one share of the selected tests, for as long as there is time.

``--share 2/8`` takes every eighth test, from the second one on, so that files of slow tests are shared out, too.
``--seconds`` begins no test later than that, and makes the exit status that of an interruption, 2.
"""

from __future__ import annotations

import time

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", default="1/1", metavar="K/N", help="take share K (from 1) of N")
    parser.addoption("--seconds", type=float, default=float("inf"), help="begin no test later")


def pytest_configure(config: pytest.Config) -> None:
    share, shares = map(int, config.getoption("--share").split("/"))
    if not 1 <= share <= shares:
        raise pytest.UsageError(f"--share must be K/N with 1 <= K <= N, got {share}/{shares}")
    config.pluginmanager.register(_Share(share, shares, time.monotonic() + config.getoption("--seconds")))


class _Share:
    def __init__(self, share: int, shares: int, end: float) -> None:
        self._share, self._shares, self._end = share, shares, end

    @pytest.hookimpl(trylast=True)  # of what -m and -k leave
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = items[self._share - 1 :: self._shares]

    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        if time.monotonic() > self._end:
            raise item.session.Interrupted("time is up")
