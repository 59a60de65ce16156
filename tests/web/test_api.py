"""What docs/web-api.md says, done as it says it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import pytest
from flexvar.cli import main
from flexvar.image_io import open_image, read_settings
from PIL import Image

pytestmark = pytest.mark.browser

DOCUMENT = (Path(__file__).parents[2] / "docs" / "web-api.md").read_text("utf-8")


def snippet(language: str, url: str) -> str:
    (text,) = re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)
    return text.replace("http://127.0.0.1:7860", url.rstrip("/"))


def test_every_endpoint_and_argument_is_documented(site: Any) -> None:
    endpoints = site.get_api_info()["named_endpoints"]
    own = {row[0]: re.findall(r"`(\w+)`", row[1]) for row in re.findall(r"^\| `(/\w+)` \| (.*) \|$", DOCUMENT, re.M)}
    described = [
        name for row in re.findall(r"^\| (`[a-z].*?) \| [a-z]", DOCUMENT, re.M) for name in row.split("`")[1::2]
    ]
    common = described[described.index("label") :]
    assert set(own) == set(endpoints)
    for name, endpoint in endpoints.items():
        expected = own[name] + (common if name != "/reconstruct" else [])
        assert [parameter["parameter_name"] for parameter in endpoint["parameters"]] == expected
        assert set(own[name]) <= set(described)


def test_the_curl_example(site: Any) -> None:
    answer = subprocess.run(
        ["bash", "-euc", snippet("bash", site.local_url)], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    events = re.findall(r"event: (\w+)\ndata: (.*)", answer)
    kinds = [kind for kind, _ in events if kind != "heartbeat"]
    assert kinds[-1] == "complete"
    assert kinds.count("generating") > 2
    files, command, _ = json.loads(events[-1][1])
    assert [file["orig_name"] for file in files] == ["flexvar-generate-5.png"]
    assert command.startswith("flexvar generate star")


def test_the_python_example_and_its_command_lines(site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mask = Image.new("L", (64, 32))
    mask.paste(255, (32, 0, 64, 32))
    mask.save("mask.png")
    names: dict[str, Any] = {}
    exec(snippet("python", site.local_url), names)
    (drawn,) = names["files"]
    assert Image.open(drawn).size == (64, 32)
    result, source, _ = map(Path, names["edited"])
    assert read_settings(result)["edit"]["task"] == "inpaint"
    monkeypatch.chdir(source.parent)
    for name in names["edited"][1:]:
        (source.parent / Path(name).name).write_bytes(Path(name).read_bytes())
    monkeypatch.setattr(sys, "argv", shlex.split(names["command"]))
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    again = source.parent / result.name
    assert np.array_equal(np.asarray(open_image(again)), np.asarray(open_image(result)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label": "starr"}, "did you mean star"),
        ({"num": 0}, "generate: num must be from 1 to 8, got 0"),
        ({"num": 9}, "num must be from 1 to 8"),
        ({"width": 0}, "width must be at least 1"),
        ({"width": 4000, "height": 4000}, "at most 131072 pixels together"),
        ({"seed": -1}, "seed must be from 0"),
        ({"steps": -2}, "steps must be at least 1"),
        ({"width": 16, "height": 16, "steps": 4096}, "steps must be from 1 to 64, got 4096"),
        ({"width": 4, "height": 32768, "steps": 64}, "at most 262144 tokens together, got 1 x "),
        ({"top_p": 2}, "top_p must be from 0 to 1, got 2"),
        ({"width": "abc"}, "width must be an int, got 'abc'"),
        ({"height": [1]}, r"height must be an int, got \[1\]"),
        ({"width": True}, "width must be an int, got True"),
        ({"seed": 1.5}, r"seed must be an int, got 1\.5"),
        ({"steps": False}, "steps must be an int, got False"),
        ({"num": "two"}, "num must be an int, got 'two'"),
        ({"top_k": "x"}, "top_k must be an int, got 'x'"),
        ({"top_p": "x"}, "top_p must be a number, got 'x'"),
        ({"guidance_scale": "x"}, "guidance_scale must be a number, got 'x'"),
        ({"guidance_style": ["var"]}, "guidance_style must be one of var, llamagen, off, got"),
        ({"label": 99}, "class_labels must be from 0 to 12, got 99"),
    ],
)
def test_what_breaks_a_rule(site: Any, arguments: dict[str, Any], message: str) -> None:
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(site.local_url, verbose=False)
    with pytest.raises(AppError, match=message):
        client.predict(**arguments, api_name="/generate")


def test_a_number_that_json_does_not_know(site: Any) -> None:
    url = f"{site.local_url}gradio_api/call"
    request = Request(f"{url}/v2/generate", b'{"width": NaN}', {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as answer:
        event = json.load(answer)["event_id"]
    with urlopen(f"{url}/generate/{event}", timeout=60) as answer:
        assert "generate: width must be an int, got nan" in answer.read().decode()


@pytest.mark.parametrize(
    ("endpoint", "arguments", "message"),
    [
        ("outpaint", {"left": "abc"}, "outpaint: left must be an int, got 'abc'"),
        ("outpaint", {"start_step": "abc"}, "outpaint: start_step must be an int, got 'abc'"),
        ("outpaint", {"paste": "abc"}, "outpaint: paste must be a bool, got 'abc'"),
        ("outpaint", {"feather": 1.5}, r"outpaint: feather must be an int, got 1\.5"),
        ("refine", {"width": None}, "refine: width must be an int, got None"),
        ("inpaint", {"mask": 7}, "inpaint: mask must be text, got int"),
        ("inpaint", {"mask": "data:image/png;base64,ä"}, "inpaint: mask must be base64 after data:image/png;base64,"),
        ("reconstruct", {"steps": "abc"}, "steps must be an int, got 'abc'"),
        ("reconstruct", {"max_side": 1.5}, r"reconstruct: max_side must be an int, got 1\.5"),
    ],
)
def test_what_breaks_a_rule_of_an_edit(
    site: Any, tmp_path: Path, endpoint: str, arguments: dict[str, Any], message: str
) -> None:
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    Image.new("RGB", (16, 16)).save(tmp_path / "photo.png")
    client = Client(site.local_url, verbose=False)
    with pytest.raises(AppError, match=message):
        client.predict(image=handle_file(tmp_path / "photo.png"), **arguments, api_name=f"/{endpoint}")


def test_reconstruct_and_its_command_line(site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradio_client import Client, handle_file

    monkeypatch.chdir(tmp_path)
    Image.effect_noise((50, 40), 60).convert("RGB").save("noise.png")
    client = Client(site.local_url, verbose=False)
    (sheet, _), command, _ = client.predict(
        image=handle_file("noise.png"), steps=4, max_side=32, api_name="/reconstruct"
    )
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    assert np.array_equal(np.asarray(open_image(Path(sheet).name)), np.asarray(open_image(sheet)))


@pytest.mark.parametrize("endpoint", ["reconstruct", "outpaint"])
def test_a_picture_whose_name_begins_with_a_dash(
    site: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    from gradio_client import Client, handle_file

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16)).save("-photo.png")
    client = Client(site.local_url, verbose=False)
    files, command, _ = client.predict(image=handle_file("-photo.png"), steps=2, api_name=f"/{endpoint}")
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    assert np.array_equal(np.asarray(open_image(Path(files[0]).name)), np.asarray(open_image(files[0])))


def test_the_film_of_many_steps_is_bounded(site: Any) -> None:
    from gradio_client import Client

    client = Client(site.local_url, verbose=False)
    html = client.predict(label="star", width=16, height=16, steps=60, api_name="/generate")[2]
    assert "in 60 steps" in html
    assert html.count("<li>") == 24
    assert html.rindex("<span>4×4</span>") > html.rindex("<span>3×3</span>")


def test_one_at_a_time(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradio_client import Client

    running = most = 0
    draw = site.studio.draw

    def counted(*arguments: Any) -> Iterator[Any]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            yield from draw(*arguments)
        finally:
            running -= 1

    monkeypatch.setattr(site.studio, "draw", counted)
    client = Client(site.local_url, verbose=False)
    jobs = [client.submit(label="star", seed=seed, api_name="/generate") for seed in range(3)]
    assert all(job.result(timeout=60)[0] for job in jobs)
    assert (most, running) == (1, 0)


def test_a_port_that_is_taken(site: Any) -> None:
    from flexvar.web.server import serve

    with pytest.raises(OSError, match=rf"must be free to listen on, got 127.0.0.1 and {site.server_port}"):
        serve(site.studio, port=site.server_port, block=False)


def test_files_of_the_server_stay_its_own(site: Any) -> None:
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(site.local_url, verbose=False)
    with pytest.raises(AppError):
        client.predict(image={"path": __file__, "meta": {"_type": "gradio.FileData"}}, mask="", api_name="/inpaint")
