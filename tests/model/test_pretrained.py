"""Pipelines from folders and from the Hub."""

from __future__ import annotations

import os
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from flexvar import FlexVARPipeline, FlexVARTransformer, MultiScaleTokenizer, TokenizerConfig, TransformerConfig
from flexvar.generation.pretrained import FILES, SETTINGS_FILE, locate_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = MultiScaleTokenizer(TokenizerConfig(16, 8, 32, 32, (1, 2), num_res_blocks=1))
    transformer = FlexVARTransformer(TransformerConfig(1, 64, 2, 3, 16, 8, class_names=("a", "b", "c")))
    target = tmp_path_factory.mktemp("pipeline")
    FlexVARPipeline(tokenizer, transformer, defaults={"guidance_scale": 4.0, "top_k": 7}).save_pretrained(target)
    return target


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Stands in for huggingface_hub, which is not a dependency; the calls it gets."""
    calls: list[dict[str, object]] = []

    def snapshot_download(repository: str, **options: object) -> str:
        calls.append({"repository": repository, **options})
        if repository == "owner/offline":
            raise ConnectionError("cannot reach huggingface.co\nmore")
        return str(folder.parent if repository == "owner/other" else folder)

    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return calls


def test_round_trip(folder: Path, tmp_path: Path) -> None:
    pipe = FlexVARPipeline.from_pretrained(folder, backend="reference")
    assert pipe.class_names == ("a", "b", "c")
    files = [*FILES, SETTINGS_FILE]
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*.*")) == sorted(files)
    pipe.save_pretrained(tmp_path)
    for file in files:
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()


def test_defaults_of_the_model(folder: Path, tmp_path: Path) -> None:
    pipe = FlexVARPipeline.from_pretrained(folder, backend="reference")
    settings = pipe.settings(top_k=9)
    assert (settings.guidance_scale, settings.guidance_style, settings.top_k, settings.top_p) == (4.0, "var", 9, 0.95)
    explicit = pipe("a", schedule=[1, 2], guidance_scale=4.0, top_k=7, output_type="np").images
    assert (pipe("a", schedule=[1, 2], output_type="np").images == explicit).all()
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / SETTINGS_FILE).unlink()
    assert FlexVARPipeline.from_pretrained(tmp_path / "copy").defaults == {}


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ('{"height": 64}', "defaults of a model must be among guidance_scale, .* got height"),
        ('{"top_k": -1}', "top_k must be from 0 to .*, got -1"),
        ("[]", "must hold a JSON object"),
    ],
)
def test_foreign_defaults_are_refused(folder: Path, tmp_path: Path, content: str, error: str) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / SETTINGS_FILE).write_text(content)
    with pytest.raises((ValueError, TypeError), match=error):
        FlexVARPipeline.from_pretrained(tmp_path / "copy")


def test_dtype_and_backend(folder: Path) -> None:
    pipe = FlexVARPipeline.from_pretrained(str(folder), dtype=torch.bfloat16, backend="reference")
    assert {parameter.dtype for parameter in pipe.transformer.parameters()} == {torch.bfloat16}
    assert pipe("b", schedule=[1, 2], output_type="np").images.shape == (1, 4, 4, 3)
    with pytest.raises(ValueError, match='backend must be "native" or "reference", got \'fast\''):
        FlexVARPipeline.from_pretrained(folder, backend="fast")


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r'must be "demo", a folder or a Hub id owner/name, got .*nowhere'):
        FlexVARPipeline.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"must hold .*, but lacks tokenizer/config\.json"):
        FlexVARPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name", ["../etc", "a/..", "a/b/c", "/etc/passwd", "a", "", "owner/name.git/..", "https://x/y"]
)
def test_no_path_and_no_address_is_a_hub_id(name: str, hub: list[dict[str, object]]) -> None:
    with pytest.raises(FileNotFoundError):
        locate_pipeline(name)
    assert hub == []


def test_hub_fetches_four_files_and_no_others(hub: list[dict[str, object]], folder: Path) -> None:
    assert locate_pipeline("owner/name", "v1") == folder
    assert hub == [{"repository": "owner/name", "revision": "v1", "allow_patterns": [*FILES, SETTINGS_FILE]}]


def test_hub_errors_are_clear(hub: list[dict[str, object]]) -> None:
    with pytest.raises(OSError, match=r"'owner/offline' cannot be fetched from the Hub: cannot reach huggingface\.co$"):
        FlexVARPipeline.from_pretrained("owner/offline")
    with pytest.raises(FileNotFoundError, match="'owner/other' on the Hub must hold"):
        FlexVARPipeline.from_pretrained("owner/other")


def test_hub_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"'owner/name' is no folder here, and huggingface_hub, .* is not installed"):
        FlexVARPipeline.from_pretrained("owner/name")


def test_a_folder_comes_before_the_hub(
    folder: Path, hub: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    os.makedirs("owner", exist_ok=True)
    if not os.path.islink("owner/name"):
        os.symlink(folder, "owner/name")
    assert locate_pipeline("owner/name") == Path("owner/name")
    assert hub == []
    with pytest.raises(ValueError, match="revision must be left out where 'owner/name' is not a Hub id, got 'v1'"):
        locate_pipeline("owner/name", "v1")
