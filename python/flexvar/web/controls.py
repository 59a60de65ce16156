"""The controls that every task has: class, number, seed, steps and how codes are drawn."""

from __future__ import annotations

import math
import secrets
from typing import get_args

import gradio as gr

from flexvar.generation.guidance import GuidanceStyle
from flexvar.web.studio import Studio

ASPECTS = ("1:1", "4:3", "3:2", "2:1", "3:4", "2:3", "1:2")
_LARGEST_RANDOM_SEED = (1 << 31) - 1  # short enough to read; any up to 2**63 - 1 can be typed in


class Controls:
    """Makes the components; :attr:`inputs` are those that a request reads, by their names in the endpoint."""

    NAMES = ("label", "num", "seed", "steps", "guidance_scale", "guidance_style", "top_k", "top_p")

    def __init__(self, studio: Studio) -> None:
        config = studio.pipe.transformer.config
        names = list(studio.pipe.class_names) or [str(number) for number in range(config.num_classes)]
        defaults = studio.pipe.settings()
        with gr.Row(elem_classes="tight"):
            self.label = gr.Dropdown(
                names if "none" in map(str.casefold, names) else ["none", *names],
                value=names[0],
                label="Class",
                allow_custom_value=True,
                scale=2,
                min_width=140,
            )
            self.num = gr.Number(1, label="Images", precision=0, scale=1, min_width=80)
        with gr.Row(elem_classes="tight"):
            self.seed = gr.Number(0, label="Seed", precision=0, scale=3, min_width=140)
            self.steps = gr.Number(0, label="Steps (0: auto)", precision=0, scale=2, min_width=100)
        self.is_random = gr.Checkbox(True, label="New seed every time")
        with gr.Accordion("Sampling", open=False):
            with gr.Row(elem_classes="tight"):
                self.guidance = gr.Number(defaults.guidance_scale, label="Guidance", step=0.5, min_width=100)
                self.style = gr.Dropdown(
                    list(get_args(GuidanceStyle)), value=defaults.guidance_style, label="Guidance style", min_width=120
                )
            with gr.Row(elem_classes="tight"):
                self.top_k = gr.Number(defaults.top_k, label="Top-k", precision=0, min_width=100)
                self.top_p = gr.Slider(0, 1, value=defaults.top_p, step=0.01, label="Top-p", min_width=120)
        components = (
            self.label, self.num, self.seed, self.steps, self.guidance, self.style, self.top_k, self.top_p,
        )  # fmt: skip
        self.inputs = dict(zip(self.NAMES, components, strict=True))


class Sides:
    """Width and height, and the aspect ratio that sets both."""

    def __init__(self, studio: Studio, width: int, height: int) -> None:
        self._patch = studio.pipe.patch_size
        with gr.Row(elem_classes="tight"):
            self.aspect = gr.Dropdown(["free", *ASPECTS], value="1:1", label="Aspect", min_width=90)
            self.width = gr.Number(width, label="Width", precision=0, min_width=80)
            self.height = gr.Number(height, label="Height", precision=0, min_width=80)
        for side in (self.width, self.height):
            side.input(lambda: "free", None, self.aspect, queue=False, show_progress="hidden", api_visibility="private")
        self.aspect.input(
            self._set, [self.aspect, self.width, self.height], [self.width, self.height],
            queue=False, show_progress="hidden", api_visibility="private",
        )  # fmt: skip

    def _set(self, aspect: str, width: int | None, height: int | None) -> tuple[int | None, int | None]:
        """Sides of about the same area, in whole patches."""
        if aspect == "free" or not width or not height or width < 1 or height < 1:
            return width, height
        across, down = (int(part) for part in aspect.split(":"))
        unit = math.sqrt(width * height / (across * down)) / self._patch
        wide, high = (max(1, round(part * unit)) * self._patch for part in (across, down))
        return wide, high


def next_seed(seed: int | None, is_random: bool) -> int:
    """The seed of the next request."""
    return secrets.randbelow(_LARGEST_RANDOM_SEED + 1) if is_random or seed is None else seed
