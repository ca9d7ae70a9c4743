"""The image and the composition: what they name exists, and nothing runs as root."""

from __future__ import annotations

import re

import yaml

from service.config import ServiceConfig
from tests.deploy.monitoring import ROOT

DOCKER = ROOT / "deploy" / "docker"
TEXT = (DOCKER / "Dockerfile").read_text()


def stages():
    """Instructions by stage, with continued lines joined."""
    found, current = {}, None
    for line in TEXT.replace("\\\n", " ").splitlines():
        if match := re.match(r"FROM (\S+) AS (\S+)", line):
            current = found.setdefault(match[2], [("FROM", match[1])])
        elif current is not None and line.strip() and not line.startswith("#"):
            instruction, _, rest = line.strip().partition(" ")
            current.append((instruction, rest))
    return found


def test_both_targets_end_as_another_user_than_root():
    for target in ("cpu", "cuda"):
        users = [rest for instruction, rest in stages()[target] if instruction == "USER"]
        assert users[-1] == "10001:10001"


def test_what_is_copied_is_there_and_in_the_context():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    copied = [
        source
        for instructions in stages().values()
        for instruction, rest in instructions
        if instruction == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    ]
    assert set(copied) == allowed
    assert all((ROOT / source).exists() for source in copied)


def test_settings_are_fields_of_the_service():
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    names = set(re.findall(r"\bSACCADE_(?!TARGET)[A-Z_]+", TEXT))
    names |= set(compose["services"]["saccade"]["environment"])
    assert names
    assert {name.removeprefix("SACCADE_").lower() for name in names} <= set(
        ServiceConfig.model_fields
    )


def test_the_composition_mounts_and_scrapes_what_is_there():
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    services = compose["services"]
    build = services["saccade"]["build"]
    assert (DOCKER / build["context"] / build["dockerfile"]).exists()
    for service in services.values():
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            exists = (DOCKER / source).exists() if source.startswith(".") else None
            assert exists or source in compose["volumes"]
        # Reached from this machine alone.
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    scraped = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    (target,) = scraped["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target.split(":")[0] in services
