"""Processes that the tier starts and ends, and the files that they are given."""

import atexit
import base64
import collections.abc
import dataclasses
import datetime
import hashlib
import ipaddress
import json
import os
import pathlib
import signal
import socket
import subprocess
import time

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

HERE = pathlib.Path(__file__).resolve().parent.parent
CACHE = pathlib.Path(os.environ["COUNTERSIGN_REAL_CACHE"])
NODE = CACHE / "node" / "bin" / "node"
PYTHON = CACHE / "venv" / "bin" / "python"
AGENT = pathlib.Path(os.environ["COUNTERSIGN_BINARY"])
HOLDERS: list[socket.socket] = []


class Process:
    """A process of the tier's own, in a process group of its own, with its output in files."""

    def __init__(self, name: str, command: list, directory: pathlib.Path, environment: dict | None = None) -> None:
        self.name = name
        self.output = directory / f"{name}.out"
        self.errors = directory / f"{name}.err"
        with self.output.open("wb") as output, self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                start_new_session=True,
            )
        # A run that is interrupted ends what it started too.
        atexit.register(self.stop)

    def events(self) -> list[dict]:
        """The JSON lines printed so far; a line that is still being written is left out."""
        whole = self.output.read_text(errors="replace").rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines() if line.startswith("{")]

    def ready(self, seconds: float = 30) -> dict:
        """Waits for the first event, which says where the process listens."""
        return self.until(lambda: next(iter(self.events()), None), seconds)

    def until(self, condition: collections.abc.Callable, seconds: float):
        """Waits until the condition gives something, and gives that; a process that ends before is a failure."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            if self.process.poll() is not None:
                raise AssertionError(f"{self.name} ended with {self.process.returncode}: {self.tail()}")
            if time.monotonic() > deadline:
                raise AssertionError(f"{self.name} did not come to it within {seconds} s: {self.tail()}")
            time.sleep(0.05)
        return found

    def tail(self) -> str:
        return (self.output.read_text(errors="replace") + self.errors.read_text(errors="replace"))[-3000:]

    def stop(self) -> None:
        """Ends the process and what it started: they are alone in the group that was made for them."""
        atexit.unregister(self.stop)
        for stop_signal, seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
            try:
                os.killpg(self.process.pid, stop_signal)
            except ProcessLookupError:
                pass
            try:
                self.process.wait(seconds)
                break
            except subprocess.TimeoutExpired:
                continue
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def node_server(
    name: str, script: str, directory: pathlib.Path, settings: dict, environment: dict | None = None, by: tuple | list = ()
) -> Process:
    """Starts one of the tier's Node servers with its settings in a file, `by` a command that runs another."""
    file = directory / f"{name}.json"
    file.write_text(json.dumps(settings))
    return Process(name, [*by, NODE, CACHE / "servers" / script, file], directory, environment)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody else is given: it is held without listening, so that whoever names it may listen."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    HOLDERS.append(holder)
    return holder.getsockname()[1]


@dataclasses.dataclass
class Certificates:
    """A certificate authority of the tier's own and one server certificate for all its servers."""

    authority_file: pathlib.Path
    certificate_file: pathlib.Path
    key_file: pathlib.Path

    @classmethod
    def make(cls, directory: pathlib.Path, names: list[str]) -> "Certificates":
        now = datetime.datetime.now(datetime.timezone.utc)
        hour = datetime.timedelta(hours=1)

        def builder(subject: str, issuer: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
            name = lambda text: x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])
            return (
                x509.CertificateBuilder()
                .subject_name(name(subject))
                .issuer_name(name(issuer))
                .public_key(key.public_key())
                .serial_number(x509.random_serial_number())
                .not_valid_before(now - hour)
                .not_valid_after(now + 24 * hour)
            )

        authority_key = ec.generate_private_key(ec.SECP256R1())
        authority = (
            builder("countersign tier CA", "countersign tier CA", authority_key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key()), critical=False)
            .sign(authority_key, hashes.SHA256())
        )
        key = ec.generate_private_key(ec.SECP256R1())
        alternatives = [x509.DNSName(name) for name in names] + [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        certificate = (
            builder(names[0], "countersign tier CA", key)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
            .sign(authority_key, hashes.SHA256())
        )
        made = cls(directory / "tier-ca.pem", directory / "server.pem", directory / "server-key.pem")
        made.authority_file.write_bytes(authority.public_bytes(serialization.Encoding.PEM))
        made.certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        write_key(made.key_file, key)
        return made

    def of_server(self) -> dict:
        return {"certificate_file": str(self.certificate_file), "key_file": str(self.key_file)}


def write_key(file: pathlib.Path, key: ec.EllipticCurvePrivateKey) -> None:
    """Writes a private key as PKCS#8 PEM that its owner alone can read."""
    file.touch(mode=0o600)
    file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def client_key(file: pathlib.Path) -> dict:
    """Makes an agent's ES256 key in `file` and gives its public JWKS, worked out without the agent (RFC 7518, RFC 7638)."""
    key = ec.generate_private_key(ec.SECP256R1())
    write_key(file, key)
    point = key.public_key().public_numbers()
    text = lambda data: base64.urlsafe_b64encode(data).rstrip(b"=").decode()
    required = {"crv": "P-256", "kty": "EC", "x": text(point.x.to_bytes(32, "big")), "y": text(point.y.to_bytes(32, "big"))}
    thumbprint = hashlib.sha256(json.dumps(required, separators=(",", ":"), sort_keys=True).encode()).digest()
    return {"keys": [{**required, "kid": text(thumbprint), "alg": "ES256", "use": "sig"}]}
