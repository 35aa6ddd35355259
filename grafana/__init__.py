"""The dashboards: `python -m grafana.build` writes them, `python -m grafana.check` asks a real Prometheus for every panel."""
