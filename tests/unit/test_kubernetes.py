"""The manifests: rendered by Kustomize, held against the API's schemas, and against rules of our own."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from grafana.check import metrics_of

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "infra" / "kubernetes"
OVERLAYS = ("sim", "live")
API_VERSIONS = ("1.29", "1.37")
"""The oldest and the newest API that the manifests are held against."""
STAGES = ("ofi", "cvd", "fusion", "signal")
SERVICES = {"ingestion", *STAGES, "lake", "sinks"}
POD_KINDS = ("Deployment", "StatefulSet", "Job")
MOST_BYTES = 1 << 20
"""Of a config map."""

Manifest = dict[str, Any]


def render(folder: Path) -> list[Manifest]:
    """What Kustomize makes of a folder."""
    kustomize, kubectl = shutil.which("kustomize"), shutil.which("kubectl")
    if kustomize:
        command = [kustomize, "build", str(folder)]
    elif kubectl:
        command = [kubectl, "kustomize", str(folder)]
    else:
        pytest.skip("neither kustomize nor kubectl is installed")
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr.lower(), done.stderr
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


@pytest.fixture(scope="module", params=OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    return render(KUBERNETES / "overlays" / request.param)


def name_of(manifest: Manifest) -> str:
    return f"{manifest['kind']} {manifest['metadata']['name']}"


def pods(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Pod templates by kind and name of what makes them."""
    return {name_of(each): each["spec"]["template"] for each in manifests if each["kind"] in POD_KINDS}


def ours(manifests: list[Manifest]) -> dict[str, Manifest]:
    """The pod templates of orderflow's own services, by name of the service."""
    found = {}
    for template in pods(manifests).values():
        arguments = template["spec"]["containers"][0].get("args", [""])
        if arguments[0].startswith("services.") and arguments[0] != "services.simexchange":
            found[arguments[0].removeprefix("services.")] = template
    return found


@pytest.mark.parametrize("version", API_VERSIONS)
def test_manifests_are_what_the_api_takes(manifests: list[Manifest], version: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="infra/requirements/kubernetes.txt is not installed")
    checked = 0
    for manifest in manifests:
        if manifest["apiVersion"].startswith("keda.sh/"):
            continue
        try:
            validator.validate(manifest, version, strict=True)
        except validator.ValidationError as error:
            pytest.fail(f"{name_of(manifest)}: {list(error.path)}: {error.message}")
        checked += 1
    assert checked >= len(SERVICES) * 2


def test_the_validator_refuses_an_unknown_setting(manifests: list[Manifest]) -> None:
    """It would be no check if it took everything."""
    validator = pytest.importorskip("kubernetes_validate", reason="infra/requirements/kubernetes.txt is not installed")
    wrong = {**next(each for each in manifests if each["kind"] == "Deployment")}
    wrong["spec"] = {**wrong["spec"], "replica": 2}
    with pytest.raises(validator.ValidationError):
        validator.validate(wrong, API_VERSIONS[-1], strict=True)


def test_scaled_objects_scale_the_stages() -> None:
    """KEDA's own schema is in no package that a test could use; these are the settings that it has (2.16 to 2.20)."""
    rendered = render(KUBERNETES / "overlays" / "live")
    scaled = [each for each in rendered if each["kind"] == "ScaledObject"]
    assert {each["metadata"]["name"] for each in scaled} == set(STAGES)
    validator = pytest.importorskip("kubernetes_validate", reason="infra/requirements/kubernetes.txt is not installed")
    for manifest in scaled:
        name, spec = manifest["metadata"]["name"], manifest["spec"]
        assert spec["scaleTargetRef"] == {"name": name}
        assert spec.keys() <= KEDA_SETTINGS
        (trigger,) = spec["triggers"]
        assert trigger["type"] == "prometheus"
        assert {type(value) for value in trigger["metadata"].values()} == {str}
        assert trigger["metadata"]["ignoreNullValues"] == "false", "no figure would pass for no lag"
        assert f'service="{name}"' in trigger["metadata"]["query"]
        assert metrics_of(trigger["metadata"]["query"]) == {"consumer_lag_records"}, "not what the services export"
        (deployment,) = [each for each in rendered if name_of(each) == f"Deployment {name}"]
        assert "replicas" not in deployment["spec"], "each `kubectl apply` would undo the scaler's work"
        # What KEDA hands on to the autoscaler of Kubernetes is in the API's schemas.
        autoscaler = {
            "apiVersion": "autoscaling/v2",
            "kind": "HorizontalPodAutoscaler",
            "metadata": {"name": name},
            "spec": {
                "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name},
                "minReplicas": spec["minReplicaCount"],
                "maxReplicas": spec["maxReplicaCount"],
                "behavior": spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"],
            },
        }
        validator.validate(autoscaler, API_VERSIONS[-1], strict=True)


KEDA_SETTINGS = {
    "scaleTargetRef",
    "minReplicaCount",
    "maxReplicaCount",
    "pollingInterval",
    "cooldownPeriod",
    "advanced",
    "triggers",
}


def test_every_service_is_deployed_once(manifests: list[Manifest]) -> None:
    assert set(ours(manifests)) == SERVICES
    names = [name_of(each) for each in manifests]
    assert len(names) == len(set(names))
    assert {each["metadata"].get("namespace", "") for each in manifests if each["kind"] != "Namespace"} == {"orderflow"}


def test_pods_are_hardened(manifests: list[Manifest]) -> None:
    for name, template in pods(manifests).items():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["runAsUser"] > 0, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert spec["automountServiceAccountToken"] is False, name
        # Links would set KAFKA_PORT and the like, which images and services read as settings.
        assert spec["enableServiceLinks"] is False, name
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, name
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name
            assert container["securityContext"].get("readOnlyRootFilesystem") is True or name == "StatefulSet kafka"


def test_pods_have_probes_and_resources(manifests: list[Manifest]) -> None:
    for name, template in pods(manifests).items():
        for container in template["spec"]["containers"]:
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), name
            assert container["resources"]["limits"].keys() == {"memory"}, name
            if not name.startswith("Job"):
                assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys(), name
    for name, template in ours(manifests).items():
        (container,) = template["spec"]["containers"]
        assert container["livenessProbe"]["httpGet"]["path"] == "/healthz", name
        assert container["readinessProbe"]["httpGet"]["path"] == "/readyz", name
        assert template["spec"]["terminationGracePeriodSeconds"] > 10, name


def test_selectors_find_their_pods(manifests: list[Manifest]) -> None:
    labels = {name: template["metadata"]["labels"] for name, template in pods(manifests).items()}
    checked = 0
    for manifest in manifests:
        spec = manifest.get("spec", {})
        selector = spec.get("selector") or spec.get("podSelector")
        if manifest["kind"] == "Service":
            wanted = selector
        elif manifest["kind"] in ("Deployment", "StatefulSet", "PodDisruptionBudget", "NetworkPolicy"):
            wanted = selector["matchLabels"]
        else:
            continue
        found = [name for name, own in labels.items() if wanted.items() <= own.items()]
        assert found, name_of(manifest)
        if manifest["kind"] != "NetworkPolicy":
            assert [name.split()[1] for name in found] == [manifest["metadata"]["name"]], name_of(manifest)
        checked += 1
    assert checked > 2 * len(SERVICES)


def test_what_pods_name_exists(manifests: list[Manifest]) -> None:
    present = {(each["kind"], each["metadata"]["name"]) for each in manifests}
    accounts = {name for kind, name in present if kind == "ServiceAccount"}
    for name, template in pods(manifests).items():
        spec = template["spec"]
        assert spec.get("serviceAccountName") in {None, *accounts}, name
        for container in spec["containers"]:
            for source in container.get("envFrom", []):
                for kind, reference in (("ConfigMap", "configMapRef"), ("Secret", "secretRef")):
                    assert reference not in source or (kind, source[reference]["name"]) in present, name
        for volume in spec.get("volumes", []):
            assert "configMap" not in volume or ("ConfigMap", volume["configMap"]["name"]) in present, name


def test_prometheus_finds_every_service_by_name(manifests: list[Manifest]) -> None:
    scraped: set[str] = set()
    for job in yaml.safe_load((ROOT / "infra" / "prometheus" / "prometheus.yml").read_text("utf-8"))["scrape_configs"]:
        for each in job.get("dns_sd_configs", []):
            assert each["port"] == 9100
            scraped.update(each["names"])
    headless = {
        each["metadata"]["name"]
        for each in manifests
        if each["kind"] == "Service" and each["spec"].get("clusterIP") == "None"
    }
    assert scraped & SERVICES == SERVICES
    assert headless >= SERVICES


def test_verify_can_be_added(tmp_path: Path) -> None:
    for folder in ("infra", "grafana"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "infra" / "kubernetes" / "overlays" / "live" / "kustomization.yaml"
    path.write_text(path.read_text("utf-8").replace("components: [", "components: [../../components/verify, "), "utf-8")
    rendered = render(path.parent)
    assert set(ours(rendered)) == SERVICES | {"verify"}
    (service,) = (each for each in rendered if name_of(each) == "Service verify")
    labels = ours(rendered)["verify"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert labels["app.kubernetes.io/part-of"] == "orderflow"
    others = [each["spec"]["selector"] for each in rendered if name_of(each) == "Service ofi"]
    assert others == [{"app.kubernetes.io/name": "ofi"}], "its labels are its own"


def test_config_maps_hold_every_file_and_fit(manifests: list[Manifest]) -> None:
    keys: set[str] = set()
    for manifest in manifests:
        if manifest["kind"] == "ConfigMap":
            assert sum(len(text.encode()) for text in manifest.get("data", {}).values()) < MOST_BYTES, name_of(manifest)
            keys.update(manifest.get("data", {}))
    files = [
        *(ROOT / "infra" / "prometheus" / "rules").glob("*.yml"),
        *(ROOT / "grafana" / "dashboards").glob("*.json"),
        ROOT / "infra" / "prometheus" / "prometheus.yml",
        ROOT / "infra" / "alertmanager" / "alertmanager.yml",
    ]
    assert [path.name for path in files if path.name not in keys] == []


def test_recorders_and_shares_are_changed_together(tmp_path: Path) -> None:
    for folder in ("infra", "grafana"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "infra" / "kubernetes" / "overlays" / "live" / "kustomization.yaml"
    path.write_text(path.read_text("utf-8").replace("name: ingestion, count: 1", "name: ingestion, count: 3"), "utf-8")
    rendered = render(path.parent)
    (recorder,) = [each for each in rendered if name_of(each) == "StatefulSet ingestion"]
    assert recorder["spec"]["replicas"] == 3
    environment = {each["name"]: each for each in recorder["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert environment["INGEST_SHARDS"]["value"] == "3"
    assert environment["INGEST_SHARD"]["value"] == "$(INGEST_INDEX)/$(INGEST_SHARDS)"


def test_images_and_settings_are_those_of_compose() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))["services"]
    for name, template in pods(render(KUBERNETES / "overlays" / "sim")).items():
        service = services[name.split()[1]]
        (container,) = template["spec"]["containers"]
        if container["image"].startswith("orderflow:"):
            continue
        assert f":-{container['image']}" in service["image"], name
        for each in container.get("env", []):
            composed = service["environment"].get(each["name"])
            if each["name"] not in DIFFERENT:
                assert str(composed).removeprefix("${").endswith(each["value"]) or f":-{each['value']}" in str(
                    composed
                ), (name, each, composed)


DIFFERENT = {"CLUSTER_ID"} | {
    f"KAFKA_{name}" for name in ("LISTENERS", "ADVERTISED_LISTENERS", "LISTENER_SECURITY_PROTOCOL_MAP", "LOG_DIRS")
}
"""No listener for the machine outside, and a folder below the volume's (which may hold `lost+found`)."""
