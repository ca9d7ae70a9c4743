"""The cluster's pods and application agree with deploy/serve.yaml, image, lock and code."""

from __future__ import annotations

import re
import subprocess
import tomllib

import pytest
import yaml
from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.autoscaler._private.kuberay.run_autoscaler import run_kuberay_autoscaler
from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS
from ray.serve.schema import ServeDeploySchema

from service.cluster import OBJECT_STORE_BYTES
from service.config import ServiceConfig, load_config
from service.deployment import NAME, replica_resources
from service.errors import ConfigError
from tests.deploy.kubernetes import (
    KUBERAY,
    VARIANTS,
    containers_in,
    pod_templates,
    ray_containers,
    ray_service,
    rendered,
)
from tests.deploy.monitoring import PROMETHEUS, ROOT

DOCKERFILE = (ROOT / "deploy" / "docker" / "Dockerfile").read_text()


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


@pytest.fixture
def spec(variant):
    return ray_service(VARIANTS[variant])


@pytest.fixture
def cluster(spec):
    return spec["rayClusterConfig"]


def environment(container):
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container["env"]}


# -- the application --------------------------------------------------------------------------


def model_application(config):
    """Of a Serve configuration's applications the one with the model."""
    (found,) = [one for one in config["applications"] if one["name"] == NAME]
    return found


def test_the_application_is_that_of_serve_yaml(variant, spec):
    """But for the device, which nodes would decide differently, a CPU replica's cores, and that a
    cluster has room for more replicas, and for old ones that end.
    """
    expected = yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())
    assert model_application(expected)["args"]["device"] == "auto"
    args = model_application(expected)["args"]
    assert args.pop("replicas") == 1
    most = {"cuda": 4, "cpu": 2}[variant]
    args |= {
        "device": variant,
        "autoscaling": {"min_replicas": 1, "max_replicas": most},
        "drain_s": 600,
    }
    found = yaml.safe_load(spec["serveConfigV2"])
    if variant == "cpu":
        (override,) = model_application(found).pop("deployments")
        assert override == {"name": NAME, "ray_actor_options": {"num_cpus": 2}}
    assert found == expected


def test_rays_schema_and_the_configuration_take_the_application(spec):
    deployed = ServeDeploySchema.model_validate(yaml.safe_load(spec["serveConfigV2"]))
    for application in deployed.applications:
        ServiceConfig.model_validate(application.args)
    assert deployed.proxy_location == "EveryNode"
    assert deployed.http_options.host == "0.0.0.0"


def as_rays_autoscaler_reads(cluster):
    """Kinds of nodes and their resources, by the code that runs in the container KubeRay adds."""
    resource = {"metadata": {"name": "saccade-x", "namespace": "saccade"}, "spec": cluster}
    return _derive_autoscaling_config_from_ray_cr(resource)


def test_a_replaced_cluster_outlasts_its_requests(spec):
    drain = model_application(yaml.safe_load(spec["serveConfigV2"]))["args"]["drain_s"]
    assert spec["rayClusterDeletionDelaySeconds"] > drain


def test_every_replica_finds_a_worker(variant, spec, cluster):
    application = model_application(yaml.safe_load(spec["serveConfigV2"]))
    config = ServiceConfig.model_validate(application["args"])
    most = application["args"].get("autoscaling", {}).get("max_replicas", config.replicas)
    (workers,) = cluster["workerGroupSpecs"]
    kind = as_rays_autoscaler_reads(cluster)["available_node_types"][workers["groupName"]]
    assert 1 <= kind["min_workers"] <= workers["replicas"] <= kind["max_workers"]
    assert most <= kind["max_workers"]
    need = replica_resources(config)
    if variant == "cpu":
        # Else as many as the head's machine has, by as many as there are replicas.
        need |= application["deployments"][0]["ray_actor_options"]
    has = kind["resources"]
    assert need["num_cpus"] <= has["CPU"]
    assert need.get("num_gpus", 0) == has.get("GPU", 0)
    # The keys and values of all sequences, and as much again for the rest.
    assert 2 * config.kv_cache_gib * 2**30 + OBJECT_STORE_BYTES < has["memory"]


def test_workers_come_and_go_by_rays_autoscaler(cluster):
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["autoscalerOptions"]["version"] == "v2"
    read = as_rays_autoscaler_reads(cluster)
    assert read["idle_timeout_minutes"] * 60 == cluster["autoscalerOptions"]["idleTimeoutSeconds"]
    # The head runs no replica.
    head = read["available_node_types"][read["head_node_type"]]["resources"]
    assert (head["CPU"], head["GPU"]) == (0, 0)
    # What the container runs, from our image and its packages.
    assert callable(run_kuberay_autoscaler)


# -- versions, images, ports ------------------------------------------------------------------


def test_rays_version_is_the_locks(cluster):
    (locked,) = re.findall(r"^ray==(\S+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert cluster["rayVersion"] == locked


def test_the_image_is_a_target_of_the_dockerfile(variant, cluster):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    images = {container["image"] for container in containers_in(cluster)}
    assert images == {f"saccade:{version}-{variant}"}
    assert re.search(rf"^FROM \S+ AS {variant}$", DOCKERFILE, re.MULTILINE)


def test_ports_agree(spec, cluster):
    port = yaml.safe_load(spec["serveConfigV2"])["http_options"]["port"]
    assert port == ServiceConfig.model_fields["port"].default
    assert f"EXPOSE {port}\n" in DOCKERFILE
    for container in ray_containers(cluster):
        named = {entry["name"]: entry["containerPort"] for entry in container["ports"]}
        # KubeRay's service for clients has the head's ports of that name.
        assert named["serve"] == port


def test_probes_ask_for_what_is_there(cluster):
    """`tests/bench/serve_run.py` asks a real cluster the same."""
    agent = {"path": "/api/healthz", "port": DEFAULT_DASHBOARD_AGENT_LISTEN_PORT}
    head, worker = ray_containers(cluster)
    probes = [head["readinessProbe"], head["livenessProbe"], worker["livenessProbe"]]
    assert [probe["httpGet"] for probe in probes] == [agent] * 3
    assert agent["path"] in PUBLIC_EXACT_PATHS  # asks for no token
    assert worker["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": 8000}


# -- the token, the key, the environment ------------------------------------------------------


def test_every_pod_has_the_token_and_the_key_from_secrets(cluster):
    secrets = {
        (one["metadata"]["name"], key)
        for one in yaml.safe_load_all((KUBERAY / "secrets.example.yaml").read_text())
        for key in one["stringData"]
    }
    used = set()
    for container in ray_containers(cluster):
        values = environment(container)
        assert values["RAY_AUTH_MODE"] == "token"
        assert values["RAY_USAGE_STATS_ENABLED"] == "0"
        references = [
            values[name]["secretKeyRef"] for name in ("RAY_AUTH_TOKEN", "SACCADE_API_KEY")
        ]
        used |= {(reference["name"], reference["key"]) for reference in references}
        # Without it the pod must not start.
        assert not any("optional" in reference for reference in references)
    assert used == secrets
    # The operator reads the token itself, from the key that it knows, for its own requests.
    assert cluster["authOptions"] == {"mode": "token", "secretName": "saccade-ray-token"}
    assert ("saccade-ray-token", "auth_token") in used
    assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in cluster["autoscalerOptions"]["env"]


def test_no_secret_is_in_the_repository(monkeypatch):
    """The example is not applied, and its values start nothing."""
    assert "Secret" not in {one["kind"] for folder in VARIANTS.values() for one in rendered(folder)}
    for one in yaml.safe_load_all((KUBERAY / "secrets.example.yaml").read_text()):
        assert set(one["stringData"].values()) == {""}
    monkeypatch.setenv("SACCADE_API_KEY", "")
    with pytest.raises(ConfigError, match="api_key"):
        load_config()


def test_services_of_the_namespace_set_no_variables(cluster, monkeypatch):
    """Kubernetes describes services in variables, and those of KubeRay's would be refused."""
    monkeypatch.setenv("SACCADE_SERVE_SVC_SERVICE_HOST", "10.0.0.1")
    with pytest.raises(ConfigError, match="SACCADE_SERVE_SVC_SERVICE_HOST is unknown"):
        load_config()
    assert [template["enableServiceLinks"] for template in pod_templates(cluster)] == [False, False]


def test_variables_are_fields_of_the_service():
    cluster = ray_service(KUBERAY, ("model",))["rayClusterConfig"]
    for container in ray_containers(cluster):
        names = {name for name in environment(container) if name.startswith("SACCADE_")}
        assert {name.removeprefix("SACCADE_").lower() for name in names} <= set(
            ServiceConfig.model_fields
        )


def test_a_model_of_ones_own_is_mounted_where_it_is_looked_for():
    cluster = ray_service(KUBERAY, ("model",))["rayClusterConfig"]
    for template in pod_templates(cluster):
        (container,) = template["containers"]
        mount = next(one for one in container["volumeMounts"] if one["name"] == "models")
        assert environment(container)["SACCADE_MODEL"].startswith(mount["mountPath"] + "/")
        assert mount["readOnly"]
        assert "models" in {volume["name"] for volume in template["volumes"]}


# -- monitoring -------------------------------------------------------------------------------


def test_metrics_are_scraped_once_and_under_the_name_of_the_alerts():
    (monitor,) = [one["spec"] for one in rendered(KUBERAY) if one["kind"] == "ServiceMonitor"]
    service = next(one for one in rendered(KUBERAY) if one["kind"] == "RayService")
    # Labels that KubeRay gives its service for the head: one pod behind it, so one target.
    assert monitor["selector"]["matchLabels"] == {
        "ray.io/originated-from-cr-name": service["metadata"]["name"],
        "ray.io/node-type": "head",
    }
    job = monitor["selector"]["matchLabels"][monitor["jobLabel"]]
    alerts = (PROMETHEUS / "rules" / "alerts.yml").read_text()
    assert set(re.findall(r'job="([^"]+)"', alerts)) == {job}
    (endpoint,) = monitor["endpoints"]
    scraped = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    assert endpoint["path"] == scraped["scrape_configs"][0]["metrics_path"]
    assert endpoint["interval"] == scraped["global"]["scrape_interval"]
    head, _ = ray_containers(service["spec"]["rayClusterConfig"])
    assert endpoint["port"] in {port["name"] for port in head["ports"]}


def shell_blocks(text):
    return re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_the_readmes_rules_are_those_of_prometheus(tmp_path):
    """Its loop makes a PrometheusRule of each file; run with a stand-in for kubectl."""
    (loop,) = [
        block
        for block in shell_blocks((KUBERAY / "README.md").read_text())
        if "PrometheusRule" in block
    ]
    stand_in = tmp_path / "kubectl"
    stand_in.write_text("#!/bin/sh\ncat\necho\necho ---\n")
    stand_in.chmod(0o755)
    done = subprocess.run(
        ["sh", "-ec", loop],
        cwd=ROOT,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    made = [one for one in yaml.safe_load_all(done.stdout) if one]
    assert {one["kind"] for one in made} == {"PrometheusRule"}
    files = sorted((PROMETHEUS / "rules").glob("*.yml"))
    groups = [yaml.safe_load(file.read_text())["groups"] for file in files]
    assert sorted(map(repr, groups)) == sorted(repr(one["spec"]["groups"]) for one in made)


def test_the_readme_names_what_is_there():
    text = (KUBERAY / "README.md").read_text()
    for path in re.findall(r"\bdeploy/[\w./-]*\w", text):
        assert (ROOT / path).exists(), path
    for folder in re.findall(r"apply -k (\S+)", text):
        assert (ROOT / folder.rstrip("`.") / "kustomization.yaml").exists()
    for file in KUBERAY.rglob("*.yaml"):
        assert file.name in text or file.parent.name in text, file
