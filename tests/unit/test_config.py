"""The configuration: one model, its file, its errors."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from orderflow.config import ENVIRONMENT, Config, effective_fingerprint, load
from orderflow.config_file import text
from orderflow.errors import ConfigError
from orderflow.lake.service import sinks_fingerprint
from orderflow.paths import CONFIG, ROOT


def test_the_defaults_file_is_the_model() -> None:
    assert (CONFIG / "defaults.yaml").read_text("utf-8") == text()
    assert load({}) == Config()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"Z_MODE": "foo"}, ["Z_MODE=foo", "foo", "delta"]),
        ({"PARQUET_ROTATE_SEC": "0"}, ["PARQUET_ROTATE_SEC=0", ">= 1"]),
        ({"PARQUET_ROTATE_SEC": "soon"}, ["PARQUET_ROTATE_SEC=soon", "int"]),
        ({"WINSOR_LIMIT": "-1"}, ["WINSOR_LIMIT=-1"]),
        ({"SYMBOLS": "btc usdt"}, ["SYMBOLS=btc usdt", "BTC USDT"]),
        ({"SPEED": "fast"}, ["SPEED=fast", "max"]),
        ({"LOG_LEVEL": "LOUD"}, ["LOG_LEVEL=LOUD", "INFO"]),
        ({"SOURCE": "nasdaq"}, ["SOURCE=nasdaq", "live", "sim", "capture"]),
        ({"METRICS_PORT": "70000"}, ["METRICS_PORT=70000", "65535"]),
        ({"SIGNAL_SINK": "jsonl,csv"}, ["SIGNAL_SINK=jsonl,csv", "jsonl, sqlite", "none"]),
        ({"SIGNAL_SINK": "sqlite,none"}, ["SIGNAL_SINK=sqlite,none", "none alone"]),
        ({"SIGNAL_SINK": "sqlite,sqlite"}, ["SIGNAL_SINK=sqlite,sqlite", "each once"]),
        ({"SIGNAL_SINK": "jsonl,"}, ["SIGNAL_SINK=jsonl,", "jsonl, sqlite"]),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(environment: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(environment)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_the_sinks_of_signals_are_chosen_in_any_spelling() -> None:
    def chosen(text: str) -> tuple[str, ...]:
        return load({"SIGNAL_SINK": text}).sinks.chosen

    assert [chosen(text) for text in ("", "jsonl", "sqlite", "none")] == [("jsonl",), ("jsonl",), ("sqlite",), ()]
    assert chosen("sqlite, jsonl") == chosen("jsonl,sqlite") == ("jsonl", "sqlite")
    ways = [
        sinks_fingerprint(load({"SIGNAL_SINK": text})) for text in ("sqlite, jsonl", "jsonl,sqlite", "jsonl", "none")
    ]
    assert ways[0] == ways[1]
    assert len(set(ways)) == 3


def test_depth_rows_must_carry_the_levels_that_ofi_weighs(tmp_path: Path) -> None:
    (tmp_path / "defaults.yaml").write_text("normaliser: {top_k: 3}\n")
    with pytest.raises(ConfigError, match=r"normaliser\.top_k is 3, and ofi\.weights has 5 levels"):
        load({}, tmp_path)


def test_every_environment_name_reaches_a_setting() -> None:
    for name, (section, key) in ENVIRONMENT.items():
        assert key in getattr(Config(), section).__struct_fields__, name


def test_every_environment_name_is_documented() -> None:
    documented = (ROOT / ".env.example").read_text("utf-8")
    for name in ENVIRONMENT:
        assert f"{name}=" in documented, name


def test_an_unknown_key_of_a_file_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "defaults.yaml").write_text("cvd:\n  windsor_limit: 8\n")
    with pytest.raises(ConfigError, match=r"windsor_limit.*winsor_limit"):
        load({}, tmp_path)


def test_overrides_are_taken_in_order_and_the_environment_wins(tmp_path: Path) -> None:
    (tmp_path / "defaults.yaml").write_text("cvd: {winsor_limit: 7}\nlake: {rotate_sec: 30}\n")
    (tmp_path / "overrides.d").mkdir()
    (tmp_path / "overrides.d" / "10-a.yaml").write_text("cvd: {winsor_limit: 6}\n")
    (tmp_path / "overrides.d" / "20-b.yaml").write_text("cvd: {winsor_limit: 5}\n")
    assert load({}, tmp_path).cvd.winsor_limit == 5
    assert load({"WINSOR_LIMIT": "4"}, tmp_path).cvd.winsor_limit == 4
    assert load({}, tmp_path).lake.rotate_sec == 30


@pytest.mark.parametrize("content", ["cvd: [", "- a\n- b\n"])
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "defaults.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"defaults\.yaml"):
        load({}, tmp_path)


def test_every_preset_loads_and_differs_from_the_defaults() -> None:
    import yaml

    presets = yaml.safe_load((CONFIG / "presets.yaml").read_text("utf-8"))
    assert {"seed", "v13", "strong_only"} <= presets.keys()
    for name in presets:
        config = load({"ORDERFLOW_PRESET": name})
        assert config != Config(), name
    with pytest.raises(ConfigError, match="ORDERFLOW_PRESET is 'nosuch': it must be one of"):
        load({"ORDERFLOW_PRESET": "nosuch"})


def test_the_fingerprint_follows_results_and_nothing_else() -> None:
    base = effective_fingerprint(load({}))
    assert effective_fingerprint(load({"LOG_LEVEL": "DEBUG", "SPEED": "max", "TOPIC_PREFIX": "x."})) == base
    assert effective_fingerprint(load({"WINSOR_LIMIT": "7"})) != base
    assert effective_fingerprint(msgspec.convert(msgspec.to_builtins(load({})), Config)) == base
