"""Measured rates of every stage: `python -m tests.bench`. What is measured and how: docs/performance.md."""
