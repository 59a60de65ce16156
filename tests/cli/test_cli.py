"""The command line: what it writes, and that no mistake of a user ends in a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from flexvar import (
    FlexVARPipeline,
    FlexVARTransformer,
    __version__,
)
from flexvar.cli import main
from flexvar.image_io import read_settings
from PIL import Image

pytestmark = pytest.mark.usefixtures("one_thread")

Result = tuple[int, str, str]
LargestFile = Callable[[int], AbstractContextManager[None]]


@pytest.fixture(scope="module")
def numbered(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny pipeline with classes that are called as numbers are, or as no class is."""
    pipe = FlexVARPipeline.from_pretrained(model)
    config = replace(pipe.transformer.config, class_names=("1", "None", "0"))
    transformer = FlexVARTransformer(config)
    transformer.load_state_dict(pipe.transformer.state_dict())
    folder = tmp_path_factory.mktemp("numbered")
    FlexVARPipeline(pipe.tokenizer, transformer).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def generate(run: Callable[..., Result], model: str) -> Callable[..., Result]:
    """``flexvar generate`` with the tiny pipeline."""
    return lambda *arguments: run("generate", *arguments, "--model", model, "--device", "cpu")


def test_version_and_help(run: Callable[..., Result]) -> None:
    assert run("--version") == (0, f"flexvar {__version__}\n", "")
    edits = (["inpaint"], ["outpaint"], ["expand"], ["refine"], ["rerun"])
    for command in ([], ["generate"], *edits, ["reconstruct"], ["doctor"], ["train"], ["train", "tokenizer"]):
        code, text, _ = run(*command, "--help")
        assert code == 0
        assert "Usage" in text
    assert "flexvar generate star heart" in run("generate", "-h")[1]


def test_help_imports_no_torch() -> None:
    code = "import sys; from flexvar.cli import app; app(['generate', '--help'], standalone_mode=False); "
    code += "raise SystemExit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, env=environment)


def test_usage_errors_name_the_command_to_ask() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "flexvar", "generate", "--frobnicate"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    expected = "flexvar: error: No such option: --frobnicate; see python -m flexvar generate --help\n"
    assert (run.returncode, run.stdout, run.stderr) == (2, "", expected)


def test_doctor_finds_this_installation_well(run: Callable[..., Result]) -> None:
    code, text, _ = run("doctor")
    assert code == 0, text
    assert "demo model    /" in text
    assert "problem" not in text


def test_demo_model_by_default(run: Callable[..., Result]) -> None:
    assert run("generate", "star", "--steps", 4)[0] == 0
    settings = read_settings("flexvar.png")
    assert (settings["model"], settings["guidance_style"], settings["top_p"]) == ("demo", "llamagen", 0.9)
    assert Image.open("flexvar.png").size == (64, 64)


def test_one_image(generate: Callable[..., Result], model: str) -> None:
    code, text, _ = generate("star", "--size", 16, "--steps", 3, "--seed", 4, "--out", "new/star.png")
    assert (code, text) == (0, "new/star.png\n")
    assert Image.open("new/star.png").size == (16, 16)
    settings = read_settings("new/star.png")
    assert settings["class_labels"] == ["star"]
    assert (settings["seed"], settings["height"], len(settings["schedule"])) == (4, 16, 3)
    assert settings["guidance_style"] == "llamagen"  # the model's own
    assert (settings["version"], settings["model"], settings["device"]) == (__version__, model, "cpu")


def test_a_folder_and_what_its_settings_reproduce(generate: Callable[..., Result], model: str) -> None:
    assert generate("--num", 4, "--schedule", "1,2x3", "--out", "images", "--grid", "--batch", 3)[0] == 0
    files = sorted(os.listdir("images"))
    assert files == ["0000-circle.png", "0001-star.png", "0002-evil-name.png", "0003-circle.png", "grid.png"]
    pipe = FlexVARPipeline.from_pretrained(model)
    for file in files[:4]:
        settings = read_settings(Path("images", file))
        names = ("seed", "image_ids", "schedule", "guidance_scale", "guidance_style", "top_k", "top_p")
        options: dict[str, Any] = {name: settings[name] for name in names}
        again = pipe(settings["class_labels"], **options).images[0]
        assert np.array_equal(np.asarray(again), np.asarray(Image.open(Path("images", file))))
    assert read_settings("images/grid.png")["image_ids"] == [0, 1, 2, 3]


def test_images_do_not_depend_on_num_and_batch(generate: Callable[..., Result]) -> None:
    for folder, options in {"a": ["--num", 3], "b": ["--num", 5, "--batch", 2]}.items():
        assert generate("circle", *options, "--schedule", "1,2,4", "--out", folder)[0] == 0
    for file in sorted(os.listdir("a")):
        assert np.array_equal(np.asarray(Image.open(f"a/{file}")), np.asarray(Image.open(f"b/{file}")))


def test_names_win_over_numbers(run: Callable[..., Result], numbered: str) -> None:
    options = ["--model", numbered, "--steps", 2, "--device", "cpu"]
    assert run("generate", "1", "none", "0", "2", "3", "--size", 8, *options, "--out", "images")[0] == 0
    files = ["0000-1.png", "0001-none.png", "0002-0.png", "0003-0.png", "0004-3.png"]
    assert sorted(os.listdir("images")) == files
    labels = [read_settings(f"images/{file}")["class_labels"] for file in files]
    assert labels == [["1"], ["none"], ["0"], [2], [3]]
    out = FlexVARPipeline.from_pretrained(numbered)(["1", "none", "0", 2, 3], steps=2, height=8)
    for file, picture in zip(files, out.images, strict=True):
        assert np.array_equal(np.asarray(picture), np.asarray(Image.open(f"images/{file}")))
    assert run("rerun", "images/0000-1.png")[0] == 0
    Image.new("RGB", (8, 8)).save("photo.png")
    assert run("outpaint", "photo.png", "--right", 4, *options)[0] == 0
    assert read_settings("flexvar.png")["class_labels"] == [None]  # not the class of that name


def test_sheet_of_sizes_styles_and_types(generate: Callable[..., Result]) -> None:
    code, _, _ = generate(
        "star", 0, "none", "--height", 7, "--width", 18, "--steps", 2, "--columns", 3, "--guidance-style", "llamagen",
        "--guidance", 3, "--top-k", 5, "--top-p", 0.5, "--dtype", "bfloat16", "--published-greedy-quirk",
    )  # fmt: skip
    assert code == 0
    assert Image.open("flexvar.png").size == (3 * (18 + 4) + 4, 7 + 8)
    settings = read_settings("flexvar.png")
    assert settings["class_labels"] == ["star", 0, None]
    assert settings["dtype"] == "bfloat16"
    assert settings["published_greedy_quirk"] is True


def test_reconstruct(run: Callable[..., Result], model: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.new("CMYK", (40, 31), (0, 200, 200, 0)).save("photo.jpg", exif=exif)
    code, _, error = run("reconstruct", "photo.jpg", "--model", model, "--device", "cpu", "--steps", 3)
    assert (code, error) == (0, "")
    assert Image.open("reconstruction.png").height == 2 * (40 + 16 + 4) + 4  # the original and 3 scales, with captions
    code, _, error = run(
        "reconstruct", "photo.jpg", "--model", model, "--backend", "reference", "--device", "cpu", "--max-side", 20,
        "--out", "small.png", "--schedule", "1,5x4",
    )  # fmt: skip
    assert code == 0
    assert "photo.jpg was shrunk from 31 x 40 to 15 x 20" in error
    assert Image.open("small.png").height == 2 * (20 + 16 + 4) + 4


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["generate", "sta"], "class_labels must be names that the model knows, got 'sta'; did you mean star"),
        (["generate", "7"], "class_labels must be from 0 to 3, got 7"),
        (["generate", "-1"], "No such option: -1; see "),
        (["generate", "--num", "0"], "generate: --num must be at least 1, got 0"),
        (["generate", "--num", "two"], "Invalid value for '--num': "),
        (["generate", "--num", "two"], "'two'"),
        (["generate", "--batch", "-2"], "--batch must be at least 1, got -2"),
        (["generate", "--columns", "0"], "--columns must be at least 1, got 0"),
        (["generate", "--size", "0"], "height must be at least 1, got 0"),
        (["generate", "--size", "8", "--width", "8"], "--size must be left out"),
        (["generate", "--steps", "0"], "steps must be at least 1, got 0"),
        (["generate", "--steps", "3", "--schedule", "1,2"], "steps must be left out where a schedule is given"),
        (
            ["generate", "--schedule", "1,zwei"],
            "--schedule must be sides or HEIGHTxWIDTH, such as 1,2,4x8, got '1,zwei'",
        ),
        (["generate", "--schedule", ""], "--schedule must be sides"),
        (["generate", "--schedule", "0"], "from 1 to"),
        (["generate", "--schedule", "1,30000"], "at most 4194304 tokens, all steps together, got 900000001"),
        (["generate", "--size", "40000"], "height x width must be at most 268435456 pixels, got 40000 x 40000"),
        (["generate", "--guidance", "nan"], "guidance_scale must be from -1e+30 to 1e+30, got nan"),
        (["generate", "--guidance", "1e308"], "guidance_scale must be from -1e+30 to 1e+30, got 1e+308"),
        (["generate", "--guidance", "1e39", "--guidance-style", "llamagen"], "guidance_scale must be from"),
        (["generate", "--guidance-style", "cfg"], "'cfg' is not one of 'var', 'llamagen', 'off'"),
        (["generate", "--top-k", "-1"], "top_k must be from 0 to 9223372036854775807, got -1"),
        (["generate", "--top-p", "2"], "top_p must be from 0 to 1"),
        (["generate", "--dtype", "float64"], "'float64' is not one of 'float32', 'bfloat16', 'float16'"),
        (["train", "tokenizer", "--seed"], "Option '--seed' requires an argument; see "),
        (["train", "tokenizr"], "No such command 'tokenizr'"),
        (["rerun", "text.jpg"], "text.jpg must be an undamaged PNG, got another format"),
        (["generate", "--seed", "-1"], "seed must be from 0 to"),
        (["generate", "--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["generate", "--device", "cuda:99"], "--device must be one that torch finds"),
        (["generate", "--out", "image.jpg"], "--out must end in .png or be a folder, got 'image.jpg'"),
        (["generate", "--out", "a.png", "--grid"], "--grid must be left out"),
        (["generate", "--out", "/proc/nowhere/a.png"], "/proc/nowhere: No such file or directory"),
        (["generate", "--model", "nowhere"], "source must be \"demo\", a folder or a Hub id owner/name, got 'nowhere'"),
        (["generate", "--model", "."], "must hold tokenizer/config.json"),
        (["generate", "--frobnicate"], "No such option: --frobnicate; see "),
        (["frobnicate"], "No such command 'frobnicate'; see "),
        (["train", "tokenizer", "--data", "nowhere"], "root must be a folder, got 'nowhere'"),
        (["train", "transformer", "--tokenizer", "nowhere"], "nowhere/config.json"),
        (["train", "tokenizer", "--steps", "0"], "steps must be from 1 to"),
        (["train", "evaluate", "--images-per-class", "0"], "Invalid value for '--images-per-class'"),
        (["reconstruct"], "Missing argument 'photo'; see "),
        (["reconstruct", "missing.jpg"], "missing.jpg: No such file or directory"),
        (["reconstruct", "."], ".: Is a directory"),
        (["reconstruct", "text.jpg"], "text.jpg must be a picture that Pillow reads"),
        (["reconstruct", "truncated.png"], "truncated.png must be an undamaged picture"),
        (["reconstruct", "photo.png", "--max-side", "-1"], "reconstruct: --max-side must be at least 0, got -1"),
        (["reconstruct", "photo.png", "--columns", "0"], "reconstruct: --columns must be at least 1, got 0"),
        (["reconstruct", "photo.png", "--out", "x.jpg"], "--out must end in .png"),
        (["reconstruct", "photo.png", "--schedule", "1,2"], "must need the schedule's last grid (2, 2)"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    run: Callable[..., Result], model: str, arguments: list[str], text: str
) -> None:
    Path("text.jpg").write_text("no picture")
    Image.new("RGB", (64, 64)).save("photo.png")
    Image.effect_noise((64, 64), 50).save("truncated.png")
    Path("truncated.png").write_bytes(Path("truncated.png").read_bytes()[:900])
    if "--model" not in arguments and arguments[0] in ("generate", "reconstruct") and len(arguments) > 1:
        arguments = [*arguments, "--model", model]
    code, _, error = run(*arguments)
    assert code == 2
    assert error.startswith("flexvar: error: ")
    assert error.count("\n") == 1
    assert text in error


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "nonsense", "--out", "new"],
        ["generate", "star", "nonsense", "--out", "new"],
        ["generate", "star", "star", "99", "--batch", "2", "--out", "new"],
        ["generate", "star", "nonsense", "--num", "1", "--out", "new.png"],
        ["outpaint", "photo.png", "star", "nonsense", "--right", "4", "--out", "new"],
        ["generate", "--seed", "-1", "--out", "new/star.png"],
        ["generate", "star", "--top-k", str(2**63), "--out", "new/star.png"],
        ["reconstruct", "photo.png", "--schedule", "1,3", "--out", "new/scales.png"],
        ["reconstruct", "photo.png", "--columns", "0", "--out", "new/scales.png"],
        ["expand", "photo.png", "--size", "7", "--out", "new"],
        ["train", "tokenizer", "--resume", "--out", "new"],
    ],
)
def test_mistakes_leave_no_folder(run: Callable[..., Result], arguments: list[str]) -> None:
    Image.new("RGB", (8, 8)).save("photo.png")
    assert run(*arguments)[0] == 2
    assert os.listdir() == ["photo.png"]


def test_evaluate_takes_a_model_of_the_shapes_only(run: Callable[..., Result], model: str) -> None:
    code, _, error = run("train", "evaluate", "--model", model)
    assert code == 2
    assert error.startswith("flexvar: error: evaluate: the model's classes must be the shapes circle, ")
    assert error.endswith(", got circle, star, ../../evil name\n")
    assert os.listdir() == [], "no classifier was trained for it"


def test_a_full_disk_names_the_log(run: Callable[..., Result], largest_file: LargestFile) -> None:
    Path("data/grey").mkdir(parents=True)
    Image.new("RGB", (8, 8), "grey").save("data/grey/1.png")
    arguments = ["--data", "data", "--out", "run", "--steps", "1", "--batch-size", "1", "--height", "8", "--width", "8"]
    with largest_file(100):
        code, _, error = run("train", "tokenizer", *arguments)
    assert code == 2
    assert error.splitlines()[-1] == "flexvar: error: run/log.jsonl: File too large"


def test_without_arguments_there_is_help(run: Callable[..., Result]) -> None:
    for command in ([], ["train"]):
        code, text, error = run(*command)
        assert code == 2
        assert "Usage" in text + error
        assert "flexvar: error" not in error


def test_an_interrupt_is_no_traceback(generate: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FlexVARTransformer, "begin", interrupted)
    code, _, error = generate("star")
    assert code == 130
    assert error.endswith("flexvar: stopped\n")
    assert "Traceback" not in error


def test_an_early_end_of_a_file_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    def ended(*arguments: object, **options: object) -> None:
        raise EOFError

    monkeypatch.setattr(FlexVARTransformer, "begin", ended)
    monkeypatch.setattr(sys, "argv", ["flexvar", "generate", "star", "--model", model])
    with pytest.raises(typer.Abort) as stop:
        main()
    assert isinstance(stop.value.__cause__, EOFError)


def test_damaged_model(run: Callable[..., Result], tmp_path: Path, model: str) -> None:
    pipe = FlexVARPipeline.from_pretrained(model)
    pipe.save_pretrained(tmp_path / "damaged")
    weights = tmp_path / "damaged" / "transformer" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    code, _, error = run("generate", "--model", "damaged")
    assert code == 2
    assert "not a whole safetensors file" in error


def test_out_of_memory_is_one_line(generate: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*arguments: object, **options: object) -> None:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"
        )

    monkeypatch.setattr(FlexVARTransformer, "begin", exhausted)
    code, _, error = generate("star")
    assert code == 2
    assert "can't allocate memory" in error


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.setattr(FlexVARTransformer, "begin", lambda *_, **__: [].pop())
    monkeypatch.setattr(sys, "argv", ["flexvar", "generate", "star", "--model", model])
    with pytest.raises(IndexError):
        main()
