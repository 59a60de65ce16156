"""A tiny model in a folder, and ``flexvar`` run in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flexvar import FlexVARPipeline, FlexVARTransformer, MultiScaleTokenizer, TokenizerConfig, TransformerConfig
from flexvar.cli import main

NAMES = ("circle", "star", "../../evil name")

Result = tuple[int, str, str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny pipeline: patches of 4 px, 3 classes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = MultiScaleTokenizer(TokenizerConfig(32, 8, 32, 32, (1, 1, 2), num_res_blocks=1, norm_groups=8))
        transformer = FlexVARTransformer(TransformerConfig(1, 64, 2, 3, 32, 8, class_names=NAMES))
    folder = tmp_path_factory.mktemp("model")
    FlexVARPipeline(tokenizer, transformer, defaults={"guidance_style": "llamagen"}).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Result]:
    """Runs ``flexvar`` in this process and an empty folder -> exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["flexvar", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run
