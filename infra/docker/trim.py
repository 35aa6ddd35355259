"""Takes out of an environment what no service imports, strips the rest of symbols, and proves that it works.

Runs while the image is built: python trim.py SITE_PACKAGES; needs `strip` of binutils. What Arrow brings for clouds,
ORC, Flight and CUDA is three quarters of its size; its libraries lie there under up to three names.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

UNUSED = (
    "*/tests",
    "*/testing",
    "*/include",
    "*/__init__.pxd",
    "pyarrow/src",
    "pyarrow/libarrow_flight*",
    "pyarrow/libarrow_s3*",
    "pyarrow/libarrow_python_flight*",
    "pyarrow/libarrow_python_parquet_encryption*",
    "pyarrow/libarrow_python.so",
    "pyarrow/*.so.*.*.*",
    "pyarrow/_azurefs*",
    "pyarrow/_cuda*",
    "pyarrow/_dataset_orc*",
    "pyarrow/_dataset_parquet_encryption*",
    "pyarrow/_flight*",
    "pyarrow/_gcsfs*",
    "pyarrow/_hdfs*",
    "pyarrow/_orc*",
    "pyarrow/_parquet_encryption*",
    "pyarrow/_pyarrow_cpp_tests*",
    "pyarrow/_s3fs*",
    "pyarrow/_substrait*",
    "zstandard/_cffi*",
)
SOURCES = ("*.pyx", "*.pxd", "*.pxi", "*.pyi", "*.c", "*.h", "*.hpp", "*.cc")

CHECK = """
import io
import aiohttp, aiokafka, cramjam, fastavro, msgspec, prometheus_client, websockets, yaml, zstandard
import avro.compatibility
import pyarrow as pa
import pyarrow.parquet as pq
table = pa.table({"symbol": ["BTCUSDT", None], "qty": [0.5, 2.0], "levels": [[1.0], []]})
for compression in ("zstd", "snappy", "none"):
    file = io.BytesIO()
    pq.write_table(table, file, compression=compression)
    file.seek(0)
    assert pq.read_table(file) == table
for name in ("gzip", "snappy", "lz4", "zstd"):
    codec = getattr(cramjam, name)
    assert bytes(codec.decompress(bytes(codec.compress(b"journal")))) == b"journal"
"""


def main() -> int:
    packages = Path(sys.argv[1])
    for pattern in UNUSED:
        for path in packages.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for pattern in SOURCES:
        for path in packages.rglob(pattern):
            path.unlink()
    libraries = [path for path in packages.rglob("*.so*") if path.is_file()]
    subprocess.run(["strip", "--strip-unneeded", *libraries], check=True)
    return subprocess.run([sys.executable, "-c", CHECK], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
