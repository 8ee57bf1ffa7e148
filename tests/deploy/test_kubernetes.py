"""The manifests for Kubernetes, as far as they can be checked without a cluster: their schemas, what they name in each
other and in the server, and the pod's own command, run with its configuration.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import numpy as np
import pytest
import yaml

from streaming.audio import FRAME
from streaming.client.client import Audio, ContinuationClient
from streaming.protocol.messages import SessionStart, TurnDone
from streaming.server.command import parse
from streaming.server.door.session_key import ENVIRONMENT as KEY_VARIABLE
from streaming.server.native.session import _LAST_REPLY_S, _PUT_DOWN_S
from streaming.server.watch.health import LIVE, READY
from streaming.server.watch.metrics import METRICS
from tests.deploy.test_image import environment, instructions
from tests.server.live_server import run

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
OVERLAYS = ("cpu-demo", "gpu")
KUBECTL = shutil.which("kubectl")
NAME = "app.kubernetes.io/name"
ANN, READER = "ann-0123456789abcdef", "reader-0123456789abcdef"
Manifest = dict[str, Any]


def read(path: Path) -> list[Manifest]:
    return [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document]


def manifests() -> Iterator[tuple[Path, Manifest]]:
    """Everything that a cluster is given, by file; an overlay's patch is a part of what it patches."""
    for path in sorted(FOLDER.rglob("*.yaml")):
        for document in read(path):
            if "apiVersion" in document:
                yield path, document


def one(kind: str) -> Manifest:
    return next(document for path, document in manifests() if document["kind"] == kind and "overlays" not in path.parts)


def containers(overlay: str | None) -> dict[str, Any]:
    """The server's container; of an overlay, with what that adds to it."""
    (base,) = one("Deployment")["spec"]["template"]["spec"]["containers"]
    if overlay is None:
        return dict(base)
    container = dict(base)
    for path in patches(overlay):
        (patch,) = read(path)
        (added,) = patch["spec"]["template"]["spec"]["containers"]
        assert added["name"] == base["name"]
        container |= {key: container.get(key, []) + value for key, value in added.items() if isinstance(value, list)}
    return container


def patches(overlay: str) -> list[Path]:
    """What an overlay changes of the deployment: its own file, and those of its components."""
    folder = FOLDER / "overlays" / overlay
    (kustomization,) = read(folder / "kustomization.yaml")
    folders = [folder, *((folder / component).resolve() for component in kustomization.get("components", []))]
    return [place / "deployment.yaml" for place in folders if (place / "deployment.yaml").exists()]


def variables(overlay: str | None) -> dict[str, str]:
    """Those that are not of a Secret."""
    return {each["name"]: each["value"] for each in containers(overlay).get("env", []) if "value" in each}


def built(overlay: str) -> list[Manifest]:
    assert KUBECTL is not None
    command = [KUBECTL, "kustomize", str(FOLDER / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def test_kustomizations_name_what_is_there_and_leave_nothing_out() -> None:
    """A file that no kustomization names is in no cluster."""
    named: set[Path] = set()
    for path in FOLDER.rglob("kustomization.yaml"):
        (kustomization,) = read(path)
        entries = kustomization.get("resources", []) + kustomization.get("components", [])
        entries += [patch["path"] for patch in kustomization.get("patches", [])]
        entries += [file for generator in kustomization.get("configMapGenerator", []) for file in generator["files"]]
        for entry in entries:
            target = (path.parent / entry).resolve()
            assert target.exists(), f"{path}: {entry}"
            named.add(target)
    files = {path for path in FOLDER.rglob("*") if path.is_file() and path.name != "kustomization.yaml"}
    assert {path.name for path in files - named} == {"prometheus-adapter.yaml"}, "that one is another chart's values"


@pytest.mark.skipif(KUBECTL is None, reason="no kubectl to put the overlays together with")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_one_that_kubernetes_takes(overlay: str) -> None:
    """Kubernetes' own kinds are checked by their schemas; those of other projects are not on PyPI."""
    validate = pytest.importorskip("kubernetes_validate", reason="PyPI has kubernetes-validate, of 100 MB")
    for document in built(overlay):
        assert document["metadata"]["namespace"] == "streaming"
        if document["apiVersion"].partition("/")[0] in ("gateway.networking.k8s.io", "gateway.envoyproxy.io"):
            continue
        if document["apiVersion"].startswith("monitoring.coreos.com"):
            continue
        validate.validate(document, validate.latest_version(), strict=True)


@pytest.mark.skipif(KUBECTL is None, reason="no kubectl to put the overlays together with")
def test_what_is_put_together_is_what_was_meant() -> None:
    """A patch of a name that is none adds nothing, and kustomize says nothing."""
    for overlay in OVERLAYS:
        documents = built(overlay)
        pod = next(d for d in documents if d["kind"] == "Deployment")["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        (config,) = [d for d in documents if d["kind"] == "ConfigMap"]
        assert {"name": config["metadata"]["name"]} in [volume.get("configMap") for volume in pod["volumes"]]
        assert container["image"].startswith("registry.example/streaming:")
        assert {v["name"]: v["value"] for v in container.get("env", []) if "value" in v} == variables(overlay)
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (overlay == "gpu")
        if overlay == "gpu":
            limits = container["resources"]["limits"]
            assert limits["nvidia.com/gpu"] == container["resources"]["requests"]["nvidia.com/gpu"] == 1
            jobs = [d for d in documents if d["kind"] == "Job"]
            assert all(job["spec"]["template"]["spec"]["containers"][0]["image"] == container["image"] for job in jobs)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_option_is_one_of_the_servers(overlay: str) -> None:
    """A key that the server does not know ends every pod at its start; such a variable does nothing."""
    config = FOLDER / "base" / "server.toml"
    options = parse(["--config", str(config)], {})
    for key, value in tomllib.loads(config.read_text(encoding="utf-8")).items():
        assert getattr(options, key.replace("-", "_")) == value, key
    options = parse(["--config", str(config)], environment() | variables(overlay))
    ours = {name: value for name, value in variables(overlay).items() if name.startswith("STREAMING_")}
    for name, value in ours.items():
        key = name.removeprefix("STREAMING_").lower()
        found = getattr(options, key)
        assert found == type(found)(value), f"{name} is no option's variable"
    assert options.insecure_plaintext and options.tokens and options.queue > 0
    assert (options.resume_seconds > 0) == bool(options.session_store), "who comes back reaches another pod"


def test_ports_probes_and_selectors_agree() -> None:
    deployment, container = one("Deployment")["spec"], containers(None)
    (port,) = container["ports"]
    assert str(port["containerPort"]) == environment()["STREAMING_PORT"] == dict(instructions())["EXPOSE"]
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": LIVE,  # a pod that loads is not one that has failed
        "liveness": LIVE,  # nor is one that is full: to restart it would end everybody's conversation
        "readiness": READY,
    }
    assert {probe["port"] for probe in probes.values()} == {port["name"]}
    service, monitor = one("Service")["spec"], one("PodMonitor")["spec"]
    (exposed,) = service["ports"]
    assert exposed["targetPort"] == monitor["podMetricsEndpoints"][0]["port"] == port["name"]
    assert monitor["podMetricsEndpoints"][0]["path"] == METRICS
    (allowed,) = one("NetworkPolicy")["spec"]["ingress"]
    assert allowed["ports"] == [{"port": port["name"]}]
    labels = deployment["template"]["metadata"]["labels"]
    assert labels == {NAME: "streaming"} == service["selector"]
    for selector in (
        deployment["selector"],
        monitor["selector"],
        one("NetworkPolicy")["spec"]["podSelector"],
        one("PodDisruptionBudget")["spec"]["selector"],  # without one it protects nothing, and is valid
        deployment["template"]["spec"]["topologySpreadConstraints"][0]["labelSelector"],
    ):
        assert selector == {"matchLabels": labels}
    route = one("HTTPRoute")["spec"]
    assert route["rules"][0]["backendRefs"] == [{"name": "streaming", "port": exposed["port"]}]
    gateway = one("Gateway")
    (parent,) = route["parentRefs"]
    (listener,) = gateway["spec"]["listeners"]
    assert (parent["name"], parent["sectionName"]) == (gateway["metadata"]["name"], listener["name"])
    assert route["hostnames"] == [listener["hostname"]]
    (target,) = one("BackendTrafficPolicy")["spec"]["targetRefs"]
    assert (target["kind"], target["name"]) == ("HTTPRoute", one("HTTPRoute")["metadata"]["name"])
    scaled = one("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (scaled["kind"], scaled["name"]) == ("Deployment", one("Deployment")["metadata"]["name"])


def test_a_pod_that_is_told_to_go_has_the_time_that_it_takes() -> None:
    """Kubernetes kills what has not ended in its grace period, and its preStop hook counts."""
    pod, container = one("Deployment")["spec"]["template"]["spec"], containers(None)
    options = parse(["--config", str(FOLDER / "base" / "server.toml")], {})
    pause_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= pause_s + options.drain_seconds + 10
    readiness = container["readinessProbe"]
    assert pause_s > readiness["periodSeconds"] * readiness["failureThreshold"]


def test_pods_share_what_sessions_are_handed_over_in() -> None:
    """A store of each pod's own, or without the key of the others, is none; nor is one that the image cannot reach."""
    container = containers("gpu")
    (patch,) = read(FOLDER / "components" / "sessions" / "deployment.yaml")
    (claim,) = read(FOLDER / "components" / "sessions" / "volume.yaml")
    (volume,) = patch["spec"]["template"]["spec"]["volumes"]
    assert volume["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    (mount,) = [each for each in container["volumeMounts"] if each["name"] == volume["name"]]
    assert mount["mountPath"] == variables("gpu")["STREAMING_SESSION_STORE"] and not mount.get("readOnly")
    (secret,) = [each["valueFrom"]["secretKeyRef"] for each in container["env"] if each["name"] == KEY_VARIABLE]
    tokens = next(each for each in one("Deployment")["spec"]["template"]["spec"]["volumes"] if each["name"] == "tokens")
    assert secret["name"] == tokens["secret"]["secretName"]
    page = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    assert f"--from-literal={secret['key']}=" in page
    assert any('".[store]"' in rest for name, rest in instructions() if name == "RUN")
    options = parse(["--config", str(FOLDER / "base" / "server.toml")], environment() | variables("gpu"))
    assert options.drain_seconds > _PUT_DOWN_S + _LAST_REPLY_S


def test_no_timeout_ends_a_conversation() -> None:
    """Envoy ends a request after 15 s unless told otherwise, and takes 1,024 at once."""
    policy = one("BackendTrafficPolicy")["spec"]
    assert policy["loadBalancer"] == {"type": "LeastRequest"}
    times = policy["timeout"]["http"]
    assert times["requestTimeout"] == times["maxStreamDuration"] == "0s"
    assert one("HTTPRoute")["spec"]["rules"][0]["timeouts"] == {"request": "0s"}
    assert int(times["streamIdleTimeout"].removesuffix("s")) > 2 * 10, "the server pings every 10 s"
    limits = policy["circuitBreaker"]
    assert min(limits["maxConnections"], limits["maxParallelRequests"]) >= 100_000


def test_secrets_and_mounts_are_where_the_server_looks() -> None:
    pod, container = one("Deployment")["spec"]["template"]["spec"], containers(None)
    assert container["args"][0] == "--config"
    config = tomllib.loads((FOLDER / "base" / "server.toml").read_text(encoding="utf-8"))
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(mounts) == set(volumes)
    (generator,) = read(FOLDER / "base" / "kustomization.yaml")[0]["configMapGenerator"]
    assert volumes["config"]["configMap"]["name"] == generator["name"]
    assert container["args"][1] == f"{mounts['config']['mountPath']}/{generator['files'][0]}"
    secret = volumes["tokens"]["secret"]
    assert [f"{mounts['tokens']['mountPath']}/{item['path']}" for item in secret["items"]] == [config["tokens"]]
    assert secret["defaultMode"] & 0o007 == 0, "the server warns of a file that everybody can read"
    told = one("PodMonitor")["spec"]["podMetricsEndpoints"][0]["authorization"]["credentials"]
    assert told["name"] == secret["secretName"] and told["key"] not in [item["key"] for item in secret["items"]]
    page = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    for key in (told["key"], *(item["key"] for item in secret["items"])):
        assert re.search(rf"--from-(file|literal)={key}=", page), f"the page does not make the secret's {key}"
    # A root that nothing can be written to: what the image writes has to be a volume's.
    assert container["securityContext"]["readOnlyRootFilesystem"]
    written = [value for name, value in environment().items() if name in ("HF_HOME", "XDG_CACHE_HOME")]
    places = [mount["mountPath"] for mount in mounts.values() if not mount.get("readOnly")]
    assert written and all(any(value.startswith(place) for place in places) for value in written)
    assert "/tmp" in places  # noqa: S108
    user = dict(instructions())["USER"].split(":")
    assert [str(pod["securityContext"][key]) for key in ("runAsUser", "runAsGroup")] == user


def test_the_autoscaler_asks_for_what_the_rule_makes_of_what_the_server_tells() -> None:
    (metric,) = one("HorizontalPodAutoscaler")["spec"]["metrics"]
    (rule,) = read(FOLDER / "components" / "autoscaling" / "prometheus-adapter.yaml")[0]["rules"]["custom"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    metrics = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    for name in re.findall(r"streaming_\w+(?=\{)", rule["metricsQuery"] + rule["seriesQuery"]):
        assert f"`{name}`" in metrics
    slots = int(variables("gpu")["STREAMING_MAX_SESSIONS"])
    assert 0.5 * slots <= int(metric["pods"]["target"]["averageValue"]) < slots


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX paths and signals")
def test_the_pods_command_runs_with_its_configuration(tmp_path: Path) -> None:
    """Everything a pod does, but in a cluster: a start with these files and variables, probes, a conversation with a
    token, figures with the other one, and SIGTERM in the middle of a turn.
    """
    entry = json.loads(dict(instructions())["ENTRYPOINT"])
    args = [argument.replace("/etc/streaming", str(tmp_path)) for argument in containers("cpu-demo")["args"]]
    config = (FOLDER / "base" / "server.toml").read_text(encoding="utf-8").replace("/etc/streaming", str(tmp_path))
    for folder, name, text in (
        ("config", "server.toml", config),
        ("tokens", "tokens", f"ann:{ANN}\nmetrics:{READER}\n"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
        (tmp_path / folder / name).chmod(0o440)
    env = environment() | variables("cpu-demo") | {"PATH": os.defpath, "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    env |= {"HF_HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    env |= {"STREAMING_DEVICE": "cpu"}  # the variables are of both images
    env |= {"STREAMING_HOST": "127.0.0.1", "STREAMING_PORT": "0"}  # of a test: no other machine's business
    process = subprocess.Popen(
        [sys.executable, *entry[1:], *args],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert entry[0] == "python" and process.stdout is not None
    try:
        said = process.stdout.readline()
        listening = re.search(r"ws://\S+", said)
        assert listening is not None, said + process.communicate()[1]
        url = listening[0]
        http = url.replace("ws://", "http://").removesuffix("/v1/continue")

        def status(path: str, token: str | None = None) -> int:
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            try:
                with urllib.request.urlopen(urllib.request.Request(http + path, headers=headers), timeout=10) as answer:  # noqa: S310
                    return int(answer.status)
            except HTTPError as error:
                return error.code

        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert status(containers("cpu-demo")[probe]["httpGet"]["path"]) == 200
        assert (status(METRICS, READER), status(METRICS, ANN), status(METRICS)) == (200, 401, 401)

        async def talk() -> tuple[TurnDone, int]:
            """What is told at the end of a turn, and how many samples came."""
            async with ContinuationClient.connect(url, SessionStart(max_seconds=1.0), token=ANN) as client:
                await client.send(np.zeros(4 * FRAME, np.int16))
                await client.speak()
                told, heard = False, 0
                async for event in client.events():
                    if not told:
                        process.send_signal(signal.SIGTERM)
                        told = True
                    if isinstance(event, Audio):
                        heard += len(event.pcm)
                    if isinstance(event, TurnDone):
                        return event, heard
            raise AssertionError("the turn was cut off")

        done, heard = run(talk())
        assert done.reason in ("max_seconds", "end")  # the demo ends some turns itself
        assert done.samples == heard
        started = time.monotonic()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0 and time.monotonic() - started < 30
    finally:
        process.kill()
        process.wait()
    events = [json.loads(line) for line in errors.splitlines()]
    assert [event["event"] for event in events if event["event"].startswith("server.")] == [
        "server.started",
        "server.stopping",
        "server.stopped",
    ]
    # Whether the machine is fast enough just now is no verdict.
    told = [event for event in events if event.get("logger") != "streaming.most_sessions"]
    warnings = [event["event"] for event in told if event["level"] != "info"]
    assert warnings == ["refused", "refused"], "those who asked for figures with no token, or another's"
