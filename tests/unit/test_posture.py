"""What the Compose files and images allow is as SECURITY.md says. tests/compose asks running
containers the same."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

FILES = ("docker-compose.yml", "docker-compose.gpu.yml", "docker-compose.tls.yml")
SERVICES = yaml.safe_load((ROOT / FILES[0]).read_text())["services"]
NETWORKS = yaml.safe_load((ROOT / FILES[0]).read_text())["networks"]
OWN_USER = {"redis": "redis", "nginx": "101:101"}
UNPRIVILEGED_IMAGES = {"prometheus", "grafana"}  # their Dockerfiles name a user that is not root
OUTWARD = {"public", "internet"}


def overlays() -> dict[str, Any]:
    """Service by service, what the added files change."""
    return {
        f"{name} {service}": changes
        for name in FILES[1:]
        for service, changes in yaml.safe_load((ROOT / name).read_text())["services"].items()
    }


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_gives_up_what_it_does_not_need(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "cap_add" not in service
    assert "mem_limit" in service


@pytest.mark.parametrize("name", SERVICES)
def test_no_container_runs_as_root(name):
    """By its own `user`, or by the image that it is built from."""
    build = SERVICES[name].get("build")
    if build is None:
        assert SERVICES[name].get("user") == OWN_USER.get(name)
        assert name in OWN_USER or name in UNPRIVILEGED_IMAGES
        return
    text = (ROOT / build["dockerfile"]).read_text()
    stages = re.split(r"^FROM .* AS (\w[\w-]*)$", text, flags=re.MULTILINE | re.IGNORECASE)
    bodies = dict(zip(stages[1::2], stages[2::2], strict=True))
    users = re.findall(r"^USER (\S+)$", bodies[build["target"]] or text, re.MULTILINE)
    inherited = re.findall(r"^USER (\S+)$", text, re.MULTILINE)
    assert (users or inherited)[-1] == "10001:10001"


@pytest.mark.parametrize("what", [*SERVICES, *overlays()])
def test_nothing_of_the_host_is_given_away(what):
    service = {**SERVICES, **overlays()}[what]
    # NVIDIA's exporter, an option of its own, reads the GPU's counters: SECURITY.md.
    allowed = {"cap_add": ["SYS_ADMIN"]} if what.endswith(" dcgm-exporter") else {}
    for key in ("privileged", "network_mode", "pid", "ipc", "userns_mode", "cap_add", "devices"):
        assert service.get(key) == allowed.get(key), key
    for volume in service.get("volumes", []):
        source, mode = volume.partition(":")[0], volume.rpartition(":")[2]
        assert "docker.sock" not in volume
        if source.startswith((".", "/", "$")):
            assert mode == "ro", volume


def test_only_nginx_is_published_to_the_network():
    published = {name: each["ports"] for name, each in SERVICES.items() if each.get("ports")}
    assert set(published) == {"nginx", "flower", "prometheus", "grafana"}
    assert published.pop("nginx") == ["${HTTP_PORT:-80}:80"]
    for name, ports in published.items():
        assert all(port.startswith("127.0.0.1:") for port in ports), name
    added = {what: each["ports"] for what, each in overlays().items() if "ports" in each}
    assert all(what.endswith(" nginx") for what in added)


def test_networks_lead_out_only_where_they_must():
    assert {name for name, each in NETWORKS.items() if not (each or {}).get("internal")} == OUTWARD
    on = {name: set(each["networks"]) for name, each in SERVICES.items()}
    assert on["redis"] == {"store"}, "what holds the transcripts reaches nobody"
    assert on["api"] & OUTWARD == {"internet"}, "for webhooks and url=, checked by api/egress.py"
    assert {name for name, found in on.items() if "store" in found} == {
        "redis",
        "api",
        "worker",
        "flower",
    }
    assert {name for name, found in on.items() if "internet" in found} == {"worker", "api"}


def test_images_and_packages_have_fixed_versions():
    """Image tags name a version; Python packages come from locks with hashes."""
    images = [each["image"] for each in SERVICES.values() if "build" not in each]
    for dockerfile in ROOT.glob("Dockerfile.*"):
        text = dockerfile.read_text()
        stages = set(re.findall(r"^FROM \S+ AS (\S+)", text, re.MULTILINE | re.IGNORECASE))
        images += [
            image
            for image in re.findall(r"^FROM (?:--\S+ )?(\S+)", text, re.MULTILINE)
            if image not in stages and "$" not in image
        ]
        for line in re.findall(r"pip install.*", text):
            assert "--require-hashes" in line, line
    assert len(images) >= 4
    for image in images:
        assert re.search(r":v?\d", image), image
    for lock in (ROOT / "requirements").glob("*.txt"):
        pins = re.findall(r"^[a-z0-9][^ ]*==[^ ]+", lock.read_text(), re.MULTILINE)
        hashed = re.findall(
            r"^[a-z0-9][^\n]*\\\n    --hash=sha256:", lock.read_text(), re.MULTILINE
        )
        assert len(pins) == len(hashed) > 0, lock.name
