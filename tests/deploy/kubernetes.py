"""The cluster's manifests for the tests: kustomizations put together, and their schemas."""

from __future__ import annotations

import copy
import json
import re
from functools import cache
from importlib.resources import files
from pathlib import Path

import kubernetes_validate
import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from tests.deploy.monitoring import ROOT

KUBERAY = ROOT / "deploy" / "kuberay"
VARIANTS = {"cuda": KUBERAY, "cpu": KUBERAY / "cpu"}
"""By the Dockerfile's target of their image."""
SCHEMAS = Path(__file__).parent / "schemas"
VERSION = "1.37"
"""Of Kubernetes' schemas; what is used of them is older."""
OWN_SCHEMAS = {"RayService": "rayservice.yaml", "ServiceMonitor": "servicemonitor.yaml"}


def rendered(folder, extra_components=()):
    """Documents of a kustomization, as `kubectl kustomize` prints them but for the order.

    Only what the repository's kustomizations use is understood; anything else is an error.
    """
    settings = _read(folder / "kustomization.yaml")[0]
    unknown = set(settings) - {
        *("apiVersion", "kind", "namespace", "resources", "components", "images", "patches"),
    }
    assert not unknown, f"{folder}: the tests do not know {unknown}"
    documents = []
    for name in settings.get("resources", []):
        path = folder / name
        documents += rendered(path) if path.is_dir() else _read(path)
    for name in [*settings.get("components", []), *extra_components]:
        component = _read(folder / name / "kustomization.yaml")[0]
        assert set(component) <= {"apiVersion", "kind", "resources", "patches"}
        for resource in component.get("resources", []):
            documents += _read(folder / name / resource)
        _patch_all(documents, component, folder / name)
    _patch_all(documents, settings, folder)
    for document in documents:
        if "namespace" in settings and document["kind"] != "Namespace":
            document["metadata"]["namespace"] = settings["namespace"]
        for image in settings.get("images", []):
            for container in containers_in(document):
                if container["image"] == image["name"]:
                    container["image"] = f"{image['newName']}:{image['newTag']}"
    return documents


def ray_service(folder, extra_components=()):
    """Specification of a kustomization's RayService."""
    documents = rendered(folder, extra_components)
    (found,) = [one for one in documents if one["kind"] == "RayService"]
    return found["spec"]


def pod_templates(cluster):
    """Specifications of the head's and the workers' pods."""
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def ray_containers(cluster):
    """Head's and workers': what KubeRay adds has these as its model, or autoscalerOptions."""
    return [template["containers"][0] for template in pod_templates(cluster)]


def containers_in(value):
    """Every entry of every list called containers or initContainers."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("containers", "initContainers"):
                yield from inner
            else:
                yield from containers_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from containers_in(inner)


def problems(document):
    """Where a document differs from its kind's schema, unknown fields included."""
    kind = document["kind"]
    if kind in OWN_SCHEMAS:
        validator = _own_validator(OWN_SCHEMAS[kind])
        return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]
    try:
        kubernetes_validate.validate(document, VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{error.json_path}: {error.message}"]
    return []


def _read(file):
    return [document for document in yaml.safe_load_all(file.read_text()) if document]


def _patch_all(documents, settings, folder):
    for patch in settings.get("patches", []):
        targets = [
            document
            for document in documents
            if document["kind"] == patch["target"]["kind"]
            and document["metadata"]["name"] == patch["target"]["name"]
        ]
        assert targets, f"{folder}: a patch has no target"
        for document in targets:
            for operation in yaml.safe_load((folder / patch["path"]).read_text()):
                _patch(document, operation)


def _patch(document, operation):
    """RFC 6902's add, replace and remove."""
    *way, last = operation["path"].removeprefix("/").split("/")
    place = document
    for step in way:
        place = place[int(step)] if isinstance(place, list) else place[step]
    value = copy.deepcopy(operation.get("value"))
    if operation["op"] == "add" and last == "-":
        place.append(value)
    elif operation["op"] == "add":
        place[last] = value
    elif operation["op"] == "replace":
        assert last in place
        place[last] = value
    else:
        assert operation["op"] == "remove"
        del place[last]


@cache
def _own_validator(name):
    text = (SCHEMAS / name).read_text()
    # `k8s.NAME` is a definition of Kubernetes' own.
    text = re.sub(r"\$ref: k8s\.([\w.]+)", r'$ref: "kubernetes#/$defs/\1"', text)
    folder = files("kubernetes_validate") / "kubernetes-json-schema" / f"v{VERSION}.0-local-strict"
    definitions = json.loads((folder / "_definitions.json").read_text())
    registry = Registry().with_resource("kubernetes", Resource.from_contents(definitions))
    return Draft202012Validator(yaml.safe_load(text), registry=registry)
