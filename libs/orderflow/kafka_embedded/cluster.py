"""`EmbeddedCluster`: several brokers on loopback, each its own process and folder, replicating to one another.

data_dir/cluster.json       cluster id and ports: the nodes know one another by them, so they stay
data_dir/node1/ ...         a folder as of a single broker

With three nodes every topic has three copies and a write counts once two have it: any one node may stop, die or hang
without loss. Two of three are needed for anything to go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

from orderflow.kafka_embedded import storage
from orderflow.kafka_embedded.broker import START_SEC, EmbeddedKafka, EmbeddedKafkaError
from orderflow.kafka_embedded.jars import write_atomically
from orderflow.kafka_embedded.process import free_port, port_is_free
from orderflow.kafka_embedded.storage import HOST, ClusterNode

CLUSTER: Final = "cluster.json"
NODES: Final = 3
MOST_NODES: Final = 9


class ClusterPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What every node of a cluster has to know of the others, by node, the first being number 1."""

    cluster_id: str
    ports: tuple[int, ...]
    controller_ports: tuple[int, ...]

    @property
    def bootstrap(self) -> str:
        return ",".join(f"{HOST}:{port}" for port in self.ports)

    def node(self, number: int) -> ClusterNode:
        controllers = tuple(enumerate(self.controller_ports, 1))
        return ClusterNode(node_id=number, controllers=controllers, cluster_id=self.cluster_id)


def node_dir(data_dir: Path, number: int) -> Path:
    """Folder of a node."""
    return data_dir / f"node{number}"


def read_plan(data_dir: Path) -> ClusterPlan | None:
    """The plan of a cluster's folder; None where it holds none.

    Raises
    ------
    EmbeddedKafkaError
        The plan is damaged.
    """
    path = data_dir / CLUSTER
    try:
        return msgspec.json.decode(path.read_bytes(), type=ClusterPlan)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise EmbeddedKafkaError(
            f"{path} can't be read: {error}; restore it, or remove {data_dir} to start empty"
        ) from error


def _plan(data_dir: Path, nodes: int, first_port: int | None) -> ClusterPlan:
    """The folder's own plan, with other ports where some are taken and no node runs; a new plan for a new folder."""
    plan = read_plan(data_dir)
    if plan is None and (data_dir / storage.LOG_DIR).exists():
        raise EmbeddedKafkaError(f"{data_dir} holds a broker that stands alone: choose another folder for a cluster")
    if plan is not None and len(plan.ports) != nodes:
        raise EmbeddedKafkaError(
            f"the cluster in {data_dir} has {len(plan.ports)} nodes, not {nodes}: ask for as many, or choose another folder"
        )
    if plan is not None:
        idle = not any(storage.is_locked(node_dir(data_dir, number)) for number in range(1, nodes + 1))
        wanted = (*plan.ports, *plan.controller_ports)
        if not idle or (all(map(port_is_free, wanted)) and first_port in (None, plan.ports[0])):
            return plan
    ports = _free_ports(nodes, [first_port + number for number in range(nodes)] if first_port else [])
    controller_ports = _free_ports(nodes, [], taken=ports)
    cluster_id = plan.cluster_id if plan is not None else storage.kafka_uuid()
    plan = ClusterPlan(cluster_id=cluster_id, ports=ports, controller_ports=controller_ports)
    data_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(data_dir / CLUSTER, msgspec.json.encode(plan))
    return plan


def _free_ports(count: int, wanted: list[int], taken: Iterable[int] = ()) -> tuple[int, ...]:
    found: list[int] = [port for port in wanted if port_is_free(port)]
    while len(found) < count:
        port = free_port()
        if port not in found and port not in taken:
            found.append(port)
    return tuple(found)


class EmbeddedCluster:
    """Brokers that replicate to one another; by default three. Methods block, as those of `EmbeddedKafka` do.

    Parameters
    ----------
    data_dir
        Made where it is missing. A cluster keeps its number of nodes.
    port
        Of the first node, the others follow where they are free; chosen freely by default.
    survive_parent
        Leave the brokers running when this process ends.

    Raises
    ------
    EmbeddedKafkaError
        The folder holds something else, or a cluster of another size.
    """

    def __init__(
        self, data_dir: Path, nodes: int = NODES, port: int | None = None, *, survive_parent: bool = False
    ) -> None:
        if not 2 <= nodes <= MOST_NODES:
            raise EmbeddedKafkaError(f"a cluster of {nodes} nodes was asked for: it must have 2 to {MOST_NODES}")
        self.data_dir = Path(data_dir).resolve()
        self.plan = _plan(self.data_dir, nodes, port)
        self.nodes = {
            number: EmbeddedKafka(
                node_dir(self.data_dir, number),
                node_port,
                survive_parent=survive_parent,
                node=self.plan.node(number),
            )
            for number, node_port in enumerate(self.plan.ports, 1)
        }

    @property
    def bootstrap(self) -> str:
        """Every node's address, joined by commas."""
        return self.plan.bootstrap

    def start(self, timeout_sec: float = START_SEC) -> None:
        """Start every node that does not run and return once each answers: alone none would come up."""
        try:
            self._each(lambda node: None if storage.is_locked(node.data_dir) else node.start(timeout_sec))
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End every node with SIGTERM, and with SIGKILL what takes too long."""
        self._each(lambda node: node.stop())

    def _each(self, act: Callable[[EmbeddedKafka], None]) -> None:
        with ThreadPoolExecutor(len(self.nodes)) as pool:
            done = [pool.submit(act, node) for node in self.nodes.values()]
        for each in done:
            each.result()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
