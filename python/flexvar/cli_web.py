"""The command ``flexvar web``."""

from __future__ import annotations

import ipaddress
import sys
from importlib.util import find_spec
from typing import Annotated

import typer

from flexvar.cli_options import (
    Backend,
    BackendOption,
    DeviceOption,
    ModelOption,
    Precision,
    PrecisionOption,
    load_pipeline,
)
from flexvar.web.limits import Limits


def web(
    host: Annotated[str, typer.Option(help="Address to listen on; the default is reached from this machine only.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int | None, typer.Option(help="Default: 7860, or the next that is free.")] = None,
    model: ModelOption = "demo",
    device: DeviceOption = "auto",
    dtype: PrecisionOption = Precision.float32,
    backend: BackendOption = Backend.native,
    max_pixels: Annotated[int, typer.Option(help="Pixels of all images of a request together.")] = Limits.max_pixels,
    max_images: Annotated[int, typer.Option(help="Images of a request.")] = Limits.max_images,
    max_steps: Annotated[int, typer.Option(help="Steps of a request.")] = Limits.max_steps,
    max_tokens: Annotated[
        int, typer.Option(help="Tokens of all steps and images of a request together.")
    ] = Limits.max_tokens,
    max_upload: Annotated[int, typer.Option(help="Bytes of an uploaded picture.")] = Limits.max_upload_bytes,
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait for the device.")] = Limits.max_waiting,
) -> None:
    """Open a page for generating and editing in a browser. It needs `pip install gradio`, and no internet.

    ```
    flexvar web
    flexvar web --model my-model --port 8000
    ```
    """
    if find_spec("gradio") is None:
        raise ImportError("web: the page needs gradio: pip install gradio")
    from flexvar.web.privacy import forbid_telemetry

    forbid_telemetry()
    limits = Limits(max_pixels, max_images, max_steps, max_tokens, max_upload, max_waiting)
    pipe = load_pipeline(model, device, backend)

    from flexvar.web.server import serve
    from flexvar.web.studio import Studio

    if not is_loopback(host):
        print(
            f"flexvar: note: {host} is not a loopback address: who reaches it can use the page, without a password",
            file=sys.stderr,
        )
    app = serve(Studio(pipe, model, limits, dtype.value), host, port, block=False)
    print(f"FlexVAR is at {app.local_url} (Ctrl+C stops it)", flush=True)
    app.block_thread()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server on this address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
