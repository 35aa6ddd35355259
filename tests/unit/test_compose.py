"""What docker-compose.yml grants each container; whether it comes up is for `make containers`."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from orderflow.config import ENVIRONMENT
from orderflow.paths import ROOT

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = sorted(name for name, service in SERVICES.items() if service["image"].startswith("orderflow:"))
ONCE = {"init", "cli", "kcat"}
"""Run to their end; nobody restarts or watches them."""
NOT_IN_CONTAINERS = {
    "CAPTURE", "SPEED", "INGEST_SHARD", "ORDERFLOW_CONFIG", "INPUT_PREFIX", "VERIFY_SPAN_SEC", "DATA_DIR",
    "METRICS_HOST", "METRICS_PORT",
}  # fmt: skip
"""Files and places on the machine outside, and what the image sets itself."""


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_every_container_is_bounded_and_unprivileged(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service and "network_mode" not in service
    assert re.fullmatch(
        r"\$\{[A-Z_]+:-[a-z0-9./-]+:[\w.-]+\}|orderflow:\$\{ORDERFLOW_VERSION:-local\}", service["image"]
    )
    if name not in ONCE:
        assert service["restart"] == "unless-stopped"
    if name != "kcat":
        assert service["mem_limit"]
        assert service["logging"]["options"] == {"max-size": "10m", "max-file": "3"}
    for port in service.get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:\$\{[A-Z_]+:-\d+\}:\d+", port), port


@pytest.mark.parametrize("name", OURS)
def test_our_containers_write_nowhere_but_where_they_must(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True and service["init"] is True
    volumes = [re.sub(r"\$\{\w+:-(\w+)\}", r"\1", each).split(":") for each in service["volumes"]]
    writable = [each[1] for each in volumes if each[-1] != "ro"]
    allowed = {"lake": ["/data", "/artifacts"], "sinks": ["/data"], "cli": ["/data"]}
    assert writable == allowed.get(name, [])


def test_every_setting_reaches_the_containers_that_read_it() -> None:
    """A name that is documented and handed on to nobody would be ignored without a word."""
    given = set(SERVICES["ingestion"]["environment"])
    assert set(ENVIRONMENT) - NOT_IN_CONTAINERS <= given
    assert not NOT_IN_CONTAINERS & given
    of_services = set(SERVICES["ofi"]["environment"])
    assert (
        given - of_services == {name for name in given if ENVIRONMENT.get(name, ("",))[0] == "ingestion"} - of_services
    )


def test_nothing_but_the_exchange_differs_between_services() -> None:
    """Fingerprints of settings must be the same everywhere."""
    for name in ("ofi", "cvd", "fusion", "signal", "sinks", "lake"):
        assert SERVICES[name]["environment"] == SERVICES["ofi"]["environment"]
    assert SERVICES["init"]["environment"] == SERVICES["ingestion"]["environment"]


def test_what_is_scraped_can_be_started() -> None:
    """A figure, and its alert, of a service that nobody can start would never be there."""
    jobs = yaml.safe_load((ROOT / "infra" / "prometheus" / "prometheus.yml").read_text("utf-8"))["scrape_configs"]
    names = {name for job in jobs for each in job.get("dns_sd_configs", []) for name in each["names"]}
    assert names <= SERVICES.keys()
    for name in names:
        assert SERVICES[name]["command"] == [f"services.{name}"]
    assert SERVICES["verify"]["profiles"] == ["verify"]
    assert SERVICES["verify"]["environment"] == SERVICES["ofi"]["environment"]


def test_folders_that_are_mounted_are_in_the_repository() -> None:
    for name, service in SERVICES.items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (ROOT / source).is_dir(), (name, source)
            elif not source.startswith("${"):
                assert source in COMPOSE["volumes"], (name, source)
