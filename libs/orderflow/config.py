"""The one typed configuration: defaults, overrides, environment, presets, and its fingerprint.

Precedence, lowest first: `infra/config/defaults.yaml`, `infra/config/overrides.d/*.yaml` in order of name, the file
named by ORDERFLOW_CONFIG, a preset (ORDERFLOW_PRESET), the environment names of `ENVIRONMENT`. Unknown keys are
refused, ranges are checked, and an error names the setting, its value and what is allowed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
import yaml

from orderflow.errors import ConfigError
from orderflow.lake.settings import LakeConfig
from orderflow.microstructure.cvd import CvdConfig
from orderflow.microstructure.fusion_config import FusionConfig
from orderflow.microstructure.ofi import OfiConfig
from orderflow.microstructure.signal import SignalConfig
from orderflow.paths import CONFIG
from orderflow.venues.binance.normaliser import NormaliserConfig


class IngestionConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The recorder's settings. They decide what is journalled, never what is computed from it."""

    source: Literal["live", "sim", "capture", "auto"] = "sim"
    """auto: sim where the simulated exchange answers at `sim_address`, else live."""
    sim_address: str = ""
    """host:port of the simulated exchange that `auto` looks for."""
    symbols: tuple[str, ...] = ("BTCUSDT", "ETHUSDT")
    """Empty for a capture: every symbol in it."""
    capture: str = ""
    speed: str = "1"
    """Pace of a capture: a factor, or max."""
    shard: str = "0/1"
    tick_ms: Annotated[int, msgspec.Meta(ge=10, le=60_000)] = 200
    ws_url: str = "wss://fstream.binance.com"
    rest_url: str = "https://fapi.binance.com"
    ping_interval_sec: Annotated[float, msgspec.Meta(gt=0, le=600)] = 20.0
    extra_streams: Annotated[
        tuple[Literal["markPrice@1s", "forceOrder"], ...],
        msgspec.Meta(description="streams of the exchange recorded besides quotes, depth and trades"),
    ] = ()
    rotate_sec: Annotated[
        float,
        msgspec.Meta(
            ge=10, le=86_000, description="age at which a socket is replaced, s; the exchange cuts it after 24 h"
        ),
    ] = 82_800.0
    queue_frames: Annotated[
        int, msgspec.Meta(ge=100, le=1_000_000, description="frames that may wait for the journal")
    ] = 50_000
    queue_mib: Annotated[
        int, msgspec.Meta(ge=1, le=4096, description="and their size, MiB; twice as much before anything is dropped")
    ] = 32
    queue_policy: Annotated[
        Literal["auto", "block", "conflate"],
        msgspec.Meta(description="beyond that: block the sockets, or conflate quotes; auto: conflate if live"),
    ] = "auto"
    first_data_sec: Annotated[float, msgspec.Meta(gt=0, le=600)] = 10.0
    silence_sec: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 60.0
    backoff_first_sec: Annotated[float, msgspec.Meta(gt=0, le=60)] = 1.0
    backoff_most_sec: Annotated[float, msgspec.Meta(gt=0, le=600)] = 30.0
    snapshot_limit: Literal[5, 10, 20, 50, 100, 500, 1000] = 1000
    weight_per_minute: Annotated[
        int,
        msgspec.Meta(
            ge=100, le=10_000, description="request weight used of the exchange's 2400; shared among the shards"
        ),
    ] = 2000
    broker_patience_sec: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 60.0

    def __post_init__(self) -> None:
        if self.speed != "max":
            try:
                factor = float(self.speed)
            except ValueError:
                factor = 0.0
            if not 0.001 <= factor <= 10_000:
                raise ValueError(f"speed is {self.speed!r}: it must be `max` or a factor from 0.001 to 10000")
        for symbol in self.symbols:
            if not symbol or symbol != symbol.upper() or "/" in symbol or any(each.isspace() for each in symbol):
                raise ValueError(
                    f"symbols holds {symbol!r}: a symbol is upper case, as in BTCUSDT, without spaces or /"
                )


class RuntimeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How services run; nothing here changes a result, so it is no part of any fingerprint."""

    topic_prefix: str = ""
    input_prefix: str | None = None
    """Of the topics that a service reads, where another than `topic_prefix`: outputs beside the old ones."""
    verify_span_sec: Annotated[float, msgspec.Meta(ge=1, le=86_400)] = 3600.0
    """How much of the journal the service `verify` takes at a time."""
    kafka_bootstrap: str = "127.0.0.1:9092"
    schema_registry_url: str = "http://127.0.0.1:8081"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    metrics_host: str = "127.0.0.1"
    metrics_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    """0: any free port."""
    status_file: str = ""
    """Where a supervisor reads the port of the service's pages; empty for none."""
    data_dir: str = "data-root"
    snapshot_sec: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 10.0
    state_rebuild: bool = False
    run_tag: str = ""
    compression: Literal["none", "gzip", "snappy", "lz4", "zstd"] = "none"


SIGNAL_SINKS: Final = ("jsonl", "sqlite")


class SinksConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The file sinks of signals besides the topic. A change changes where files are cut: part of the fingerprint."""

    signal_sink: Annotated[
        str,
        msgspec.Meta(
            description="files that signals are written to: jsonl, sqlite, or both joined by a comma; or none"
        ),
    ] = "jsonl"
    max_rows: Annotated[
        int, msgspec.Meta(ge=1, le=200_000, description="cut at the next tick with so many signals buffered")
    ] = 20_000

    def __post_init__(self) -> None:
        parts = [part.strip() for part in self.signal_sink.split(",")]
        if parts != ["none"] and (set(parts) - set(SIGNAL_SINKS) or len(set(parts)) != len(parts)):
            raise ValueError(
                f"signal_sink is {self.signal_sink!r}: allowed are {', '.join(SIGNAL_SINKS)}, each once and joined by "
                "commas, or none alone"
            )

    @property
    def chosen(self) -> tuple[str, ...]:
        """Those of `SIGNAL_SINKS` that are written, in that order however they were given; empty for none."""
        parts = {part.strip() for part in self.signal_sink.split(",")}
        return tuple(name for name in SIGNAL_SINKS if name in parts)


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that can be set."""

    runtime: RuntimeConfig = RuntimeConfig()
    ingestion: IngestionConfig = IngestionConfig()
    normaliser: NormaliserConfig = NormaliserConfig()
    ofi: OfiConfig = OfiConfig()
    cvd: CvdConfig = CvdConfig()
    fusion: FusionConfig = FusionConfig()
    signal: SignalConfig = SignalConfig()
    lake: LakeConfig = LakeConfig()
    sinks: SinksConfig = SinksConfig()

    def __post_init__(self) -> None:
        if self.normaliser.top_k < len(self.ofi.weights):
            raise ValueError(
                f"normaliser.top_k is {self.normaliser.top_k}, and ofi.weights has {len(self.ofi.weights)} levels: depth "
                "rows must carry at least as many"
            )


ENVIRONMENT: Final[dict[str, tuple[str, str]]] = {
    "SYMBOLS": ("ingestion", "symbols"),
    "SOURCE": ("ingestion", "source"),
    "SIM_ADDRESS": ("ingestion", "sim_address"),
    "CAPTURE": ("ingestion", "capture"),
    "SPEED": ("ingestion", "speed"),
    "INGEST_SHARD": ("ingestion", "shard"),
    "TICK_MS": ("ingestion", "tick_ms"),
    "WSS_URL": ("ingestion", "ws_url"),
    "REST_URL": ("ingestion", "rest_url"),
    "WSS_PING_INTERVAL": ("ingestion", "ping_interval_sec"),
    "WSS_ROTATE_SEC": ("ingestion", "rotate_sec"),
    "EXTRA_STREAMS": ("ingestion", "extra_streams"),
    "QUEUE_POLICY": ("ingestion", "queue_policy"),
    "BROKER_PATIENCE_SEC": ("ingestion", "broker_patience_sec"),
    "DEDUP_LRU": ("normaliser", "dedup_lru"),
    "Z_MODE": ("cvd", "z_mode"),
    "SCALE_MODE": ("cvd", "scale_mode"),
    "MAD_MULTIPLIER": ("cvd", "mad_multiplier"),
    "SCALE_FAST_WEIGHT": ("cvd", "scale_fast_weight"),
    "HALF_LIFE_SEC": ("cvd", "half_life_sec"),
    "WINSOR_LIMIT": ("cvd", "winsor_limit"),
    "PARQUET_ROTATE_SEC": ("lake", "rotate_sec"),
    "SIGNAL_SINK": ("sinks", "signal_sink"),
    "TOPIC_PREFIX": ("runtime", "topic_prefix"),
    "INPUT_PREFIX": ("runtime", "input_prefix"),
    "VERIFY_SPAN_SEC": ("runtime", "verify_span_sec"),
    "KAFKA_BOOTSTRAP": ("runtime", "kafka_bootstrap"),
    "SCHEMA_REGISTRY_URL": ("runtime", "schema_registry_url"),
    "LOG_LEVEL": ("runtime", "log_level"),
    "METRICS_HOST": ("runtime", "metrics_host"),
    "METRICS_PORT": ("runtime", "metrics_port"),
    "STATUS_FILE": ("runtime", "status_file"),
    "DATA_DIR": ("runtime", "data_dir"),
    "SNAPSHOT_SEC": ("runtime", "snapshot_sec"),
    "STATE_REBUILD": ("runtime", "state_rebuild"),
    "RUN_TAG": ("runtime", "run_tag"),
    "KAFKA_COMPRESSION": ("runtime", "compression"),
}
"""Environment name -> (section, setting)."""

_LISTS: Final = frozenset({"SYMBOLS", "EXTRA_STREAMS"})

T = TypeVar("T")


def load(environment: Mapping[str, str] | None = None, directory: Path = CONFIG) -> Config:
    """The effective configuration.

    Raises
    ------
    ConfigError
        A file is not YAML, a key is unknown, or a value is out of range; names it, the value and what is allowed.
    """
    environment = os.environ if environment is None else environment
    content: dict[str, Any] = {}
    for path in _files(environment, directory):
        _merge(content, _read_yaml(path), str(path))
    preset = environment.get("ORDERFLOW_PRESET", "")
    if preset:
        _merge(content, _preset(preset, directory), f"preset {preset}")
    for name, (section, key) in ENVIRONMENT.items():
        value = environment.get(name, "")
        if value == "":
            continue
        converted: Any = tuple(part.strip() for part in value.split(",") if part.strip()) if name in _LISTS else value
        if name == "SYMBOLS":
            converted = tuple(part.upper() for part in converted)
        content.setdefault(section, {})[key] = converted
        _convert(content, f"{name}={value}")
    return _convert(content, "the configuration")


def override(config: Config, assignments: Sequence[str]) -> Config:
    """`config` with settings changed; each assignment is `section.setting=value`, the value in YAML.

    Raises
    ------
    ConfigError
        It has another form, names no setting, or its value is out of range.
    """
    content: dict[str, Any] = msgspec.to_builtins(config)
    for text in assignments:
        name, equals, value = text.partition("=")
        section, dot, key = name.strip().partition(".")
        if not equals or not dot:
            raise ConfigError(f"--set {text!r} must be SECTION.SETTING=VALUE, as in cvd.z_mode=level")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {text!r}: the value is not YAML: {error}") from error
        if section not in content:
            raise ConfigError(f"--set {text!r}: there is no section {section!r}; there are: {', '.join(content)}")
        place = content[section]
        *folders, last = key.split(".")
        for folder in folders:
            place = place.get(folder) if isinstance(place, dict) else None
        if not isinstance(place, dict) or last not in place:
            raise ConfigError(
                f"--set {text!r}: there is no setting {key!r} in {section}; there are: {', '.join(content[section])}"
            )
        place[last] = parsed
        _convert(content, f"--set {text}")
    return _convert(content, "the configuration")


def _files(environment: Mapping[str, str], directory: Path) -> list[Path]:
    files = [directory / "defaults.yaml", *sorted((directory / "overrides.d").glob("*.yaml"))]
    extra = environment.get("ORDERFLOW_CONFIG", "")
    if extra:
        files.append(Path(extra))
    return files


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"configuration file {path} can't be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"configuration file {path} is not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"configuration file {path} must hold sections, as `ofi: ...`; it holds {content!r}")
    return content


def _preset(name: str, directory: Path) -> dict[str, Any]:
    presets = _read_yaml(directory / "presets.yaml")
    if name not in presets:
        raise ConfigError(f"ORDERFLOW_PRESET is {name!r}: it must be one of {', '.join(sorted(presets))}")
    preset = presets[name]
    assert isinstance(preset, dict)
    return preset


def _merge(into: dict[str, Any], add: Mapping[str, Any], origin: str) -> None:
    for key, value in add.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value, origin)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def _convert(content: Mapping[str, Any], origin: str) -> Config:
    try:
        return msgspec.convert(content, Config, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{origin} is refused: {error}{_allowed(str(error))}") from error


def _allowed(message: str) -> str:
    """The settings of the section that an error speaks of, where it is about an unknown name or a choice."""
    section = message.rpartition("$.")[2].partition("`")[0].partition(".")[0]
    if "unknown field" in message and section in Config.__struct_fields__:
        known = ", ".join(type(getattr(Config(), section)).__struct_fields__)
        return f"; settings of {section}: {known}"
    if "Invalid enum value" in message:
        key = message.rpartition(".")[2].rstrip("`")
        for part in Config.__struct_fields__:
            section_type = type(getattr(Config(), part))
            for info in msgspec.structs.fields(section_type):
                if info.name == key and section == part:
                    choice = info.type.__origin__ if hasattr(info.type, "__metadata__") else info.type
                    return f"; allowed: {', '.join(map(str, getattr(choice, '__args__', ())))}"
    return ""


def fingerprint(*sections: msgspec.Struct | str) -> str:
    """sha256 of the canonical form (sorted JSON) of what a result depends on."""
    digest = hashlib.sha256()
    for section in sections:
        digest.update(msgspec.json.encode(section, order="sorted"))
        digest.update(b"\n")
    return digest.hexdigest()


def effective_fingerprint(config: Config) -> str:
    """Fingerprint of every setting that some result depends on."""
    return fingerprint(config.normaliser, config.ofi, config.cvd, config.fusion, config.signal, config.lake)
