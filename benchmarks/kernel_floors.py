"""What an H200 has to do at least for each kernel, and a prediction made from that; no GPU is needed."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flexvar import ScaleSchedule

# An H200's rates. The first two were measured on such a card with a copy and a bfloat16 matrix product, the others are
# 132 multiprocessors at 1.755 GHz with 16 special functions and 128 float32 instructions a cycle.
BYTES_A_SECOND = 4.3e12
PRODUCTS_A_SECOND = 790e12  # floating-point operations of matrix products
MULTIPROCESSORS = 132
EXPONENTIALS_A_SECOND = MULTIPROCESSORS * 16 * 1.755e9
INSTRUCTIONS_A_SECOND = MULTIPROCESSORS * 128 * 1.755e9

# What a prediction takes for granted. Hopper's tensor cores reach their full rate through wgmma alone.
SHARE_OF_COPY = 0.85
SHARE_OF_PRODUCTS = 0.62  # with mma.sync
SHARE_NOT_HIDDEN = 0.5  # of other instructions, behind products of other warps
SECONDS_A_LAUNCH = 2.5e-6
SECONDS_AN_OVERLAPPING_LAUNCH = 1e-6  # its blocks are there when the kernel before ends, and wait for what it wrote


@dataclass(frozen=True)
class Work:
    """What one call of an op does at least.

    Attributes:
        bytes: read once and written once.
        products: floating-point operations of matrix products on tensor cores.
        exponentials, instructions: on the other units; instructions of one lane.
        launches: kernels, one behind the other.
        overlapping_launches: kernels more, each of which begins while the one before ends.
    """

    op: str
    case: str
    bytes: float
    products: float = 0
    exponentials: float = 0
    instructions: float = 0
    launches: int = 1
    overlapping_launches: int = 0

    @property
    def bytes_floor(self) -> float:
        return self.bytes / BYTES_A_SECOND

    @property
    def operations_floor(self) -> float:
        """The longest of the units that compute; they work side by side."""
        return max(
            self.products / PRODUCTS_A_SECOND,
            self.exponentials / EXPONENTIALS_A_SECOND,
            self.instructions / INSTRUCTIONS_A_SECOND,
        )

    @property
    def prediction(self) -> float:
        others = self.exponentials / EXPONENTIALS_A_SECOND + self.instructions / INSTRUCTIONS_A_SECOND
        products = self.products / PRODUCTS_A_SECOND / SHARE_OF_PRODUCTS
        # Where there are no products, nothing else hides behind them.
        computing = products + others * (SHARE_NOT_HIDDEN if products else 1)
        launching = self.launches * SECONDS_A_LAUNCH + self.overlapping_launches * SECONDS_AN_OVERLAPPING_LAUNCH
        return max(self.bytes_floor / SHARE_OF_COPY, computing) + launching


def vq_lookup(latents: int, codes: int, dim: int) -> Work:
    """Half-precision scores of every pair; of each, 2.5 instructions to keep the best two."""
    padded = -(-dim // 16) * 16
    few = -(-latents // 64) * -(-codes // 128) <= 8 * MULTIPROCESSORS  # two kernels for three
    return Work(
        "vq_lookup",
        f"{latents:,} × {codes:,} × {dim}",
        bytes=4 * dim * (latents + codes) + 2 * 2 * padded * codes + 8 * latents,
        products=2 * latents * codes * padded,
        instructions=2.5 * latents * codes,
        overlapping_launches=1 if few else 2,
    )


def attention(
    case: str, batch: int, heads: int, dim: int, queries: int, keys: int, pairs: int, *, normalized: bool = False
) -> Work:
    """bfloat16. Of each pair 4 instructions: scale, maximum, subtraction, sum and conversion of two at a time.

    Normalised: the key's length, scale and subtraction in one, sum and conversion; and an eighth more products, which
    measure the keys anew in every tile of 64 queries. What rows were multiplied by is kept for the backward pass.
    """
    heads *= batch
    return Work(
        "scale_attention",
        case,
        bytes=2 * heads * dim * 2 * (queries + keys) + (4 * heads * (queries + keys) if normalized else 0),
        products=(4.5 if normalized else 4) * heads * pairs * dim,
        exponentials=heads * pairs,
        instructions=(3.5 if normalized else 4) * heads * pairs,
    )


def attention_step_in_parts(heads: int, dim: int, queries: int, keys: int, parts: int) -> Work:
    """One image, bfloat16: a second launch adds up what blocks found in parts of the keys, in float32."""
    whole = attention("", 1, heads, dim, queries, keys, queries * keys)
    return replace(
        whole,
        case=f"step: batch 1, {queries} queries, {keys} keys, in {parts} parts",
        bytes=whole.bytes + 2 * 4 * parts * heads * queries * (dim + 2),
        launches=2,
    )


def attention_backward(batch: int, heads: int, dim: int, tokens: int, pairs: int, *, normalized: bool = False) -> Work:
    """Seven products: two kernels, for dQ and for dK and dV, compute the scores anew. Reads Q K V O dO twice.

    Normalised: each of them scales a column of K or Q for every 64 rows, 3 instructions an element, and a fourth kernel
    adds up the gradient of q_scale.
    """
    heads *= batch
    return Work(
        "scale_attention_backward",
        f"batch {batch}, {tokens} tokens, head dim {dim}" + (", normalised" if normalized else ""),
        bytes=2 * heads * dim * tokens * (2 * 5 + 3) + (4 * heads * tokens * (4 + 2) if normalized else 0),
        products=14 * heads * pairs * dim,
        exponentials=2 * heads * pairs,
        instructions=2 * (4 + (3 * dim / 64 if normalized else 0)) * heads * pairs,
        launches=4 if normalized else 3,
    )


def linear_few_rows(rows: int, depth: int, columns: int) -> Work:
    """bfloat16. The weight is fetched while the kernel before runs."""
    return Work(
        "linear_few_rows",
        f"{rows} rows, {depth} → {columns}, bfloat16",
        bytes=2 * (rows * depth + depth * columns + rows * columns),
        products=2 * rows * depth * columns,
        launches=0,
        overlapping_launches=1,
    )


def guided_sample(dtype: str, size: int) -> Work:
    """Top-k 900 and top-p 0.95 of 16,384 rows, about 6,100 instructions of a warp for each, as counted: the pivot, a
    list of the 1,100 logits above it, their weights and counts, the cut and the draw. A second launch takes the rows
    that a warp cannot sample.
    """
    rows, vocabulary = 16384, 8912
    return Work(
        "guided_sample",
        f"{rows:,} × {vocabulary:,}, {dtype}, top-k 900, top-p 0.95",
        bytes=rows * vocabulary * size,
        instructions=rows * 32 * 6100,
        overlapping_launches=1,
    )


def conv3x3_up(batch: int, channels: int, side: int) -> Work:
    """bfloat16, as many channels out as in: four taps of each of the four phases. A launch packs the weight."""
    pixels, weights = batch * side**2, channels**2
    return Work(
        "conv3x3",
        f"up: batch {batch}, {channels} × {side}², bfloat16, channels last",
        bytes=2 * (5 * pixels * channels + (9 + 2 * 16) * weights),
        products=2 * 16 * pixels * weights,
        launches=2,
    )


def works() -> list[Work]:
    schedule = ScaleSchedule.preset(steps=10)
    tokens, pairs = schedule.num_tokens, _pairs(schedule)
    large = ScaleSchedule([*schedule, (23, 23), (32, 32)])
    image = 64 * 32 * 4  # bytes of a float32 row of 32 channels in 64 images
    width_1024 = f"batch 64, {tokens} tokens, width 1024"
    channels = 64 * tokens * 1024  # of all tokens of 64 images; the residual stream in float32, the rest in bfloat16
    maps = 64 * 128 * 256 * 256  # elements of the decoder's last feature maps
    return [
        vq_lookup(680, 8912, 32),
        vq_lookup(680, 16384, 8),
        vq_lookup(43520, 8192, 32),
        replace(vq_lookup(64 * tokens, 8912, 32), op="vq_lookup_multiscale", case="64 images, 10 scales"),
        Work("resample2d", "64 × 32 × 16² → 8², area", bytes=image * (256 + 64)),
        Work("resample2d", "4 × 128 × 64² → 128², nearest", bytes=4 * 4 * 128 * (64**2 + 128**2)),
        Work("resample2d", "4 × 3 × 640 × 480 → 256², antialiased", bytes=4 * 4 * 3 * (640 * 480 + 256**2)),
        Work("embed_resample", "64 × 13² → 16², bicubic", bytes=image * 256 + 64 * 169 * 8 + 8912 * 32 * 4),
        attention(f"batch 64, {tokens} tokens, head dim 64", 64, 16, 64, tokens, tokens, pairs),
        attention(
            f"batch 16, {large.num_tokens} tokens, head dim 64", 16, 16, 64,
            large.num_tokens, large.num_tokens, _pairs(large),
        ),
        attention(
            f"batch 64, {tokens} tokens, head dim 64, normalised", 64, 16, 64, tokens, tokens, pairs, normalized=True
        ),
        attention_backward(64, 16, 64, tokens, pairs),
        attention_backward(64, 16, 64, tokens, pairs, normalized=True),
        attention(f"step: batch 128, 256 queries, {tokens} keys", 128, 16, 64, 256, tokens, 256 * tokens),
        attention_step_in_parts(16, 64, 256, tokens, 4),
        linear_few_rows(8, 1024, 4096),
        linear_few_rows(32, 4096, 1024),
        Work("append_qkv", "batch 128, 256 tokens, 16 heads of 64, bfloat16", bytes=2 * 3 * 128 * 256 * 1024 * 2),
        Work("layer_norm_modulate", width_1024, bytes=channels * (4 + 2)),
        Work("layer_norm_modulate_backward", width_1024, bytes=channels * (4 + 2 + 4), launches=2),
        Work("residual_layer_norm_modulate", width_1024, bytes=channels * (4 + 2 + 4 + 2)),
        Work("residual_layer_norm_modulate_backward", width_1024, bytes=channels * (3 * 4 + 3 * 2), launches=2),
        # Maps larger than the cache are read twice; SiLU takes an exponential and a reciprocal.
        Work("group_norm_silu", "batch 64, 128 × 256², bfloat16, channels last", bytes=2 * 3 * maps,
             exponentials=2 * maps, overlapping_launches=1),
        Work("group_norm_silu_backward", "batch 64, 128 × 256², bfloat16, channels last", bytes=2 * 5 * maps,
             exponentials=4 * maps, launches=4),
        *(conv3x3_up(batch, *level) for batch in (1, 64) for level in ((512, 16), (256, 64), (128, 128))),
        guided_sample("float32", 4),
        guided_sample("bfloat16", 2),
    ]  # fmt: skip


def _pairs(schedule: ScaleSchedule) -> int:
    """Pairs of a query and a key that it sees."""
    seen, pairs = 0, 0
    for length in schedule.lengths:
        seen += length
        pairs += length * seen
    return pairs


def floor_table() -> list[str]:
    """Markdown, with what the numbers mean."""
    lines = [
        "What a call has to do at least, on an H200: bytes read and written once at the card's copy rate "
        f"({BYTES_A_SECOND / 1e12:g} TB/s), and its matrix products ({PRODUCTS_A_SECOND / 1e12:g} TFLOP/s), "
        f"exponentials ({EXPONENTIALS_A_SECOND / 1e12:.1f} T/s) or other instructions "
        f"({INSTRUCTIONS_A_SECOND / 1e12:.1f} T/s), whichever takes longest. The prediction is what these kernels "
        f"should take: {SHARE_OF_COPY:.0%} of the copy rate, or {SHARE_OF_PRODUCTS:.0%} of the product rate "
        f"(`mma.sync`) with half of the other instructions hidden behind it, plus {SECONDS_A_LAUNCH * 1e6:g} µs a "
        f"launch ({SECONDS_AN_OVERLAPPING_LAUNCH * 1e6:g} µs where it overlaps the kernel before). "
        "benchmarks/NOTES.md says what an H100 made of the first of them.",
        "",
        "| op | case | bytes | GFLOP | bytes floor | operations floor | predicted |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for work in works():
        cells = (
            work.op, work.case, f"{work.bytes / 1e6:,.2f} MB", f"{work.products / 1e9:,.2f}",
            _microseconds(work.bytes_floor), _microseconds(work.operations_floor), _microseconds(work.prediction),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f} µs"
