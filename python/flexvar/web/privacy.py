"""Nothing that the page does is told to anyone."""

from __future__ import annotations

import os


def forbid_telemetry() -> None:
    """Turns off what gradio and huggingface_hub report, for this process. To be called before they are imported."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
