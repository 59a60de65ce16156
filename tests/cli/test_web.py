"""``flexvar web``, as far as it goes without a browser."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from flexvar import cli_web
from flexvar.cli_web import is_loopback
from flexvar.schedule import ScaleSchedule
from flexvar.web.limits import Limits

Result = tuple[int, str, str]


def test_without_gradio_it_says_what_to_install(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_web, "find_spec", lambda name: None)
    assert run("web") == (2, "", "flexvar: error: web: the page needs gradio: pip install gradio\n")


def test_loopback() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"))


def test_limits() -> None:
    limits = Limits(max_pixels=1000, max_images=2)
    limits.check_size("generate", (20, 25), 2)
    with pytest.raises(ValueError, match="expand: images must have at most 1000 pixels together, got 2 of 26 x 20"):
        limits.check_size("expand", (20, 26), 2)
    with pytest.raises(ValueError, match="refine: num must be from 1 to 2, got 3"):
        limits.check_size("refine", (1, 1), 3)
    limits = Limits(max_steps=3, max_tokens=100)
    limits.check_schedule("refine", ScaleSchedule([1, 3, 6]), 2)
    with pytest.raises(ValueError, match="refine: steps must be from 1 to 3, got 4"):
        limits.check_schedule("refine", ScaleSchedule([1, 1, 1, 1]), 1)
    with pytest.raises(ValueError, match="at most 100 tokens together, got 3 x 46 in 3 steps"):
        limits.check_schedule("refine", ScaleSchedule([1, 3, 6]), 3)
    with pytest.raises(ValueError, match="web: max-tokens must be at least 1, got 0"):
        Limits(max_tokens=0)
    with pytest.raises(ValueError, match="web: max-images must be from 1 to 16, got 17"):
        Limits(max_images=17)
