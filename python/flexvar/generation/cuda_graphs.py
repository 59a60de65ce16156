"""Generation as CUDA graphs: a step's hundreds of kernels are launched at once, without Python in between.

At batch 1 a GPU finishes the kernels of a step sooner than Python launches them. Kernels and their order depend on the
schedule, the batch size and the settings alone, so they are recorded once for each of these and replayed on new labels,
seeds and codes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from threading import Lock, RLock
from typing import ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from flexvar._numbers import check_integer
from flexvar.generation.steps import Steps

Recording = TypeVar("Recording")


class Recorder(Protocol):
    """Records a function that computes on a device: what it returned, and a call that computes that anew in place."""

    def record(self, function: Callable[[], Tensor | None]) -> tuple[Tensor | None, Callable[[], None]]: ...


class CudaRecorder:
    """CUDA graphs that share one pool of memory: to be replayed in the order in which they were recorded.

    Args:
        device: that of the computations.
    """

    _recording: ClassVar = Lock()  # torch records one graph at a time in a process
    _streams: ClassVar[dict[torch.device, torch.cuda.Stream]] = {}  # to record on; torch's own is one device's only

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, function: Callable[[], Tensor | None]) -> tuple[Tensor | None, Callable[[], None]]:
        with self._recording, torch.cuda.device(self._device):
            if self._device not in self._streams:
                self._streams[self._device] = torch.cuda.Stream()
            graph = torch.cuda.CUDAGraph()
            stream = self._streams[self._device]
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                output = function()
        return output, graph.replay


class GraphedSteps:
    """:class:`Steps` recorded for a batch size. Same calls, same results.

    Args:
        steps: what to record; runs once before, since a recording may not load kernels.
        batch: images.
        device: of the models.
        recorder: records.
    """

    def __init__(self, steps: Steps, batch: int, device: torch.device, recorder: Recorder) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self._arguments = zeros(3, batch)
        # The codes that each step but the first starts from. Not what was drawn: an edit may replace that.
        self._previous = [zeros(batch, *size) for size in steps.schedule[:-1]]
        # With its state: recordings know addresses only, and other schedules may push positions out of their cache.
        self._steps = steps
        computations = list(self._computations(steps))
        for compute in computations:
            compute()
        self._outputs, self._replays = zip(*(recorder.record(compute) for compute in computations), strict=True)

    def _computations(self, steps: Steps) -> Iterator[Callable[[], Tensor | None]]:
        def begin() -> None:
            steps.begin(*self._arguments.unbind())
            steps.advance(0, None)  # needs no codes: one launch less for which the GPU would wait

        yield begin
        yield partial(steps.sample, 0)
        for index in range(1, len(steps.schedule)):
            yield partial(steps.advance, index, self._previous[index - 1])
            yield partial(steps.sample, index)

    def begin(self, labels: Tensor, seeds: Tensor, image_ids: Tensor) -> None:
        """As of :class:`Steps`."""
        self._arguments.copy_(torch.stack((labels, seeds, image_ids)))
        self._replays[0]()

    def advance(self, index: int, previous: Tensor | None) -> None:
        """As of :class:`Steps`."""
        if previous is not None:  # else `begin` has done it
            self._previous[index - 1].copy_(previous)
            self._replays[2 * index]()

    def sample(self, index: int) -> Tensor:
        """As of :class:`Steps`."""
        self._replays[1 + 2 * index]()
        drawn = self._outputs[1 + 2 * index]
        if drawn is None:
            raise TypeError("GraphedSteps: sample must have been recorded with its codes, got None")
        return drawn.clone()  # the next generation writes into the original


class GraphedDecoder:
    """A function of one tensor, recorded for its shape: codes to images. Same call, same results.

    Args:
        decode: what to record; runs once before, since a recording may not load kernels.
        codes: for which shape, dtype and device.
        recorder: records.
    """

    def __init__(self, decode: Callable[[Tensor], Tensor], codes: Tensor, recorder: Recorder) -> None:
        self._codes = codes.clone()
        decode(self._codes)
        self._images, self._replay = recorder.record(lambda: decode(self._codes))

    def __call__(self, codes: Tensor) -> Tensor:
        self._codes.copy_(codes)
        self._replay()
        if self._images is None:
            raise TypeError("GraphedDecoder: decode must have been recorded with its images, got None")
        return self._images.clone()  # the next call writes into the original


@dataclass
class _Kind(Generic[Recording]):
    recording: Recording | None = None
    in_use: bool = False


class _Kinds(OrderedDict[Hashable, _Kind[Recording]]):
    """Kinds of one sort, the last used last, all of which read the same weights.

    A GPU waits for the look at hundreds of weights before every generation, so its loops are C's.
    """

    def __init__(self) -> None:
        super().__init__()
        self._weights: list[Tensor] = []
        self._counted: list[Tensor] = []  # all but tensors made in inference mode, which count no versions
        self._places: list[int] = []
        self._versions: list[int] = []

    def drop_those_of_other_weights(self, modules: Iterable[nn.Module]) -> None:
        """Empties itself when a weight has changed since the first kind came."""
        if self and self._places == _places(self._weights) and self._versions == _versions(self._counted):
            return
        self.clear()
        self._weights = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        self._counted = [weight for weight in self._weights if not weight.is_inference()]
        self._places, self._versions = _places(self._weights), _versions(self._counted)


def _places(weights: list[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, weights))


def _versions(weights: list[Tensor]) -> list[int]:
    return list(map(attrgetter("_version"), weights))


class GraphCache:
    """Recordings of the kinds of generation used last, and of the shapes of codes that were decoded last.

    The first generation of a kind is computed step by step; the second is recorded, and with it all others are
    replayed. A recording serves one generation at a time: one that starts meanwhile, in whatever thread, is computed
    step by step, with the same result. A recording holds addresses of the weights and what was derived from their
    values, so all are dropped when a weight changes its place or value. That a module was exchanged for another goes
    unnoticed: :meth:`clear`. Decoding goes likewise.

    Args:
        capacity: kinds to remember, and shapes; 0 records nothing. A kind holds a KV cache and the activations of its
            largest step, a shape those of its images.
        make_recorder, device_type: makes what records on a device of this type.

    Raises:
        TypeError, ValueError: ``capacity`` is not an integer from 0 up.
    """

    def __init__(
        self, capacity: int, make_recorder: Callable[[torch.device], Recorder] = CudaRecorder, device_type: str = "cuda"
    ) -> None:
        self.capacity = check_integer("capacity", capacity, 0, op="GraphCache")
        self._make_recorder = make_recorder
        self._device_type = device_type
        self._lock = RLock()  # of all below, and of what is in use
        self._kinds: _Kinds[GraphedSteps] = _Kinds()
        self._decoders: _Kinds[GraphedDecoder] = _Kinds()

    def __len__(self) -> int:
        """How many generations are recorded."""
        return sum(kind.recording is not None for kind in self._kinds.values())

    def clear(self) -> None:
        """Forgets everything; a recording is freed once no generation uses it."""
        with self._lock:
            self._kinds.clear()
            self._decoders.clear()

    def __reduce__(self) -> tuple[type[GraphCache], tuple[object, ...]]:
        """Copies start without recordings."""
        return GraphCache, (self.capacity, self._make_recorder, self._device_type)

    @contextmanager
    def using(self, steps: Steps, batch: int, device: torch.device) -> Iterator[Steps | GraphedSteps]:
        """What computes a generation of ``batch`` images: a recording of ``steps``, or ``steps`` itself."""
        settings = steps.settings
        key = (
            batch, device, steps.schedule, tuple(steps.weights), settings.top_k, settings.top_p,
            settings.published_greedy_quirk, settings.autocast_dtype,
        )  # fmt: skip
        with self._taking(self._kinds, key, device, steps.modules) as kind:
            if kind is not None and kind.recording is None:
                kind.recording = GraphedSteps(steps, batch, device, self._make_recorder(device))
            yield steps if kind is None or kind.recording is None else kind.recording

    def decode(
        self, decode: Callable[[Tensor], Tensor], codes: Tensor, key: Hashable, modules: Sequence[nn.Module]
    ) -> Tensor:
        """``decode(codes)``, or what a recording makes of them.

        Args:
            decode: codes to images [B, 3, H, W]; with equal keys the same function.
            codes: of any shape.
            key: what the function depends on.
            modules: whose weights it reads.
        """
        key = (key, tuple(codes.shape), codes.dtype, codes.device)
        with self._taking(self._decoders, key, codes.device, modules) as kind:
            if kind is None:
                return decode(codes)
            if kind.recording is None:
                kind.recording = GraphedDecoder(decode, codes, self._make_recorder(codes.device))
            return kind.recording(codes)

    @contextmanager
    def _taking(
        self,
        kinds: _Kinds[Recording],
        key: Hashable,
        device: torch.device,
        modules: Sequence[nn.Module],
    ) -> Iterator[_Kind[Recording] | None]:
        """The kind, if it was seen before and is not in use; within the context it is."""
        with self._lock:
            kind = self._remember(kinds, key, device, modules)
            if kind is not None and kind.in_use:
                kind = None
            if kind is not None:
                kind.in_use = True  # while it is recorded, too
        try:
            yield kind
        finally:
            if kind is not None:
                kind.in_use = False

    def _remember(
        self,
        kinds: _Kinds[Recording],
        key: Hashable,
        device: torch.device,
        modules: Sequence[nn.Module],
    ) -> _Kind[Recording] | None:
        """The kind, if it was seen before."""
        if self.capacity == 0 or device.type != self._device_type:
            return None
        kinds.drop_those_of_other_weights(modules)
        kind = kinds.get(key)
        if kind is None:
            kinds[key] = _Kind()
        kinds.move_to_end(key)
        while len(kinds) > self.capacity:
            kinds.popitem(last=False)
        return kind
