"""From class labels to images: the one loop over scales, and what surrounds it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from typing_extensions import Unpack

from flexvar._checks import check_weights_dtype, find_device
from flexvar._files import read_json_object, write_atomically
from flexvar.generation.cuda_graphs import GraphCache
from flexvar.generation.editing import Edit, Expand, Inpaint, Outpaint, Refine
from flexvar.generation.known_tokens import KnownTokens
from flexvar.generation.outputs import (
    GenerationOutput,
    GenerationStep,
    Images,
    OutputType,
    check_output_type,
    convert_images,
)
from flexvar.generation.pictures import Masks, Pictures, pad_to_patches, to_pixels
from flexvar.generation.pretrained import SETTINGS_FILE, TOKENIZER_FOLDER, TRANSFORMER_FOLDER, locate_pipeline
from flexvar.generation.request import Labels, Seeds, match_batch, resolve_labels, resolve_seeds
from flexvar.generation.settings import (
    GenerationOptions,
    GenerationSettings,
    Layout,
    SizelessOptions,
    check_model_defaults,
    make_settings,
)
from flexvar.generation.steps import Steps, computing
from flexvar.schedule import ScaleSchedule, Size
from flexvar.storage import load_tokenizer, load_transformer, save_model
from flexvar.tokenizer import MultiScaleTokenizer
from flexvar.transformer import FlexVARTransformer

# Of a decoding. Python launches kernels faster than a GPU computes larger ones, whose recordings would hold gigabytes.
_MAX_RECORDED_PIXELS = 2**19


class EditOptions(SizelessOptions, total=False):
    """The keyword arguments of a call that every editing task has too."""

    seed: Seeds
    image_ids: Sequence[int] | Tensor | None
    output_type: OutputType


class FlexVARPipeline:
    """A tokenizer and a transformer that generate images together. Both are put into evaluation mode.

    >>> pipe = FlexVARPipeline.from_pretrained("demo")
    >>> pipe(["star", "heart"], seed=1).images[0].save("star.png")

    Args:
        tokenizer, transformer: models of one codebook.
        defaults: guidance_scale, guidance_style, top_k, top_p: those that suit the models, where a call does not say.

    Attributes:
        cuda_graphs: on a GPU, what replays the kernels of the kinds of call used last
            (:class:`~flexvar.generation.cuda_graphs.GraphCache`); ``pipe.cuda_graphs = GraphCache(0)`` records none.

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
        self.cuda_graphs = GraphCache(capacity=4)

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
            ValueError, TypeError: files that are damaged or not a pipeline's; another device or dtype than :meth:`to`
                takes.
        """
        device = find_device("from_pretrained: device", device)
        check_weights_dtype("from_pretrained", dtype)
        folder = locate_pipeline(source, revision)
        pipeline = cls(
            load_tokenizer(folder / TOKENIZER_FOLDER, backend=backend),
            load_transformer(folder / TRANSFORMER_FOLDER, backend=backend),
            defaults=_read_defaults(folder),
        )
        return pipeline.to(device, dtype)

    def save_pretrained(self, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> None:
        """Writes models and defaults into a folder, which is made if need be, in ``dtype`` if given.

        Raises as :func:`flexvar.storage.save_model`.
        """
        save_model(self.tokenizer, Path(folder) / TOKENIZER_FOLDER, dtype=dtype)
        save_model(self.transformer, Path(folder) / TRANSFORMER_FOLDER, dtype=dtype)
        write_atomically(Path(folder) / SETTINGS_FILE, (json.dumps(self.defaults, indent=2) + "\n").encode())

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> FlexVARPipeline:
        """Moves both models, in place; returns the pipeline.

        Args:
            device: the CPU, or a GPU that torch finds.
            dtype: what the weights become: float32, float16, bfloat16; with the reference ops float64, too.

        Raises:
            TypeError, ValueError: another device or dtype.
        """
        device = find_device("to: device", device)
        check_weights_dtype("to", dtype)
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
        edit: Edit | None = None,
        seed: Seeds = 0,
        image_ids: Sequence[int] | Tensor | None = None,
        output_type: OutputType = "pil",
        **settings: Unpack[GenerationOptions],
    ) -> GenerationOutput:
        """Generates one image per label; with ``edit``, one around what it keeps of a picture.

        An image depends on its label, its seed and image id, and the settings: not on the other images of the batch,
        nor on its place among them, nor on any random state outside. On the CPU this holds for its codes to the bit, on
        any number of threads. On CUDA, and with the reference ops, draws are exact too, but matrix products round
        differently in batches of different sizes, and a draw that falls on the rounding error then changes. Pixels
        decoded from equal codes differ by about 1e-5 in float32: the decoder's attention, and convolutions that are
        torch's (:func:`flexvar_ext.conv3x3_is_native`), round by batch size as well; and by more where torch runs them
        in TF32, as it does on CUDA unless ``torch.backends.cudnn.allow_tf32`` is False.

        Args:
            class_labels: one or several: numbers, names where the model has them, None for no class; or an integer
                tensor [B]. A string is always a name, "1" too. The number of classes is itself the number of no class.
            edit: :class:`Inpaint`, :class:`Outpaint`, :class:`Expand` or :class:`Refine`. Its one picture serves every
                label, or its pictures are one per label; one label serves every picture. It says the height and width.
            seed: from 0 to 2**63 - 1. One for all: image i draws as (seed, i). One per image: image i draws as (its
                seed, 0), and is then the same image alone, in any batch and at any place.
            image_ids: stand in for i and 0: ``seed=7, image_ids=[3]`` is image 3 of the batch of seed 7.
            output_type: "pil", "np", "pt" or "latent", see :data:`flexvar.generation.outputs.Images`.
            settings: the fields of :class:`GenerationSettings`; what is left out is as in ``defaults``, then as there.

        Raises:
            TypeError, ValueError: an argument breaks its rule, or the model gives NaN.
        """
        check_output_type(output_type)
        stream = self._stream(class_labels, edit, seed, image_ids, settings, looks_late=True)
        steps: list[GenerationStep] = []
        for step in stream:
            steps.append(step)
            if step.index + 1 == step.num_steps:  # on a GPU decoding is under way before the codes are looked at
                decoded = cast(Tensor, step.preview("latent" if output_type == "latent" else "pt"))
        return GenerationOutput(images=convert_images(decoded, output_type), steps=steps)

    def stream(
        self,
        class_labels: Labels,
        *,
        edit: Edit | None = None,
        seed: Seeds = 0,
        image_ids: Sequence[int] | Tensor | None = None,
        **settings: Unpack[GenerationOptions],
    ) -> Iterator[GenerationStep]:
        """A call step by step: each step is the whole image at its resolution, and ``step.preview()`` decodes it.

        Arguments, and errors, are those of a call. They are checked at once; a step is computed when it is asked for,
        so leaving the loop is all it takes to cancel. Edits stream in the same way:

        >>> for step in pipe.stream("star", edit=Inpaint("photo.png", "mask.png"), seed=3):
        ...     step.preview()  # of the last step: the finished image, known pixels pasted
        """
        return self._stream(class_labels, edit, seed, image_ids, settings, looks_late=False)

    def _stream(
        self,
        class_labels: Labels,
        edit: Edit | None,
        seed: Seeds,
        image_ids: Sequence[int] | Tensor | None,
        settings: GenerationOptions,
        looks_late: bool,
    ) -> Iterator[GenerationStep]:
        resolved = self.settings(**settings)
        config = self.transformer.config
        labels = resolve_labels(class_labels, config.num_classes, config.class_names)
        if edit is not None:
            if not isinstance(edit, Edit):
                raise TypeError(f"generate: edit must be an Inpaint, Outpaint, Expand or Refine, got {edit!r:.100}")
            for name in ("height", "width"):
                if getattr(resolved, name) is not None:
                    raise ValueError(
                        f"{edit.task}: {name} must be left out of the settings, got {getattr(resolved, name)}"
                    )
            resolved = replace(resolved, height=edit.size[0], width=edit.size[1])
            labels = match_batch(labels, edit)
        seeds, ids = resolve_seeds(seed, image_ids, len(labels))
        layout = resolved.layout(self.patch_size)
        cells = None if edit is None else edit.known_cells(layout, self.patch_size)
        self._check_models(resolved.autocast_dtype)
        return self._generate(labels, seeds, ids, layout, resolved, edit, cells, looks_late)

    def inpaint(
        self,
        image: Pictures,
        mask: Masks,
        class_labels: Labels = None,
        *,
        paste: bool = True,
        feather: int = 0,
        start_step: int | None = None,
        **options: Unpack[EditOptions],
    ) -> GenerationOutput:
        """A call with ``edit=``:class:`Inpaint`: paints anew where the mask is white. ``options`` are those of a call.

        >>> pipe.inpaint("photo.png", "mask.png", "star", seed=2, feather=4).images[0].save("edited.png")
        """
        return self(
            class_labels, edit=Inpaint(image, mask, paste=paste, feather=feather, start_step=start_step), **options
        )

    def outpaint(
        self,
        image: Pictures,
        left: int = 0,
        right: int = 0,
        top: int = 0,
        bottom: int = 0,
        class_labels: Labels = None,
        *,
        paste: bool = True,
        feather: int = 0,
        start_step: int | None = None,
        **options: Unpack[EditOptions],
    ) -> GenerationOutput:
        """A call with ``edit=``:class:`Outpaint`: continues the picture by margins in pixels. ``options``: of a call.

        >>> pipe.outpaint("photo.png", left=32, right=32, class_labels="star").images[0].save("wide.png")
        """
        edit = Outpaint(image, left, right, top, bottom, paste=paste, feather=feather, start_step=start_step)
        return self(class_labels, edit=edit, **options)

    def expand(
        self,
        image: Pictures,
        height: int,
        width: int,
        class_labels: Labels = None,
        *,
        paste: bool = True,
        feather: int = 0,
        start_step: int | None = None,
        **options: Unpack[EditOptions],
    ) -> GenerationOutput:
        """A call with ``edit=``:class:`Expand`: the picture in the centre of a larger one. ``options``: of a call.

        >>> pipe.expand("photo.png", 64, 128, "star").images[0].save("wide.png")  # the paper's 1:2
        """
        edit = Expand(image, height, width, paste=paste, feather=feather, start_step=start_step)
        return self(class_labels, edit=edit, **options)

    def refine(
        self,
        image: Pictures,
        height: int,
        width: int,
        start_step: int | None = None,
        class_labels: Labels = None,
        **options: Unpack[EditOptions],
    ) -> GenerationOutput:
        """A call with ``edit=``:class:`Refine`: draws what the picture is too small to show. ``options``: of a call.

        >>> pipe.refine("small.png", 128, 128, class_labels="star").images[0].save("large.png")
        """
        return self(class_labels, edit=Refine(image, height, width, start_step), **options)

    def reconstruct(
        self,
        images: Pictures,
        *,
        schedule: ScaleSchedule | Iterable[int | Iterable[int]] | None = None,
        steps: int | None = None,
        autocast_dtype: torch.dtype | None = None,
        output_type: OutputType = "pil",
    ) -> GenerationOutput:
        """Images through the tokenizer and back, at every scale of a schedule.

        Args:
            images: see :data:`~flexvar.generation.pictures.Pictures`. Sides that are not multiples of the patch size
                are continued with their edge pixels, and the results cropped.
            schedule: the (h, w) of every scale in tokens, the last that of the images.
            steps: how many scales, instead; as of a call.
            autocast_dtype, output_type: as of a call.

        Raises:
            OSError: a file cannot be read.
            TypeError, ValueError: an argument breaks its rule.
        """
        check_output_type(output_type)
        pixels = to_pixels("reconstruct", images)
        height, width = pixels.shape[2:]
        settings = GenerationSettings(schedule, height, width, steps, autocast_dtype=autocast_dtype)
        layout = settings.layout(self.patch_size)
        self._check_models(autocast_dtype)
        pyramid = self._encode(pad_to_patches(pixels, self.patch_size), layout.schedule, autocast_dtype)
        scales = [self._make_step(index, indices, layout, autocast_dtype) for index, indices in enumerate(pyramid)]
        return GenerationOutput(images=scales[-1].preview(output_type), steps=scales)

    def _generate(
        self,
        labels: Tensor,
        seeds: Tensor,
        image_ids: Tensor,
        layout: Layout,
        settings: GenerationSettings,
        edit: Edit | None,
        known_cells: list[Tensor] | None,
        looks_late: bool,
    ) -> Iterator[GenerationStep]:
        """The loop over scales. What it carries lives in this frame, and no context stays entered across a step.

        With ``looks_late`` it looks for NaN behind the last step, when that has been taken.
        """
        schedule, autocast_dtype = layout.schedule, settings.autocast_dtype
        known: KnownTokens | None = None
        if edit is not None and known_cells is not None:
            codes = self._encode(edit.pixels_to_encode(layout, self.patch_size), schedule, autocast_dtype)
            known = KnownTokens(codes, [cells.to(self.device) for cells in known_cells])
        num_drawn_steps = len(schedule) if known is None else known.num_drawn_steps
        plain_steps = Steps(self.tokenizer, self.transformer, schedule, settings)
        with self.cuda_graphs.using(plain_steps, len(labels), self.device) as steps:
            steps.begin(labels, seeds, image_ids)
            indices: Tensor | None = None
            is_drawn: Tensor | None = None  # whether the codes of the last step that was looked at are codes
            for index in range(len(schedule)):
                if index < num_drawn_steps:
                    steps.advance(index, indices)
                if known is not None and known.complete[index]:
                    indices = known.whole(index, len(labels))
                else:
                    drawn = steps.sample(index)
                    # Looking costs a GPU a synchronisation, so there it is done once: NaN stays NaN in all later steps.
                    if self.device.type == "cpu" or index + 1 == num_drawn_steps:
                        is_drawn = (drawn >= 0).all()
                        if self.device.type == "cpu" or not looks_late:
                            _check_drawn(is_drawn, index)
                    indices = drawn if known is None else known.force(index, drawn)
                yield self._make_step(index, indices, layout, autocast_dtype, edit)
            if is_drawn is not None:
                _check_drawn(is_drawn, num_drawn_steps - 1)

    def _encode(self, pixels: Tensor, schedule: ScaleSchedule, autocast_dtype: torch.dtype | None) -> list[Tensor]:
        """[B, 3, H, W] with sides that are multiples of the patch size -> for every step int64 [B, h_i, w_i]."""
        with computing(self.device, autocast_dtype):
            latent = self.tokenizer.encode(pixels.to(self.device, self.tokenizer.codebook.dtype))
            return self.tokenizer.quantize(latent, schedule)

    def _make_step(
        self,
        index: int,
        indices: Tensor,
        layout: Layout,
        autocast_dtype: torch.dtype | None,
        edit: Edit | None = None,
    ) -> GenerationStep:
        is_last = index + 1 == len(layout.schedule)
        finish = edit.finish if edit is not None and is_last else None
        return GenerationStep(
            index=index,
            num_steps=len(layout.schedule),
            size=layout.schedule[index],
            indices=indices.clone(),  # the caller's own, and one that autograd, too, can use
            image_size=layout.preview_size(index),
            _decode=lambda codes, size, output_type: self._decode(codes, size, output_type, autocast_dtype, finish),
        )

    def _decode(
        self,
        indices: Tensor,
        image_size: Size,
        output_type: str,
        autocast_dtype: torch.dtype | None,
        finish: Callable[[Tensor], Tensor] | None,
    ) -> Images:
        if output_type == "latent":
            with computing(self.device, autocast_dtype):
                codes = self.tokenizer.quantize.embed(indices)
            return _outside_inference_mode(codes)

        def decode(codes: Tensor) -> Tensor:
            with computing(self.device, autocast_dtype):
                return self.tokenizer.decode(codes)

        if indices.numel() * self.patch_size**2 <= _MAX_RECORDED_PIXELS:
            modules = (self.tokenizer.quantize, self.tokenizer.post_quant_conv, self.tokenizer.decoder)
            decoded = self.cuda_graphs.decode(decode, indices, autocast_dtype, modules)
        else:
            decoded = decode(indices)
        images = _outside_inference_mode(decoded)[:, :, : image_size[0], : image_size[1]].float()
        if finish is not None:
            images = finish(images)
        return convert_images(images, output_type)

    def _check_models(self, autocast_dtype: torch.dtype | None) -> None:
        """They are public and may have been changed since: a model in training mode would drop labels and paths."""
        for name, model in (("tokenizer", self.tokenizer), ("transformer", self.transformer)):
            weight = self.tokenizer.codebook if name == "tokenizer" else self.transformer.head.weight
            if model.backend == "native" and weight.dtype == torch.float64:
                raise TypeError(f"generate: {name} must not be in float64 with the native ops, got {weight.dtype}")
            if autocast_dtype is not None and weight.dtype not in (torch.float32, autocast_dtype):
                raise TypeError(
                    f"generate: autocast_dtype must be the dtype of the {name}'s weights unless that is float32, got "
                    f"{autocast_dtype} for {weight.dtype}"
                )
            if model.training:
                raise ValueError(f"generate: {name} must be in evaluation mode, got training mode; call {name}.eval()")
        if self.tokenizer.codebook.device != self.device:
            raise ValueError(
                f"generate: both models must be on one device, got {self.tokenizer.codebook.device} and {self.device}"
            )


def _read_defaults(folder: Path) -> GenerationOptions:
    path = folder / SETTINGS_FILE
    return check_model_defaults(read_json_object(path)) if path.is_file() else {}


def _check_drawn(is_drawn: Tensor, step: int) -> None:
    if not bool(is_drawn):
        raise ValueError(f"generate: logits must be numbers, got only NaN or -infinity for a token of step {step}")


def _outside_inference_mode(tensor: Tensor) -> Tensor:
    """A tensor that autograd, too, can use."""
    return tensor.clone() if tensor.is_inference() else tensor
