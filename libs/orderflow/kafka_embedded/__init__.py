"""Apache Kafka on loopback without Docker: Java from a wheel, the broker's jars from Maven Central, in KRaft mode.

* `ensure_jars()`: the jars of `infra/kafka/jars.lock` in the user's cache, each checked by sha256.
* `find_java()`, `java_binary()`: the Java that runs them.
* `EmbeddedKafka(data_dir, port)`: a broker that this process starts and stops.
* `EmbeddedCluster(data_dir, nodes)`: several that replicate to one another.
* `start_daemon()`, `stop_daemon()`, `daemon_status()`, `running_daemon()`: the one of `orderflow kafka up`.
"""

from orderflow.kafka_embedded.broker import DataDirInUseError, EmbeddedKafka, EmbeddedKafkaError, PortTakenError
from orderflow.kafka_embedded.cluster import EmbeddedCluster
from orderflow.kafka_embedded.daemon import (
    daemon_dir,
    daemon_nodes,
    daemon_status,
    kill_node,
    running_daemon,
    start_daemon,
    start_node,
    stop_daemon,
    stop_node,
)
from orderflow.kafka_embedded.jars import JarsError, cache_dir, ensure_jars
from orderflow.kafka_embedded.java import JavaError, JavaRuntime, find_java, java_binary

__all__ = [
    "DataDirInUseError",
    "EmbeddedCluster",
    "EmbeddedKafka",
    "EmbeddedKafkaError",
    "JarsError",
    "JavaError",
    "JavaRuntime",
    "PortTakenError",
    "cache_dir",
    "daemon_dir",
    "daemon_nodes",
    "daemon_status",
    "ensure_jars",
    "find_java",
    "java_binary",
    "kill_node",
    "running_daemon",
    "start_daemon",
    "start_node",
    "stop_daemon",
    "stop_node",
]
