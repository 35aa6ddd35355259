"""Runs as `python -m services.healthcheck`: whether this container's service is ready. Exit code 0 or 1.

Asks `/readyz` of METRICS_PORT, or of HEALTH_URL where that is set (a service whose pages are elsewhere).
"""

import os
import sys
import urllib.error
import urllib.request

TIMEOUT_SEC = 2.0


def main() -> int:
    url = os.environ.get("HEALTH_URL") or f"http://127.0.0.1:{os.environ.get('METRICS_PORT', '9100')}/readyz"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_SEC) as answer:
            return 0 if answer.status == 200 else 1
    except (urllib.error.URLError, OSError) as error:
        sys.stderr.write(f"{url}: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
