"""Generation: the pipeline from class labels to images, and what can be set about it."""

from flexvar.generation.editing import Edit, Expand, Inpaint, Outpaint, Refine
from flexvar.generation.guidance import GuidanceStyle, guidance_weights
from flexvar.generation.outputs import GenerationOutput, GenerationStep, Images, OutputType
from flexvar.generation.pipeline import FlexVARPipeline
from flexvar.generation.settings import GenerationSettings

__all__ = [
    "Edit",
    "Expand",
    "FlexVARPipeline",
    "GenerationOutput",
    "GenerationSettings",
    "GenerationStep",
    "GuidanceStyle",
    "Images",
    "Inpaint",
    "Outpaint",
    "OutputType",
    "Refine",
    "guidance_weights",
]
