"""One embedded Apache Kafka for a whole test run (one per worker under pytest-xdist)."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from orderflow.kafka_embedded import EmbeddedKafka


@pytest.fixture(scope="session")
def kafka_bootstrap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a broker. KAFKA_BOOTSTRAP_TEST names one that is up already.

    Tests share it: every test takes topics and groups of its own, and none kills it.
    """
    given = os.environ.get("KAFKA_BOOTSTRAP_TEST")
    if given:
        yield given
        return
    with EmbeddedKafka(tmp_path_factory.mktemp("kafka")) as broker:
        yield broker.bootstrap
