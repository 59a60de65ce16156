"""From class labels to images: the one loop over scales, and what surrounds it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from typing_extensions import Unpack

from flexvar._backend import ops
from flexvar._files import read_json_object, write_atomically
from flexvar.generation.guidance import guidance_weights, is_greedy_in_published_code, mix_guidance
from flexvar.generation.outputs import GenerationOutput, GenerationStep, Images, OutputType, check_output_type
from flexvar.generation.pretrained import SETTINGS_FILE, TOKENIZER_FOLDER, TRANSFORMER_FOLDER, locate_pipeline
from flexvar.generation.request import Labels, Seeds, resolve_labels, resolve_seeds
from flexvar.generation.settings import (
    GenerationOptions,
    GenerationSettings,
    Layout,
    check_model_defaults,
    make_settings,
)
from flexvar.image_io import image_to_tensor, tensor_to_images, tensor_to_uint8
from flexvar.schedule import ScaleSchedule, Size
from flexvar.storage import load_tokenizer, load_transformer, save_model
from flexvar.tokenizer import MultiScaleTokenizer
from flexvar.transformer import FlexVARTransformer


class FlexVARPipeline:
    """A tokenizer and a transformer that generate images together. Both are put into evaluation mode.

    >>> pipe = FlexVARPipeline.from_pretrained("demo")
    >>> pipe(["star", "heart"], seed=1).images[0].save("star.png")

    Args:
        tokenizer, transformer: models of one codebook.
        defaults: guidance_scale, guidance_style, top_k, top_p: those that suit the models, where a call does not say.

    Raises:
        TypeError: not a tokenizer and a transformer, or a default of something else.
        ValueError: their codebooks or upsampling modes differ, or a default is out of range.
    """

    def __init__(
        self,
        tokenizer: MultiScaleTokenizer,
        transformer: FlexVARTransformer,
        *,
        defaults: GenerationOptions | None = None,
    ) -> None:
        for name, model, kind in (
            ("tokenizer", tokenizer, MultiScaleTokenizer),
            ("transformer", transformer, FlexVARTransformer),
        ):
            if not isinstance(model, kind):
                raise TypeError(f"FlexVARPipeline: {name} must be a {kind.__name__}, got {type(model).__name__}")
        for name in ("codebook_size", "codebook_dim", "upsample_mode"):
            ours, theirs = getattr(tokenizer.config, name), getattr(transformer.config, name)
            if ours != theirs:
                raise ValueError(f"FlexVARPipeline: {name} of both models must agree, got {ours!r} and {theirs!r}")
        self.tokenizer = tokenizer.eval()
        self.transformer = transformer.eval()
        self.defaults = check_model_defaults(defaults or {})

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] = "demo",
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        backend: str = "native",
        revision: str | None = None,
    ) -> FlexVARPipeline:
        """Loads a pipeline that :meth:`save_pretrained` wrote.

        Args:
            source: ``"demo"`` for the bundled model, a folder, or a Hub id ``owner/name`` (needs ``huggingface_hub``).
                What exists as a folder is a folder; a folder called demo is ``"./demo"``.
            device: where to.
            dtype: what the weights become, float32 unless given.
            backend: "native", or "reference" for the plain-PyTorch ops.
            revision: branch, tag or commit on the Hub.

        Raises:
            OSError: nothing is there, or it cannot be read or fetched.
            ImportError: a Hub id without ``huggingface_hub``.
            ValueError, TypeError: files that are damaged or not a pipeline's.
        """
        folder = locate_pipeline(source, revision)
        pipeline = cls(
            load_tokenizer(folder / TOKENIZER_FOLDER, backend=backend),
            load_transformer(folder / TRANSFORMER_FOLDER, backend=backend),
            defaults=_read_defaults(folder),
        )
        return pipeline.to(device, dtype)

    def save_pretrained(self, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> None:
        """Writes models and defaults into a folder, which is made if need be, in ``dtype`` if given. Raises OSError."""
        save_model(self.tokenizer, Path(folder) / TOKENIZER_FOLDER, dtype=dtype)
        save_model(self.transformer, Path(folder) / TRANSFORMER_FOLDER, dtype=dtype)
        write_atomically(Path(folder) / SETTINGS_FILE, (json.dumps(self.defaults, indent=2) + "\n").encode())

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> FlexVARPipeline:
        """Moves both models, in place; returns the pipeline."""
        self.tokenizer.to(device, dtype)
        self.transformer.to(device, dtype)
        return self

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.transformer.head.weight.device

    @property
    def patch_size(self) -> int:
        """Pixels of the image along a side of one token."""
        return self.tokenizer.config.patch_size

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the classes are called; empty where the model has only numbers."""
        return self.transformer.config.class_names

    def settings(self, **options: Unpack[GenerationOptions]) -> GenerationSettings:
        """The settings of a call with these options: where they say nothing the model's defaults, then the paper's."""
        return make_settings({**self.defaults, **options})

    def __call__(
        self,
        class_labels: Labels,
        *,
        seed: Seeds = 0,
        image_ids: Sequence[int] | Tensor | None = None,
        output_type: OutputType = "pil",
        **settings: Unpack[GenerationOptions],
    ) -> GenerationOutput:
        """Generates one image per label.

        An image depends on its label, its seed and image id, and the settings: not on the other images of the batch,
        nor on its place among them, nor on any random state outside. Draws are exactly so. The matrix products and
        convolutions around them may round differently in batches of different sizes: codes are the same but for a draw
        that falls on a rounding error, and the pixels decoded from equal codes differ by about 1e-6 in float32.

        Args:
            class_labels: one or several: numbers, names where the model has them, None for no class; or an integer
                tensor [B]. The number of classes is itself the number of no class.
            seed: from 0 to 2**63 - 1. One for all: image i draws as (seed, i). One per image: image i draws as (its
                seed, 0), and is then the same image alone, in any batch and at any place.
            image_ids: stand in for i and 0: ``seed=7, image_ids=[3]`` is image 3 of the batch of seed 7.
            output_type: "pil", "np", "pt" or "latent", see :data:`flexvar.generation.outputs.Images`.
            settings: the fields of :class:`GenerationSettings`; what is left out is as in ``defaults``, then as there.

        Raises:
            TypeError, ValueError: an argument breaks its rule, or the model gives NaN.
        """
        check_output_type(output_type)
        steps = list(self.stream(class_labels, seed=seed, image_ids=image_ids, **settings))
        return GenerationOutput(images=steps[-1].preview(output_type), steps=steps)

    def stream(
        self,
        class_labels: Labels,
        *,
        seed: Seeds = 0,
        image_ids: Sequence[int] | Tensor | None = None,
        **settings: Unpack[GenerationOptions],
    ) -> Iterator[GenerationStep]:
        """A call step by step: each step is the whole image at its resolution, and ``step.preview()`` decodes it.

        Arguments, and errors, are those of a call. They are checked at once; a step is computed when it is asked for.
        """
        resolved = self.settings(**settings)
        config = self.transformer.config
        labels = resolve_labels(class_labels, config.num_classes, config.class_names)
        seeds, ids = resolve_seeds(seed, image_ids, len(labels))
        layout = resolved.layout(self.patch_size)
        self._check_models()
        return self._generate(labels, seeds, ids, layout, resolved)

    def reconstruct(
        self,
        images: Image.Image | Sequence[Image.Image] | Tensor,
        *,
        schedule: ScaleSchedule | Iterable[int | Iterable[int]] | None = None,
        steps: int | None = None,
        autocast_dtype: torch.dtype | None = None,
        output_type: OutputType = "pil",
    ) -> GenerationOutput:
        """Images through the tokenizer and back, at every scale of a schedule.

        Args:
            images: one or several of one size; a tensor is [B, 3, H, W] in [-1, 1]. Sides that are not multiples of the
                patch size are continued with their edge pixels, and the results cropped.
            schedule: the (h, w) of every scale in tokens, the last that of the images.
            steps: how many scales, instead; 10 unless set.
            autocast_dtype, output_type: as of a call.

        Raises:
            TypeError, ValueError: an argument breaks its rule.
        """
        check_output_type(output_type)
        pixels = images if isinstance(images, Tensor) else image_to_tensor(images)
        if pixels.ndim != 4 or pixels.shape[1] != 3 or 0 in pixels.shape:
            raise ValueError(f"reconstruct: images must have shape [B, 3, H, W], got {tuple(pixels.shape)}")
        height, width = pixels.shape[2:]
        settings = GenerationSettings(schedule, height, width, steps, autocast_dtype=autocast_dtype)
        layout = settings.layout(self.patch_size)
        self._check_models()
        padding = (0, -width % self.patch_size, 0, -height % self.patch_size)
        with self._computing(autocast_dtype):
            padded = F.pad(pixels.to(self.device, self.tokenizer.codebook.dtype), padding, mode="replicate")
            pyramid = self.tokenizer.quantize(self.tokenizer.encode(padded), layout.schedule)
        scales = [self._make_step(index, indices, layout, autocast_dtype) for index, indices in enumerate(pyramid)]
        return GenerationOutput(images=scales[-1].preview(output_type), steps=scales)

    def _generate(
        self, labels: Tensor, seeds: Tensor, image_ids: Tensor, layout: Layout, settings: GenerationSettings
    ) -> Iterator[GenerationStep]:
        """The loop over scales. What it carries lives in this frame, and no context stays entered across a step."""
        schedule, autocast_dtype = layout.schedule, settings.autocast_dtype
        weights = guidance_weights(schedule, settings.guidance_scale, settings.guidance_style)
        if any(weight != 0 for weight in weights):
            labels = torch.cat((labels, torch.full_like(labels, self.transformer.config.null_class)))
        seeds, image_ids = seeds.to(self.device), image_ids.to(self.device)
        with self._computing(autocast_dtype):
            state = self.transformer.begin(labels, schedule, cache_dtype=autocast_dtype)
        indices: Tensor | None = None
        for index, size in enumerate(schedule):
            is_greedy = settings.published_greedy_quirk and is_greedy_in_published_code(size)
            with self._computing(autocast_dtype):
                hidden = self.transformer.step(state, self._inputs_of_step(indices, size))
                if hidden.shape[0] > len(seeds):
                    hidden = mix_guidance(hidden, weights[index])
                drawn = ops(self.transformer.backend).guided_sample(
                    self.transformer.head_logits(hidden),
                    top_k=1 if is_greedy else settings.top_k,
                    top_p=settings.top_p,
                    seed=seeds,
                    image_ids=image_ids,
                    step=index,
                )
            # Looking costs a GPU a synchronisation, so there it is done once: NaN stays NaN in the steps that follow.
            is_last = index + 1 == len(schedule)
            if (self.device.type == "cpu" or is_last) and bool((drawn < 0).any()):
                raise ValueError(
                    f"generate: logits must be numbers, got only NaN or -infinity for a token of step {index}"
                )
            indices = drawn.unflatten(1, size)
            yield self._make_step(index, indices, layout, autocast_dtype)

    def _inputs_of_step(self, previous: Tensor | None, size: Size) -> Tensor | None:
        """The codes of the step before, int64 [B, h, w], on this step's grid: [B, l, codebook_dim]. None at first."""
        if previous is None:
            return None
        inputs = ops(self.transformer.backend).embed_resample(
            previous,
            self.tokenizer.codebook,
            size,
            normalize=self.tokenizer.config.normalize_codes,
            mode=self.transformer.config.upsample_mode,
        )
        return inputs.to(self.transformer.head.weight.dtype)

    def _make_step(
        self, index: int, indices: Tensor, layout: Layout, autocast_dtype: torch.dtype | None
    ) -> GenerationStep:
        return GenerationStep(
            index=index,
            num_steps=len(layout.schedule),
            size=layout.schedule[index],
            indices=_outside_inference_mode(indices),
            image_size=layout.preview_size(index),
            _decode=lambda codes, size, output_type: self._decode(codes, size, output_type, autocast_dtype),
        )

    def _decode(
        self, indices: Tensor, image_size: Size, output_type: str, autocast_dtype: torch.dtype | None
    ) -> Images:
        with self._computing(autocast_dtype):
            codes = self.tokenizer.quantize.embed(indices)
            decoded = None if output_type == "latent" else self.tokenizer.decode(codes)
        if decoded is None:
            return _outside_inference_mode(codes)
        images = _outside_inference_mode(decoded)[:, :, : image_size[0], : image_size[1]].float()
        if output_type == "pt":
            return images
        return tensor_to_images(images) if output_type == "pil" else tensor_to_uint8(images)

    @contextmanager
    def _computing(self, autocast_dtype: torch.dtype | None) -> Iterator[None]:
        """No gradients; autocast as asked for, whatever surrounds the call."""
        autocast = torch.autocast(self.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None)
        with torch.inference_mode(), autocast:
            yield

    def _check_models(self) -> None:
        """They are public and may have been changed since: a model in training mode would drop labels and paths."""
        for name, model in (("tokenizer", self.tokenizer), ("transformer", self.transformer)):
            if model.training:
                raise ValueError(f"generate: {name} must be in evaluation mode, got training mode; call {name}.eval()")
        if self.tokenizer.codebook.device != self.device:
            raise ValueError(
                f"generate: both models must be on one device, got {self.tokenizer.codebook.device} and {self.device}"
            )


def _read_defaults(folder: Path) -> GenerationOptions:
    path = folder / SETTINGS_FILE
    return check_model_defaults(read_json_object(path)) if path.is_file() else {}


def _outside_inference_mode(tensor: Tensor) -> Tensor:
    """A tensor that autograd, too, can use."""
    return tensor.clone() if tensor.is_inference() else tensor
