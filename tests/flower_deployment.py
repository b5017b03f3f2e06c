"""A Flower server and its nodes as processes of this machine, started as docs/flower.md says.

Older versions of Flower have a port for each of a server's interfaces; in the oldest, the app names the server.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import ipaddress
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

APP = Path(__file__).parents[1] / "examples" / "flower_digits"
_SCRIPTS = Path(sys.executable).parent

# Else newer versions install what the app depends on when it runs, in an environment of the run's own.
NO_INSTALLATION = "--disable-runtime-dependency-installation"

Config = Mapping[str, str | float | bool]


class Certificates(NamedTuple):
    """Files in PEM: the authority's certificate, and the server's with its key."""

    authority: Path
    server: Path
    key: Path


def make_certificates(folder: Path) -> Certificates:
    """An authority of our own, and a server at 127.0.0.1 that it vouches for."""
    authority_key, server_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority = _certificate("authority", authority_key, "authority", authority_key, is_authority=True)
    server = _certificate("server", server_key, "authority", authority_key, is_authority=False)
    files = Certificates(folder / "authority.pem", folder / "server.pem", folder / "server.key")
    files.authority.write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    files.server.write_bytes(server.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8
    files.key.write_bytes(server_key.private_bytes(serialization.Encoding.PEM, form, plain))
    return files


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: str,
    issuer_key: ec.EllipticCurvePrivateKey,
    *,
    is_authority: bool,
) -> x509.Certificate:
    def named(common: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])

    now = datetime.datetime.now(datetime.timezone.utc)
    addresses = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]
    builder = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(addresses), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    return builder.sign(issuer_key, hashes.SHA256())


class Deployment:
    """A SuperLink and its SuperNodes, or one that simulates them; all end with the `with` block."""

    def __init__(
        self, folder: Path, nodes: int = 2, *, certificates: Certificates | None = None, simulation: bool = False
    ) -> None:
        self.folder, self.certificates, self.simulation = folder, certificates, simulation
        self.has_one_port = "--port" in options_of("flower-superlink")
        self.app_names_server = importlib.util.find_spec("flwr.cli.flower_config") is None
        self.port, self.fleet_port, self.app_port, *self.node_ports = _free_ports(3 + nodes)
        self.app = self._app_that_names_the_server() if self.app_names_server else APP
        self.environment = {**os.environ, "FLWR_HOME": str(folder), "FLWR_TELEMETRY_ENABLED": "0"}
        self.environment["PATH"] = f"{_SCRIPTS}{os.pathsep}{os.environ['PATH']}"
        self.processes: list[subprocess.Popen[bytes]] = []
        folder.joinpath("config.toml").write_text(
            f'[superlink]\ndefault = "test"\n\n[superlink.test]\n{self._server()}'
        )

    def __enter__(self) -> Deployment:
        link = ["flower-superlink", *self._link_ports()]
        if NO_INSTALLATION in options_of("flower-superlink"):
            link += [NO_INSTALLATION]
        link += ["--simulation"] if self.simulation else []
        self._start("link", [*link, *self._link_security()])
        self._wait_for(self.port)
        if not self.simulation:
            for index, port in enumerate(self.node_ports):
                share = f"partition-id={index} num-partitions={len(self.node_ports)}"
                node = ["flower-supernode", *self._node_ports(port), "--node-config", share]
                self._start(f"node{index}", [*node, *self._node_security()])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in self.processes:
                self._signal(process, number)
            end = time.monotonic() + 10
            while any(process.poll() is None for process in self.processes) and time.monotonic() < end:
                time.sleep(0.05)

    def run(self, *configs: Config) -> list[dict[str, np.ndarray]]:
        """Runs the app to its end, once for each configuration and all at once; returns the final models."""
        outputs = [self.folder / f"model-{time.monotonic_ns()}-{index}.npz" for index in range(len(configs))]
        apps = [self.begin({**config, "output": str(output)}) for config, output in zip(configs, outputs, strict=True)]
        for app in apps:
            self.finish(app)
        return [load_model(output) for output in outputs]

    def begin(self, config: Config) -> subprocess.Popen[str]:
        """Starts the app and returns at once."""
        settings = " ".join(f"{name.replace('_', '-')}={_toml(value)}" for name, value in config.items())
        command = [str(_SCRIPTS / "flwr"), "run", str(self.app), "test", "--stream", "--run-config", settings]
        if self.simulation and not self.app_names_server:
            command += ["--federation-config", f"num-supernodes={len(self.node_ports)}"]
        return subprocess.Popen(
            command, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def finish(self, app: subprocess.Popen[str], timeout: float = 180) -> str:
        """Waits for the end of an app; returns its log."""
        log, _ = app.communicate(timeout=timeout)
        assert app.returncode == 0, f"{log}\n{self.logs()}"
        assert "Strategy execution finished" in log, f"{log}\n{self.logs()}"
        return log

    def kill_node(self, index: int) -> None:
        """Kills a node and the processes that it has started, as a machine that loses its power."""
        os.killpg(self.processes[1 + index].pid, signal.SIGKILL)

    def logs(self) -> str:
        """What the servers wrote."""
        return "\n".join(f"== {path.name}\n{path.read_text()[-4000:]}" for path in self.folder.glob("*.log"))

    def _app_that_names_the_server(self) -> Path:
        app = Path(shutil.copytree(APP, self.folder / "app"))
        nodes = f"options.num-supernodes = {len(self.node_ports)}\n" if self.simulation else ""
        with open(app / "pyproject.toml", "a") as settings:
            settings.write(f'\n[tool.flwr.federations]\ndefault = "test"\n\n[tool.flwr.federations.test]\n{nodes}')
            settings.write(self._server())
        return app

    def _server(self) -> str:
        security = f'root-certificates = "{self.certificates.authority}"' if self.certificates else "insecure = true"
        return f'address = "127.0.0.1:{self.port}"\n{security}\n'

    def _link_ports(self) -> list[str]:
        if self.has_one_port:
            return ["--port", str(self.port)]
        has_two_kinds = "--simulationio-api-address" in options_of("flower-superlink")
        kind = "simulationio" if self.simulation and has_two_kinds else "serverappio"
        ports = {"control": self.port, "fleet": self.fleet_port, kind: self.app_port}
        return [part for name, port in ports.items() for part in (f"--{name}-api-address", f"127.0.0.1:{port}")]

    def _node_ports(self, port: int) -> list[str]:
        if self.has_one_port:
            return ["--superlink", f"127.0.0.1:{self.port}", "--port", str(port)]
        return ["--superlink", f"127.0.0.1:{self.fleet_port}", "--clientappio-api-address", f"127.0.0.1:{port}"]

    def _link_security(self) -> list[str]:
        if self.certificates is None:
            return ["--insecure"]
        authority, server, key = map(str, self.certificates)
        return ["--ssl-ca-certfile", authority, "--ssl-certfile", server, "--ssl-keyfile", key]

    def _node_security(self) -> list[str]:
        if self.certificates is None:
            return ["--insecure"]
        root = ["--root-certificates", str(self.certificates.authority)]
        return [*root, *self._link_security()] if self.has_one_port else root

    def _start(self, name: str, command: list[str]) -> None:
        with open(self.folder / f"{name}.log", "wb") as log:
            program = [str(_SCRIPTS / command[0]), *command[1:]]
            self.processes.append(
                subprocess.Popen(program, env=self.environment, stdout=log, stderr=log, start_new_session=True)
            )

    def _wait_for(self, port: int) -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.1)
        raise TimeoutError(f"nothing listens on port {port}\n{self.logs()}")

    @staticmethod
    def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
        """Signals a process and all that it has started: each has a session of its own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)


@cache
def options_of(program: str) -> str:
    """What a program of Flower says of its options."""
    return subprocess.run([str(_SCRIPTS / program), "--help"], capture_output=True, text=True, check=True).stdout


def load_model(path: Path) -> dict[str, np.ndarray]:
    """The model that an app has written."""
    with np.load(path) as model:
        return dict(model)


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _toml(value: str | float | bool) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()
