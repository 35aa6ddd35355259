"""Write `jars.lock` anew: `python infra/kafka/lock.py 4.1.1`. For whoever moves the project to another Kafka.

jgo resolves the closure and compares each jar with the repository's own checksum; a mismatch ends the run. Read the
difference before it is committed: from then on every machine takes exactly these bytes.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jgo.maven import MavenContext
from orderflow.kafka_embedded.jars import BROKER, LOCK_FILE, file_sha256, write_atomically

LOGGING = "org.slf4j:slf4j-simple:1.7.36"


class _Strict(logging.Handler):
    """A warning of jgo is a checksum that does not fit."""

    def emit(self, record: logging.LogRecord) -> None:
        raise SystemExit(record.getMessage())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("version", help="of Apache Kafka, as in 4.1.1")
    version = parser.parse_args().version
    logging.getLogger("jgo").addHandler(_Strict(logging.WARNING))
    endpoint = f"{BROKER}:{version}+{LOGGING}"
    with tempfile.TemporaryDirectory() as folder:
        context = MavenContext(repo_cache=Path(folder))
        roots = [context.create_dependency(each) for each in endpoint.split("+")]
        dependencies = [each for part in context.resolver.resolve(roots) for each in part]
        with ThreadPoolExecutor(8) as threads:
            paths = list(threads.map(lambda each: each.artifact.resolve(), dependencies))
        lines = sorted(
            f"{each.groupId}:{each.artifactId}:{each.version} {file_sha256(path)}"
            for each, path in zip(dependencies, paths)
        )
    head = f"# {endpoint}\n# group:artifact:version sha256; made by infra/kafka/lock.py\n"
    write_atomically(LOCK_FILE, (head + "\n".join(lines) + "\n").encode())
    sys.stdout.write(f"{len(lines)} jars in {LOCK_FILE}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
