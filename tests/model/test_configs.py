"""Configs: validation, and the way to JSON and back."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError

import pytest
from flexvar import TokenizerConfig, TransformerConfig
from flexvar.training import TrainingConfig
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize(
    "config",
    [
        TokenizerConfig(),
        TokenizerConfig(codebook_size=16384, codebook_dim=8, channel_multipliers=[1, 2], downsample_mode="bilinear"),
        TransformerConfig(),
        TransformerConfig(depth=20, width=1280, heads=20, shared_adaln=True, drop_path=0.05),
    ],
)
def test_json_round_trip(config: TokenizerConfig | TransformerConfig) -> None:
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(type(config).from_dict(config.to_dict()))
    with pytest.raises(FrozenInstanceError):
        config.codebook_size = 1


@pytest.mark.parametrize(
    ("cls", "fields", "error", "message"),
    [
        (TokenizerConfig, {"codebook_size": 0}, ValueError, "codebook_size must be from 1 to .* got 0"),
        (TokenizerConfig, {"codebook_dim": 2.0}, TypeError, "codebook_dim must be an int, got 2.0"),
        (TokenizerConfig, {"base_channels": 48}, ValueError, "base_channels must be a multiple of 32, got 48"),
        (TokenizerConfig, {"channel_multipliers": ()}, ValueError, r"channel_multipliers must be .* got \(\)"),
        (TokenizerConfig, {"channel_multipliers": (1, 0)}, ValueError, r"from 1 to 64, got \(1, 0\)"),
        (TokenizerConfig, {"channel_multipliers": 4}, TypeError, "must be a tuple of ints, got 4"),
        (TokenizerConfig, {"normalize_codes": 1}, TypeError, "normalize_codes must be a bool, got 1"),
        (TokenizerConfig, {"downsample_mode": "cubic"}, ValueError, "must be one of nearest, .* 'cubic'"),
        (TokenizerConfig, {"upsample_mode": None}, ValueError, "upsample_mode must be one of .* got None"),
        (TransformerConfig, {"depth": 10**9}, ValueError, "depth must be from 1 to 512, got 1000000000"),
        (
            TransformerConfig,
            {"width": 100},
            ValueError,
            "width must be a multiple of heads, got width 100 and heads 16",
        ),
        (TransformerConfig, {"heads": "16"}, TypeError, "heads must be an int, got '16'"),
        (TransformerConfig, {"drop_path": 1.0}, ValueError, "drop_path must be at least 0 and below 1, got 1.0"),
        (TransformerConfig, {"class_dropout": "0"}, TypeError, "class_dropout must be a float, got '0'"),
        (TransformerConfig, {"shared_adaln": 0}, TypeError, "shared_adaln must be a bool"),
    ],
)
def test_refused(cls: type, fields: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"{cls.__name__}: .*{message}"):
        cls.from_dict(fields)


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ValueError, match=r"TransformerConfig: fields must be among .* got codebook_length"):
        TransformerConfig.from_dict({"codebook_length": 1})
    with pytest.raises(TypeError, match="TokenizerConfig: values must be a mapping, got list"):
        TokenizerConfig.from_dict([1, 2])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=5,
)


@pytest.mark.parametrize("cls", [TokenizerConfig, TransformerConfig])
@given(data=st.data())
@settings(max_examples=500, deadline=None)
def test_any_json_is_a_config_or_a_clear_error(cls: type, data: st.DataObject) -> None:
    names = st.sampled_from(sorted(cls().to_dict())) | st.text(max_size=3)
    fields = data.draw(st.dictionaries(names, json_values, max_size=4))
    try:
        config = cls.from_dict(fields)
    except (TypeError, ValueError) as error:
        assert cls.__name__ in str(error)  # noqa: PT017
    else:
        assert cls.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400])
@pytest.mark.parametrize("name", ["learning_rate", "gradient_clip", "weight_decay"])
def test_numbers_of_a_training_are_finite(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"TrainingConfig: {name} must be finite, got"):
        TrainingConfig.from_dict({name: value})
