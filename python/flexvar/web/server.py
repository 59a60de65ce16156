"""Starting the page's server."""

from __future__ import annotations

from importlib import resources

import gradio as gr

from flexvar.web.app import build_app
from flexvar.web.studio import Studio

_THEME = gr.themes.Default(
    primary_hue="indigo",
    neutral_hue="slate",
    font=["ui-sans-serif", "system-ui", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif"],
    font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
)


def serve(studio: Studio, host: str = "127.0.0.1", port: int | None = None, *, block: bool = True) -> gr.Blocks:
    """Launches the page; its address is ``local_url`` of what is returned.

    Args:
        studio: what draws.
        host: address to listen on.
        port: 7860 or the next free one, unless given.
        block: return only when the server is stopped.

    Raises:
        OSError: the port is taken, or the address is not this machine's.
    """
    app = build_app(studio)
    try:
        app.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            inbrowser=False,
            prevent_thread_lock=not block,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            max_file_size=studio.limits.max_upload_bytes,
            theme=_THEME,
            css=resources.files(__package__).joinpath("style.css").read_text("utf-8"),
        )
    except OSError as error:
        raise OSError(
            f"web: host and port must be free to listen on, got {host} and {port or '7860 to 7959'}"
        ) from error
    return app
