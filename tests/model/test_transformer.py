"""The transformer beyond its golden values: cached generation, training, state, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from flexvar import FlexVARTransformer, KVCache, ScaleSchedule, TransformerConfig, next_scale_inputs
from flexvar._backend import ops
from flexvar.transformer.layers import Block, Linear, Norm
from torch import Tensor

from tests.golden.recipe import fill

SMALL = {"width": 64, "heads": 2, "num_classes": 10, "codebook_size": 48, "codebook_dim": 8, "position_grid": 8}
SCHEDULES = {
    "squares": [1, 2, 3, 5],
    "rectangles": [(1, 1), (1, 2), (2, 5), (4, 10)],
    "one step": [(3, 4)],
    "first step of many tokens": [(2, 3), (4, 4)],
    "not growing": [4, (2, 2), 2, (5, 1), 3],
    "twenty steps": [1 + step // 3 for step in range(20)],
}


def make(backend: str, depth: int = 3, **fields: object) -> FlexVARTransformer:
    return fill(FlexVARTransformer(TransformerConfig(**{**SMALL, **fields}, depth=depth), backend=backend))


@pytest.fixture(scope="module")
def small(backend: str) -> FlexVARTransformer:
    return make(backend)


def random_inputs(schedule: ScaleSchedule, batch: int, seed: int = 0) -> Tensor:
    length = schedule.num_tokens - schedule.lengths[0]
    return torch.randn(batch, length, 8, generator=torch.Generator().manual_seed(seed))


def step_inputs(schedule: ScaleSchedule, inputs: Tensor) -> list[Tensor | None]:
    return [None, *inputs.split(schedule.lengths[1:], dim=1)] if len(schedule) > 1 else [None]


def generate_hidden(model: FlexVARTransformer, labels: list[int], schedule: ScaleSchedule, inputs: Tensor) -> Tensor:
    state = model.begin(labels, schedule)
    return torch.cat([model.step(state, part) for part in step_inputs(schedule, inputs)], dim=1)


@pytest.mark.parametrize("fields", [{}, {"qk_l2_norm": False}, {"shared_adaln": True}, {"heads": 1, "mlp_ratio": 2}])
@pytest.mark.parametrize("sizes", SCHEDULES.values(), ids=SCHEDULES)
@torch.inference_mode()
def test_cached_steps_equal_teacher_forcing(sizes: list, fields: dict[str, object], backend: str) -> None:
    model, schedule = make(backend, **fields), ScaleSchedule(sizes)
    inputs, labels = random_inputs(schedule, 3), [0, 7, model.config.null_class]
    expected = model(torch.tensor(labels), inputs, schedule)
    assert expected.shape == (3, schedule.num_tokens, 48)
    actual = model.head_logits(generate_hidden(model, labels, schedule, inputs))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_guided_twins_share_inputs(small: FlexVARTransformer) -> None:
    schedule = ScaleSchedule([1, 2, 4])
    inputs = random_inputs(schedule, 2)
    labels = [3, 5, 10, 10]
    shared = generate_hidden(small, labels, schedule, inputs)
    torch.testing.assert_close(shared, generate_hidden(small, labels, schedule, inputs.repeat(2, 1, 1)))
    # Guidance before the head is guidance after it.
    conditional, unconditional = shared.chunk(2)
    mixed = torch.lerp(unconditional, conditional, 3.5)
    expected = torch.lerp(small.head_logits(unconditional), small.head_logits(conditional), 3.5)
    torch.testing.assert_close(small.head_logits(mixed), expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_one_image_is_the_same_in_any_batch(small: FlexVARTransformer, backend: str) -> None:
    schedule = ScaleSchedule([1, 2, (3, 5)])
    inputs, labels = random_inputs(schedule, 4), [1, 2, 3, 4]
    together = generate_hidden(small, labels, schedule, inputs)
    for row, label in enumerate(labels):
        alone = generate_hidden(small, [label], schedule, inputs[row : row + 1])
        if backend == "native":
            assert torch.equal(alone[0], together[row])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16 autocast"])
@pytest.mark.parametrize("fields", [{}, {"qk_l2_norm": False}, {"shared_adaln": True}], ids=str)
@torch.inference_mode()
def test_native_rows_are_bit_equal_in_any_batch_and_on_any_threads(fields: dict, autocast: torch.dtype | None) -> None:
    model = make("native", depth=2, **{"width": 384, "heads": 6, **fields})
    schedule = ScaleSchedule([1, 3, (7, 9), 13])
    batch = 7
    inputs = random_inputs(schedule, batch)

    def logits(rows: slice, threads: int) -> Tensor:
        torch.set_num_threads(threads)
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            return model.head_logits(generate_hidden(model, list(range(batch))[rows], schedule, inputs[rows]))

    expected = logits(slice(None), 1)
    try:
        for rows, threads in ((slice(None), 2), (slice(0, 1), 1), (slice(6, 7), 2), (slice(2, 5), 3), (slice(1, 7), 1)):
            assert torch.equal(logits(rows, threads), expected[rows]), f"{rows} on {threads} threads"
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("step", [0, 1])
def test_a_failing_step_leaves_no_trace(step: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, schedule = make(backend), ScaleSchedule([1, 2, 3])
    inputs = random_inputs(schedule, 2)
    expected = generate_hidden(model, [1, 2], schedule, inputs)

    state = model.begin([1, 2], schedule)
    done = []
    for index, part in enumerate(step_inputs(schedule, inputs)):
        if index == step:
            with monkeypatch.context() as patch:
                patch.setattr(model.blocks[1].ffn, "forward", lambda *rest: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    model.step(state, part)
            assert state.next_step == step
            assert state.cache.length == schedule.offsets[step]
            torch.testing.assert_close(
                generate_hidden(model, [1, 2], schedule, inputs), expected
            )  # the model keeps nothing
        done.append(model.step(state, part))
    torch.testing.assert_close(torch.cat(done, dim=1), expected)


@torch.inference_mode()
def test_the_cache_is_allocated_once(small: FlexVARTransformer) -> None:
    schedule = ScaleSchedule([1, 2, 3])
    state = small.begin([0, 1], schedule)
    assert state.cache.k.shape == state.cache.v.shape == (3, 2, 14, 2, 32)
    assert state.cache.nbytes == 2 * 3 * 2 * 14 * 64 * 4
    addresses = state.cache.k.data_ptr(), state.cache.v.data_ptr()
    for index, inputs in enumerate(step_inputs(schedule, random_inputs(schedule, 2))):
        small.step(state, inputs)
        assert state.cache.length == schedule.offsets[index + 1]
    assert (state.cache.k.data_ptr(), state.cache.v.data_ptr()) == addresses


def test_kv_cache() -> None:
    cache = KVCache(2, 1, 5, 1, 4, dtype=torch.float32, device="cpu")
    keys, values, position = cache.room(1, 3)
    assert position == 0
    assert keys.data_ptr() == cache.k[1].data_ptr()
    assert values.data_ptr() == cache.v[1].data_ptr()
    cache.advance(3)
    assert cache.room(1, 2)[2] == 3
    with pytest.raises(ValueError, match="KVCache: the cache holds at most 5 tokens, got 6"):
        cache.room(1, 3)
    with pytest.raises(ValueError, match="KVCache: tokens must be from 0 to 2, got 3"):
        cache.advance(3)
    cache.reset()
    assert cache.length == 0


@torch.inference_mode()
def test_a_smaller_dtype_in_the_cache(small: FlexVARTransformer) -> None:
    schedule = ScaleSchedule([1, 3])
    state = small.begin([4], schedule, cache_dtype=torch.bfloat16)
    assert state.cache.k.dtype == torch.bfloat16
    inputs = random_inputs(schedule, 1)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = torch.cat([small.step(state, part) for part in step_inputs(schedule, inputs)], dim=1)
    torch.testing.assert_close(hidden.float(), generate_hidden(small, [4], schedule, inputs), rtol=0.1, atol=0.1)


class TestPositions:
    """Resampled position embeddings are remembered as long as they hold, and no longer."""

    schedule = ScaleSchedule([1, 2, 3])

    def positions(self, model: FlexVARTransformer) -> Tensor:
        return model.begin([0], self.schedule).positions

    def fresh(self, model: FlexVARTransformer) -> Tensor:
        grid = model.pos_1LC.detach()
        scales = [ops("reference").resample2d(grid, size, mode="area").flatten(2) for size in self.schedule]
        return torch.cat(scales, dim=2).transpose(1, 2)

    def test_computed_once_per_schedule(self, backend: str) -> None:
        model = make(backend)
        first = self.positions(model)
        torch.testing.assert_close(first, self.fresh(model))
        assert self.positions(model) is first
        model.begin([0], ScaleSchedule([4]))
        assert self.positions(model) is first
        for side in range(1, 30):  # only so many are kept
            model.begin([0], ScaleSchedule([side]))
        assert self.positions(model) is not first

    @pytest.mark.parametrize("change", ["optimizer", "load_state_dict", "assign", "in place", "to", "inference mode"])
    def test_follow_the_grid(self, change: str, backend: str) -> None:
        model = make(backend)
        before = self.positions(model)
        weights = {name: value + 1 for name, value in model.state_dict().items()}
        if change == "optimizer":
            model.pos_1LC.grad = torch.ones_like(model.pos_1LC)
            torch.optim.AdamW([model.pos_1LC], lr=0.1).step()
        elif change == "load_state_dict":
            model.load_state_dict(weights)
        elif change == "assign":
            model.load_state_dict(weights, assign=True)
        elif change == "in place":
            with torch.no_grad():
                model.pos_1LC.lerp_(torch.zeros_like(model.pos_1LC), 0.5)
        elif change == "to":
            model.to(torch.bfloat16).to(torch.float32)
        else:
            with torch.inference_mode():
                model.load_state_dict(weights, assign=True)
        after = self.positions(model)
        torch.testing.assert_close(after, self.fresh(model))
        assert not torch.equal(after, before)

    def test_gradients_reach_the_grid_every_time(self, backend: str) -> None:
        model = make(backend)
        self.positions(model)
        inputs = random_inputs(self.schedule, 1)
        for _ in range(2):
            model.zero_grad()
            model(torch.tensor([1]), inputs, self.schedule).square().sum().backward()
            assert model.pos_1LC.grad.any()

    def test_copies_have_their_own(self, backend: str) -> None:
        model = make(backend)
        self.positions(model)
        clone = copy.deepcopy(model)
        with torch.no_grad():
            clone.pos_1LC.zero_()
        assert not self.positions(clone).any()
        torch.testing.assert_close(self.positions(model), self.fresh(model))


class TestTraining:
    schedule = ScaleSchedule([1, 2, (3, 4)])

    @pytest.mark.parametrize("fields", [{}, {"qk_l2_norm": False}, {"shared_adaln": True}])
    def test_every_parameter_learns(self, fields: dict[str, object], backend: str) -> None:
        model = make(backend, **fields).train()
        model(torch.tensor([1, 2]), random_inputs(self.schedule, 2), self.schedule).square().mean().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []

    def test_gradients_are_those_of_finite_differences(self) -> None:
        model = make("reference", depth=1).double()
        inputs = random_inputs(self.schedule, 1).double().requires_grad_()
        labels = torch.tensor([3])
        assert torch.autograd.gradcheck(lambda x: model(labels, x, self.schedule)[:, :, :3], inputs, fast_mode=True)

    def test_class_dropout(self, backend: str) -> None:
        model = make(backend, depth=1, class_dropout=0.25).train()
        schedule = ScaleSchedule([1])
        labels = torch.full((4000,), 3)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            logits = model(labels, torch.zeros(4000, 0, 8), schedule, generator=generator)[:, 0]
            model.eval()
            kept, dropped = model(torch.tensor([3, 10]), torch.zeros(2, 0, 8), schedule)[:, 0]
        is_dropped = (logits - dropped).abs().amax(1) < 1e-4
        assert torch.equal(~is_dropped, (logits - kept).abs().amax(1) < 1e-4)
        assert abs(is_dropped.float().mean() - 0.25) < 0.03

    def test_drop_path_grows_with_depth_and_keeps_the_mean(self, backend: str) -> None:
        model = make(backend, drop_path=0.5).train()
        assert [block.drop_path for block in model.blocks] == [0, 0.25, 0.5]
        generator = torch.Generator().manual_seed(0)
        condition = model.class_emb(torch.full((20000,), 3))
        modulations = Block.modulations(model.blocks, condition, generator)
        whole_paths = Block.modulations(model.eval().blocks, condition[:1])
        for modulation, expected, rate in zip(modulations, whole_paths, (0, 0.25, 0.5), strict=True):
            for gate, whole in ((modulation.gamma1, expected.gamma1), (modulation.gamma2, expected.gamma2)):
                factor = gate[:, 0, 0] / whole[0, 0, 0]
                assert abs((factor == 0).float().mean() - rate) < 0.02
                assert abs(factor.mean() - 1) < 0.03
            torch.testing.assert_close(modulation.scale1, expected.scale1.expand(20000, -1, -1))

    def test_a_generator_decides_every_draw(self, backend: str) -> None:
        model = make(backend, drop_path=0.5, class_dropout=0.5).train()
        inputs, labels = random_inputs(self.schedule, 8), torch.arange(8)
        before = torch.get_rng_state()
        with torch.no_grad():
            runs = [
                model(labels, inputs, self.schedule, generator=torch.Generator().manual_seed(seed))
                for seed in (1, 1, 2)
            ]
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(runs[0], runs[1])
        assert not torch.equal(runs[0], runs[2])

    def test_evaluation_mode_drops_nothing(self, backend: str) -> None:
        model = make(backend, drop_path=0.5, class_dropout=0.5).eval()
        inputs, labels = random_inputs(self.schedule, 4), torch.arange(4)
        with torch.no_grad():
            first, second = (model(labels, inputs, self.schedule) for _ in range(2))
        assert torch.equal(first, second)


class TestNextScaleInputs:
    schedule = ScaleSchedule([1, (2, 3), (4, 5)])

    def pyramid(self, batch: int = 2) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(48, (batch, *size), generator=generator) for size in self.schedule]

    @pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
    def test_layout(self, mode: str, backend: str) -> None:
        pyramid, codebook = self.pyramid(), torch.randn(48, 8, generator=torch.Generator().manual_seed(1))
        inputs = next_scale_inputs(pyramid, codebook, self.schedule, mode=mode, backend=backend)
        assert inputs.shape == (2, 26, 8)
        codes = torch.nn.functional.normalize(codebook, dim=-1)[pyramid[1]].permute(0, 3, 1, 2)
        expected = torch.nn.functional.interpolate(codes, size=(4, 5), mode=mode)
        torch.testing.assert_close(inputs[:, 6:], expected.flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)
        without_last = next_scale_inputs(pyramid[:-1], codebook, self.schedule, mode=mode, backend=backend)
        assert torch.equal(without_last, inputs)

    def test_one_step(self, backend: str) -> None:
        schedule = ScaleSchedule([3])
        inputs = next_scale_inputs(
            [torch.zeros(2, 3, 3, dtype=torch.int64)], torch.ones(4, 8), schedule, backend=backend
        )
        assert inputs.shape == (2, 0, 8)

    def test_bad_input(self, backend: str) -> None:
        pyramid, codebook = self.pyramid(), torch.ones(48, 8)
        refused = [
            (pyramid[:1], self.schedule, ValueError, "one grid per step, 3 .* got 1"),
            (
                [*pyramid[:2], pyramid[2][:, :3]],
                self.schedule,
                ValueError,
                r"pyramid\[2\] .* \(4, 5\) as scheduled, got",
            ),
            ([pyramid[0][:1], *pyramid[1:]], self.schedule, ValueError, r"pyramid\[1\] must have shape"),
            (
                [grid.int() for grid in pyramid],
                self.schedule,
                TypeError,
                r"pyramid\[0\] must be an int64 tensor, got a",
            ),
            (pyramid, [1, 2], TypeError, "schedule must be a ScaleSchedule, got list"),
        ]
        for grids, schedule, error, message in refused:
            with pytest.raises(error, match=f"next_scale_inputs: .*{message}"):
                next_scale_inputs(grids, codebook, schedule, backend=backend)


@pytest.mark.parametrize("grad", [True, False])
def test_compiles_into_one_graph(grad: bool, small: FlexVARTransformer) -> None:
    torch.compiler.reset()
    schedule = ScaleSchedule([1, 2, (3, 4)])
    inputs, labels = random_inputs(schedule, 2), torch.tensor([1, 2])
    with torch.set_grad_enabled(grad):
        compiled = torch.compile(small, fullgraph=True, backend="aot_eager")(labels, inputs, schedule)
        torch.testing.assert_close(compiled, small(labels, inputs, schedule), rtol=1e-5, atol=1e-5)


def test_bad_input(small: FlexVARTransformer) -> None:
    schedule = ScaleSchedule([1, 2])
    labels, inputs = torch.tensor([1, 2]), random_inputs(schedule, 2)

    def second_step(given: object) -> Tensor:
        state = small.begin([1, 2], schedule)
        small.step(state)
        return small.step(state, given)

    def third_step() -> Tensor:
        state = small.begin([1], ScaleSchedule([1]))
        small.step(state)
        return small.step(state)

    refused = [
        (lambda: small(torch.tensor([1, 11]), inputs, schedule), ValueError, "from 0 to 10 .*, got 1 to 11"),
        (lambda: small(torch.tensor([-1, 1]), inputs, schedule), ValueError, "from 0 to 10 .*, got -1 to 1"),
        (lambda: small(labels.float(), inputs, schedule), TypeError, "int64 tensor, got a tensor of torch.float32"),
        (lambda: small([1, 2], inputs, schedule), TypeError, "class_labels must be an int64 tensor, got list"),
        (
            lambda: small(labels[None], inputs, schedule),
            ValueError,
            r"class_labels must have shape \[B\], got \(1, 2\)",
        ),
        (lambda: small(labels, inputs[:, :3], schedule), ValueError, r"\[B, 4, 8\] with B = 2, got \(2, 3, 8\)"),
        (lambda: small(labels, inputs[:1], schedule), ValueError, r"\[B, 4, 8\] with B = 2, got \(1, 4, 8\)"),
        (
            lambda: small(labels, inputs.double(), schedule),
            TypeError,
            "weights' dtype, torch.float32, got torch.float64",
        ),
        (lambda: small(labels, inputs.to("meta"), schedule), ValueError, "on the model's device, cpu, got meta"),
        (lambda: small(labels, None, schedule), TypeError, "inputs must be a floating point tensor, got NoneType"),
        (lambda: small(labels, inputs, [1, 2]), TypeError, "schedule must be a ScaleSchedule, got list"),
        (lambda: small.begin([1, 11], schedule), ValueError, "begin: class_labels must be from 0 to 10"),
        (lambda: small.begin([0.5], schedule), TypeError, "begin: class_labels must be an int64 tensor"),
        (lambda: small.begin([1], "1 2"), TypeError, "begin: schedule must be a ScaleSchedule, got str"),
        (lambda: small.step(small.begin([1], schedule), inputs), ValueError, "inputs must be None at the first step"),
        (lambda: second_step(None), TypeError, "step: inputs must be a floating point tensor, got NoneType"),
        (lambda: second_step(torch.zeros(3, 4, 8)), ValueError, r"with B = 1 or 2, got \(3, 4, 8\)"),
        (third_step, ValueError, "step: state must have a step left, got all 1 done"),
        (lambda: FlexVARTransformer(small.config, backend=None), ValueError, "backend must be .* got None"),
        (lambda: FlexVARTransformer({"depth": 2}), TypeError, "config must be a TransformerConfig, got dict"),
    ]
    for call, error, message in refused:
        with pytest.raises(error, match=message):
            call()
        assert small(labels, inputs, schedule).shape == (2, 5, 48)  # the next call works


def test_heads_of_any_width_need_the_reference() -> None:
    config = TransformerConfig(**{**SMALL, "width": 66, "heads": 2}, depth=1)
    message = "width / heads must be one of 32, 64, 96, 128 with the native ops, got 66 / 2 = 33"
    with pytest.raises(ValueError, match=message):
        FlexVARTransformer(config)
    model = FlexVARTransformer(config, backend="reference")
    assert model(torch.tensor([1]), torch.zeros(1, 4, 8), ScaleSchedule([1, 2])).shape == (1, 5, 48)


def test_initial_weights() -> None:
    model = FlexVARTransformer(TransformerConfig(**SMALL, depth=2), backend="reference")
    y, x = 3, 5
    for pair in (0, 7):
        frequency = 10000 ** (-2 * pair / 64)
        assert model.pos_1LC[0, 2 * pair, y, x].item() == pytest.approx(
            torch.sin(torch.tensor(y * frequency)).item(), abs=1e-6
        )
        assert model.pos_1LC[0, 2 * pair + 1, y, x].item() == pytest.approx(
            torch.cos(torch.tensor(x * frequency)).item(), abs=1e-6
        )
    logits = model(torch.tensor([1]), torch.zeros(1, 4, 8), ScaleSchedule([1, 2]))
    assert logits.abs().max() < 0.1  # near uniform
    assert torch.allclose(model.blocks[0].attn.scale_mul_1H11.exp(), torch.tensor(4.0))


def test_constants_of_attention_are_made_once():
    model = FlexVARTransformer(TransformerConfig(1, 64, 2, 5, 64, 8), backend="reference")
    attention = model.blocks[0].attn
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        bias, q_scale = attention.constants()
        assert bias.dtype == torch.bfloat16
        assert q_scale.dtype == torch.float32
        assert all(a is b for a, b in zip(attention.constants(), (bias, q_scale), strict=True))
    with torch.no_grad():
        attention.v_bias.fill_(3)
        attention.scale_mul_1H11.fill_(0)
        expected = torch.tensor([0.0, 0.0, 3.0]).repeat_interleave(64)
        assert torch.equal(attention.constants()[0], expected)
        assert torch.equal(attention.constants()[1], torch.ones(2))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention.constants()[0], expected.bfloat16())
    bias, q_scale = attention.constants()
    assert bias.requires_grad
    assert q_scale.requires_grad


def test_weights_are_cast_once_under_autocast():
    """Not at every step, and anew when they change."""
    model = FlexVARTransformer(TransformerConfig(1, 64, 2, 5, 64, 8), backend="reference")
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        first = model.head.cast_weight()
        assert first.dtype == torch.bfloat16
        assert model.head.cast_weight() is first
    with torch.no_grad():
        model.head.weight.mul_(2)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model.head.cast_weight(), 2 * first, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.head.cast_weight() is model.head.weight  # gradients
    with torch.inference_mode():
        assert model.head.cast_weight() is model.head.weight


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@torch.no_grad()
def test_gate_residual_and_norm_behind_a_linear_layer(autocast: torch.dtype | None, backend: str) -> None:
    """What the CPU computes within the product and behind it is what CUDA computes in one pass behind it."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    linear = Linear(24, 32, backend)
    x, residual, vectors = randn(2, 5, 24), randn(2, 5, 32), [randn(2, 1, 32) for _ in range(3)]
    gate, scale, shift = vectors
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        found = linear.add_and_norm(x, gate, residual, Norm(scale, shift))
        expected = ops(backend).residual_layer_norm_modulate(residual, linear(x), *vectors)
    tolerance = 1e-5 if autocast is None else 3e-2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_autocast_leaves_float64_as_it_is() -> None:
    model = make("reference", depth=2).double().eval()
    schedule = ScaleSchedule([1, 2])
    inputs = random_inputs(schedule, 1).double()
    with torch.no_grad():
        expected = model(torch.tensor([3]), inputs, schedule)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(torch.tensor([3]), inputs, schedule), expected)
