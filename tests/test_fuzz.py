"""Over a hundred thousand damaged and invented inputs: each is read, or refused with a documented error.

Configs, settings, model files and pictures come from others. Whatever they hold: no other exception, no crash, no hang,
no memory beyond what a valid input of that size takes. Seeded, so that a failure comes back.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import random
import resource
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flexvar import ScaleSchedule, TokenizerConfig, TransformerConfig, load_checkpoint_file
from flexvar._files import read_json_object
from flexvar.drawing import Drawing
from flexvar.edit_request import EditRequest
from flexvar.generation.settings import check_model_defaults, make_settings
from flexvar.image_io import open_image, open_mask, read_settings
from flexvar.rerun import Recipe
from flexvar.storage import load_transformer, save_model
from flexvar.training import TokenizerTrainingConfig, TransformerTrainingConfig
from flexvar.transformer import FlexVARTransformer
from PIL import Image
from safetensors.torch import save

SLOWEST_SECONDS = 5.0  # of one case; thousands of times what it takes
MEMORY_MIB = 300  # of all cases of a test

REFUSALS = (ValueError, TypeError)


def read_all(cases: Iterator[Any], read: Callable[[Any], object], errors: tuple[type[Exception], ...]) -> int:
    """Reads every case; returns how many were refused."""
    before, refused = _peak_mib(), 0
    for case in cases:
        start = time.perf_counter()
        try:
            read(case)
        except errors as error:
            refused += 1
            assert str(error), f"a refusal must say why, got {error!r} for {case!r:.300}"  # noqa: PT017
        except BaseException as error:
            raise AssertionError(f"got {error!r:.300} for {case!r:.2000}") from error
        seconds = time.perf_counter() - start
        assert seconds < SLOWEST_SECONDS, f"took {seconds:.1f} s for {case!r:.2000}"
    assert _peak_mib() - before < MEMORY_MIB
    return refused


def _peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


# --- JSON: configs, schedules, settings, what a PNG says ------------------------------------------------------------

_SCALARS = (
    None, True, False, 0, 1, -1, 2, 16, 2**31, 2**63, -(2**64), 10**400, 0.0, -0.0, 0.5, 1.0, 1e308, 5e-324, math.nan,
    math.inf, -math.inf, "", "a", "bicubic", "var", "float32", "1", "\0", "../../etc/passwd", "/dev/zero", "é\ud800",
    "x" * 1000,
)  # fmt: skip


def any_json(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.random()
    if depth > 3 or kind < 0.7:
        return rng.choice(_SCALARS) if rng.random() < 0.7 else rng.randint(-(10**6), 10**6)
    length = rng.choice((0, 1, 2, 2, 3, 20))
    if kind < 0.9:
        return [any_json(rng, depth + 1) for _ in range(length)]
    return {str(any_json(rng, depth + 3)): any_json(rng, depth + 1) for _ in range(length)}


def changed_json(rng: random.Random, value: Any) -> Any:
    """The value with one to three things in it replaced, dropped or added, at any depth."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        if not value or not isinstance(value, (dict, list)) or rng.random() < 0.01:
            return any_json(rng)
        place = value
        while True:
            key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
            if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.5:
                break
            place = place[key]
        how = rng.random()
        if how < 0.8:
            place[key] = any_json(rng)
        elif how < 0.9:
            del place[key]
        elif isinstance(place, dict):
            place[str(rng.choice(_SCALARS))] = any_json(rng)
        else:
            place.append(any_json(rng))
    return value


def round_trip(cls: type) -> Callable[[Any], object]:
    def read(values: Any) -> None:
        config = cls.from_dict(values)
        assert cls.from_dict(json.loads(json.dumps(config.to_dict()))) == config

    return read


_DRAWING = {
    "command": "generate", "model": "demo", "device": "cpu", "backend": "native", "image_ids": [0], "sheet": None,
    "labels": [3, "star", None], "num": 4, "batch": 2, "seed": 1, "dtype": "float32", "height": 64, "width": 96,
    "schedule": [[1, 1], [4, 6]], "guidance_scale": 2.0, "guidance_style": "var", "top_k": 900, "top_p": 0.9,
    "published_greedy_quirk": False, "edit": None, "version": "0.1.0",
}  # fmt: skip
_EDIT = {
    "task": "inpaint", "image": {"file": "a.png", "sha256": "0" * 64}, "mask": {"file": "a.png", "sha256": "0" * 64},
    "max_side": 0, "paste": True, "feather": 2, "start_step": 0, "left": 1, "right": 1, "top": 0, "bottom": 0,
    "height": 64, "width": 96,
}  # fmt: skip


def read_drawing(record: Any) -> None:
    drawing = Drawing.from_record(record if isinstance(record, dict) else {})
    make_settings(drawing.options).layout(16)


@pytest.mark.parametrize(
    ("read", "valid"),
    [
        pytest.param(round_trip(TokenizerConfig), TokenizerConfig().to_dict(), id="tokenizer"),
        pytest.param(
            round_trip(TransformerConfig),
            TransformerConfig(num_classes=3, class_names=("a", "b", "c")).to_dict(),
            id="transformer",
        ),
        pytest.param(
            round_trip(TokenizerTrainingConfig), TokenizerTrainingConfig().to_dict(), id="training of a tokenizer"
        ),
        pytest.param(
            round_trip(TransformerTrainingConfig), TransformerTrainingConfig().to_dict(), id="training of a transformer"
        ),
        pytest.param(ScaleSchedule, [1, [2, 4], [5, 9], [16, 16]], id="schedule"),
        pytest.param(
            check_model_defaults,
            {"guidance_scale": 2.0, "guidance_style": "llamagen", "top_k": 0, "top_p": 0.5},
            id="model defaults",
        ),
        pytest.param(read_drawing, _DRAWING, id="drawing"),
    ],
)
def test_json(read: Callable[[Any], object], valid: Any) -> None:
    read(valid)
    rng = random.Random(0)
    refused = read_all((changed_json(rng, valid) for _ in range(6000)), read, REFUSALS)
    assert 0 < refused < 6000


def test_edits_of_a_png(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    rng = random.Random(0)
    cases = (changed_json(rng, {**_EDIT, "task": rng.choice(("inpaint", "outpaint", "expand"))}) for _ in range(4000))
    assert 0 < read_all(cases, lambda record: EditRequest.from_record(record, tmp_path, {}), REFUSALS) < 4000


# --- bytes ----------------------------------------------------------------------------------------------------------


def changed_bytes(rng: random.Random, valid: bytes) -> bytes:
    """With bits flipped, bytes overwritten, or pieces lost, doubled or swapped; most of it where headers are."""
    data = bytearray(valid)
    for _ in range(rng.randint(1, 4)):
        end = max(1, len(data) if rng.random() < 0.5 else min(len(data), 64))
        at = rng.randrange(end)
        how = rng.random()
        if not data:
            break
        if how < 0.35:
            data[at] ^= 1 << rng.randrange(8)
        elif how < 0.6:
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif how < 0.75:
            data[at : at + 4] = rng.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"))
        elif how < 0.85:
            del data[at : at + rng.randint(1, 32)]
        elif how < 0.95:
            data[at:at] = data[rng.randrange(end) :][: rng.randint(1, 32)]
        else:
            del data[at:]
    return bytes(data)


def from_files(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    def write_and_read(content: bytes) -> object:
        path.write_bytes(content)
        return read(path)

    return write_and_read


def test_json_files(tmp_path: Path) -> None:
    valid = json.dumps({"config": TokenizerConfig().to_dict(), "text": 'é"\\', "number": -1.5e-7}).encode()
    rng = random.Random(0)
    read = from_files(tmp_path / "config.json", read_json_object)
    assert read_all((changed_bytes(rng, valid) for _ in range(5000)), read, (ValueError,)) > 0


TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b.weight": torch.ones(4, dtype=torch.float16), "c": torch.ones(())}


def test_safetensors_files(tmp_path: Path) -> None:
    valid = save(TENSORS, metadata={"crc32": "00000000"})
    rng = random.Random(0)
    read = from_files(tmp_path / "a.safetensors", load_checkpoint_file)
    assert read_all((changed_bytes(rng, valid) for _ in range(6000)), read, (ValueError,)) > 0


def test_safetensors_headers(tmp_path: Path) -> None:
    """Headers that are JSON, of the length they say, but of tensors that are not there or not so."""
    valid = save(TENSORS)
    (length,) = struct.unpack("<Q", valid[:8])
    header, data = json.loads(valid[8 : 8 + length]), valid[8 + length :]
    rng = random.Random(0)

    def cases() -> Iterator[bytes]:
        for _ in range(6000):
            text = json.dumps(changed_json(rng, header)).encode()
            yield struct.pack("<Q", len(text)) + text + data

    assert read_all(cases(), from_files(tmp_path / "a.safetensors", load_checkpoint_file), (ValueError,)) > 0


def test_pth_files(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save({"model": TENSORS, "epoch": 3}, stream)
    rng = random.Random(0)
    read = from_files(tmp_path / "a.pth", load_checkpoint_file)
    assert read_all((changed_bytes(rng, stream.getvalue()) for _ in range(3000)), read, (ValueError,)) > 0


def test_model_folders(tmp_path: Path) -> None:
    config = TransformerConfig(depth=1, width=32, heads=1, num_classes=2, codebook_size=4, codebook_dim=4, mlp_ratio=1)
    save_model(FlexVARTransformer(config), tmp_path)
    weights, settings = (tmp_path / "model.safetensors").read_bytes(), config.to_dict()
    rng = random.Random(0)

    def cases() -> Iterator[tuple[bytes, bytes]]:
        for case in range(300):
            if case % 2:
                yield changed_bytes(rng, weights), json.dumps(settings).encode()
            else:
                yield weights, json.dumps(changed_json(rng, settings)).encode()

    def read(case: tuple[bytes, bytes]) -> None:
        (tmp_path / "model.safetensors").write_bytes(case[0])
        (tmp_path / "config.json").write_bytes(case[1])
        load_transformer(tmp_path)

    assert read_all(cases(), read, REFUSALS) > 0


# --- pictures -------------------------------------------------------------------------------------------------------


def _encoded(format: str) -> bytes:
    picture = Image.effect_noise((16, 16), 80)
    for mode in ("RGB", "P", "L", "1", "RGBA"):
        stream = io.BytesIO()
        try:
            picture.convert(mode).save(stream, format=format)
            open_image(io.BytesIO(stream.getvalue()))
        except (OSError, ValueError):
            continue
        return stream.getvalue()
    return b""


def _pictures() -> dict[str, bytes]:
    """A small picture in every format that Pillow writes and we read, and in some that it only reads."""
    Image.init()
    written = {format: _encoded(format) for format in sorted(Image.SAVE) if format in Image.OPEN}
    by_hand = {
        "SUN": struct.pack(">8I", 0x59A66A95, 4, 4, 24, 48, 1, 0, 0) + bytes(48),
        "PSD": b"8BPS" + struct.pack(">H6xHIIHH3I", 1, 3, 4, 4, 8, 3, 0, 0, 0) + b"\0\0" + bytes(48),
        "XPM": b'/* XPM */\nstatic char *a[] = {\n"2 2 2 1",\n"a c #ff0000",\n"b c #00ff00",\n"ab",\n"ba",\n};\n',
        "CUR": struct.pack("<HHH4B2HIIIiiHH6I", 0, 2, 1, 2, 2, 0, 0, 0, 0, 72, 22, 40, 2, 4, 1, 24, 0, 32, 0, 0, 0, 0)
        + bytes(32),
        "FITS": b"".join(
            card.ljust(80)
            for card in (b"SIMPLE  = T", b"BITPIX  = 8", b"NAXIS   = 2", b"NAXIS1  = 4", b"NAXIS2  = 4", b"END")
        ).ljust(2880)
        + bytes(2880),
    }
    return {format: data for format, data in (written | by_hand).items() if data}


PICTURES = _pictures()


@pytest.mark.filterwarnings("ignore")  # of Pillow, on damaged metadata
@pytest.mark.parametrize("format", PICTURES)
def test_pictures(format: str) -> None:
    rng = random.Random(0)

    def read(data: bytes) -> None:
        opened = (open_image if len(data) % 4 else open_mask)(io.BytesIO(data), max_pixels=10_000)
        assert opened.width * opened.height <= 10_000

    read(PICTURES[format])
    assert read_all((changed_bytes(rng, PICTURES[format]) for _ in range(1200)), read, (ValueError,)) > 0


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks)


@pytest.mark.filterwarnings("ignore")
def test_chunks_of_a_png(tmp_path: Path) -> None:
    """Changed inside its chunks, whose checksums are right again: what a checksum would have caught goes further."""
    text = json.dumps(_DRAWING).encode()
    exif = Image.Exif()
    exif[0x0112] = 6
    valid = [
        (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 3, 0, 0, 0)),
        (b"PLTE", bytes(range(30))),
        (b"tRNS", b"\0\x80\xff"),
        (b"iCCP", b"a\0\0" + zlib.compress(bytes(200))),
        (b"eXIf", exif.tobytes()[6:]),
        (b"acTL", struct.pack(">II", 1, 0)),
        (b"tEXt", b"flexvar\0" + text),
        (b"zTXt", b"comment\0\0" + zlib.compress(text)),
        (b"iTXt", b"other\0\1\0en\0\0" + zlib.compress(text)),
        (b"IDAT", zlib.compress(bytes(9 * 8))),
        (b"IEND", b""),
    ]
    rng = random.Random(0)

    def cases() -> Iterator[bytes]:
        for _ in range(8000):
            chunks = list(valid)
            for _ in range(rng.randint(1, 2)):
                at = rng.randrange(len(chunks) - 1)
                how = rng.random()
                if how < 0.8:
                    chunks[at] = (chunks[at][0], changed_bytes(rng, chunks[at][1]))
                elif how < 0.9:
                    chunks.insert(at, chunks[rng.randrange(len(chunks) - 1)])
                else:
                    del chunks[at]
            yield _png(chunks)

    def read(data: bytes) -> None:
        open_image(io.BytesIO(data), max_pixels=10_000)
        path = tmp_path / "a.png"
        path.write_bytes(data)
        read_drawing(Recipe.read(path).settings)

    assert 0 < read_all(cases(), read, REFUSALS) < 8000


@functools.cache
def _packed_zeros() -> bytes:
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(300)) + packer.flush()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["text", "texts", "profile", "icon", "png", "tiff", "gif"])
def test_bombs(kind: str, tmp_path: Path) -> None:
    """Files of under a mebibyte that unpack to hundreds."""
    zeros = _packed_zeros()
    header, end = (b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0)), (b"IEND", b"")
    pixels = (b"IDAT", zlib.compress(bytes(13 * 4)))
    large = _png([(b"IHDR", struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)), (b"IDAT", zeros), end])
    data = {
        "text": lambda: _png([header, (b"zTXt", b"flexvar\0\0" + zeros), pixels, end]),
        "texts": lambda: _png([header, *[(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 20)))] * 400, pixels, end]),
        "profile": lambda: _png([header, (b"iCCP", b"a\0\0" + zeros), pixels, end]),
        "icon": lambda: struct.pack("<HHH4BHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(large), 22) + large,
        "png": lambda: large,
        "tiff": lambda: (
            struct.pack("<2sHI", b"II", 42, 8)
            + struct.pack("<H", 8)
            + b"".join(
                struct.pack("<HHII", *entry)
                for entry in [
                    (256, 4, 1, 4),
                    (257, 4, 1, 4),
                    (258, 3, 1, 8),
                    (259, 3, 1, 8),
                    (262, 3, 1, 1),
                    (273, 4, 1, 110),
                    (278, 4, 1, 4),
                    (279, 4, 1, len(zeros)),
                ]
            )
            + struct.pack("<I", 0)
            + zeros
        ),
        "gif": lambda: (
            struct.pack("<6sHHBBB", b"GIF89a", 4, 4, 0, 0, 0)
            + struct.pack("<BHHHHB", 0x2C, 0, 0, 10_000, 10_000, 0)
            + b"\x02\x02\x44\x01\x00\x3b"
        ),
    }[kind]()
    assert len(data) < 1 << 20
    before = _peak_mib()
    with contextlib.suppress(ValueError):
        open_image(io.BytesIO(data), max_pixels=10_000)
    if kind in ("text", "texts"):
        (tmp_path / "a.png").write_bytes(data)
        with pytest.raises(ValueError, match="undamaged PNG"):
            read_settings(tmp_path / "a.png")
    assert _peak_mib() - before < 100
