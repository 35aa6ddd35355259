"""The rule that keeps the core pure: no clock, no randomness, no I/O, no order that depends on hashing.

Run by `make lint`. It reads the syntax tree of every module of the core and of every module that defines a Processor.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "libs" / "orderflow" / "microstructure"
PROCESSORS = [
    ROOT / "libs" / "orderflow" / "processor.py",
    ROOT / "libs" / "orderflow" / "pipeline.py",
    ROOT / "libs" / "orderflow" / "streaming" / "merge.py",
    ROOT / "libs" / "orderflow" / "venues" / "binance" / "normaliser.py",
    ROOT / "libs" / "orderflow" / "venues" / "binance" / "frames.py",
    ROOT / "libs" / "orderflow" / "venues" / "binance" / "oracle.py",
    ROOT / "libs" / "orderflow" / "venues" / "binance" / "silence.py",
    ROOT / "libs" / "orderflow" / "venues" / "binance" / "streams.py",
    ROOT / "libs" / "orderflow" / "venues" / "binance" / "trades.py",
]

FORBIDDEN_MODULES = {
    "aiohttp", "aiokafka", "asyncio", "ctypes", "http", "io", "logging", "multiprocessing", "os", "pathlib", "pickle",
    "random", "requests", "secrets", "shutil", "signal", "socket", "subprocess", "sys", "tempfile", "threading", "time",
    "urllib", "uuid", "websockets",
}  # fmt: skip
FORBIDDEN_CALLS = {"open", "print", "input", "hash", "id", "eval", "exec", "globals", "vars"}
FORBIDDEN_ATTRIBUTES = {"now", "utcnow", "today", "fromtimestamp_now", "urandom"}
ALLOWED_IMPORTS = {("pipeline.py", "orderflow.config")}


def problems(path: Path) -> list[str]:
    """Every breach in a file, as `file:line: what`."""
    found: list[str] = []
    tree = ast.parse(path.read_text("utf-8"), str(path))

    def note(node: ast.AST, what: str) -> None:
        found.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}: {what}")

    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for name in names:
                if name.split(".")[0] in FORBIDDEN_MODULES or name.startswith(("numpy.random", "orderflow.ingest")):
                    note(node, f"imports {name}: a clock, randomness or I/O has no place in the core")
                if name.startswith("orderflow.streaming") and path.name not in ("merge.py", "pipeline.py"):
                    note(node, f"imports {name}: the core knows nothing of the log")
        elif isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name) and function.id in FORBIDDEN_CALLS:
                note(node, f"calls {function.id}(): not a function of its arguments alone, or I/O")
            elif isinstance(function, ast.Attribute) and function.attr in FORBIDDEN_ATTRIBUTES:
                note(node, f"calls .{function.attr}(): the wall clock")
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) and _is_power_of_variable(node):
            note(
                node,
                "raises to a constant power: its last digit is the C library's choice, a product's is not; multiply",
            )
        elif isinstance(node, ast.For | ast.comprehension) and _is_set(node.iter):
            note(node.iter, "iterates over a set: its order depends on hashing; sort it")
    return found


def _is_power_of_variable(node: ast.BinOp) -> bool:
    return isinstance(node.right, ast.Constant) and not isinstance(node.left, ast.Constant)


def _is_set(node: ast.expr) -> bool:
    if isinstance(node, ast.Set | ast.SetComp):
        return True
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("set", "frozenset")


def main() -> int:
    files = sorted(CORE.rglob("*.py")) + [path for path in PROCESSORS if path.exists()]
    found = [problem for path in files for problem in problems(path)]
    for problem in found:
        print(problem)
    print(f"pure core: {len(files)} files, {len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
