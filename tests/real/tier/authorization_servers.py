"""The two authorization servers of the tier, each with what its own log says of the tokens it issued."""

import collections.abc
import json
import pathlib
import re
import shutil
import ssl
import string
import urllib.error
import urllib.request

from .processes import CACHE, HERE, Certificates, Process, free_port, node_server

AUDIENCE = "https://orders.example.test"
SCOPE = "orders.read"
NODE_CLIENT = "node-agent"


class OidcProvider:
    """npm `oidc-provider`: FAPI 2.0 profile, ES256, resource indicators."""

    def __init__(
        self, directory: pathlib.Path, certificates: Certificates, jwks: dict, audiences: collections.abc.Sequence[str] = (AUDIENCE,)
    ) -> None:
        settings = {
            **certificates.of_server(),
            "clients": [{"client_id": NODE_CLIENT, "jwks": jwks, "scope": SCOPE}],
            "resources": list(audiences),
            "scope": SCOPE,
            "access_token_lifetime": 60,
        }
        self.process = node_server("oidc-provider", "oidc-provider/server.mjs", directory, settings)
        self.issuer = self.process.ready()["issuer"]
        self.jwks_uri = f"{self.issuer}/jwks"

    def issued(self) -> dict[str, str]:
        """The `jti` of each token that the server's log names, and the client it was issued to."""
        return {event["jti"]: event["client_id"] for event in self.process.events() if event["event"] == "issued"}

    def refusals(self) -> list[str]:
        return [f"{event['error']}: {event['detail']}" for event in self.process.events() if event["event"] == "refused"]

    def stop(self) -> None:
        self.process.stop()


class Keycloak:
    """Keycloak with the realm of `keycloak/realm.json`, events logged with the ids of tokens."""

    HOME = CACHE / "keycloak"

    def __init__(
        self, directory: pathlib.Path, certificates: Certificates, jwks: dict, ci_issuer: str, workload_client: str, workload_subject: str
    ) -> None:
        values = {
            "audience": AUDIENCE,
            "ci_issuer": ci_issuer,
            "agent_jwks": json.dumps(jwks),
            "workload_client": workload_client,
            "workload_subject": workload_subject,
        }
        realm = string.Template((HERE / "keycloak" / "realm.json").read_text())
        imports = self.HOME / "data" / "import"
        shutil.rmtree(imports, ignore_errors=True)
        imports.mkdir(parents=True)
        (imports / "countersign-realm.json").write_text(
            realm.substitute({name: json.dumps(value)[1:-1] for name, value in values.items()})
        )
        port = free_port()
        self.issuer = f"https://localhost:{port}/realms/countersign"
        self.jwks_uri = f"{self.issuer}/protocol/openid-connect/certs"
        self.process = Process(
            "keycloak",
            [
                self.HOME / "bin" / "kc.sh",
                "start",
                "--optimized",
                "--hostname-strict=false",
                "--http-host=127.0.0.1",
                f"--https-port={port}",
                f"--https-certificate-file={certificates.certificate_file}",
                f"--https-certificate-key-file={certificates.key_file}",
                f"--truststore-paths={certificates.authority_file}",
                f"--http-management-port={free_port()}",
                "--log-level=info,org.keycloak.events:debug",
                "--import-realm",
            ],
            directory,
            {"JAVA_OPTS_KC_HEAP": "-Xms64m -Xmx384m", "JAVA_OPTS_APPEND": "-XX:TieredStopAtLevel=1"},
        )
        trusted = ssl.create_default_context(cafile=certificates.authority_file)
        # The realm's own URL: the server listens, and says so, before the import of the realm has ended.
        self.process.until(lambda: answers(f"{self.issuer}/.well-known/openid-configuration", trusted), 240)

    def events(self) -> list[dict[str, str]]:
        lines = self.process.output.read_text(errors="replace").splitlines()
        return [dict(re.findall(r'(\w+)="([^"]*)"', line)) for line in lines if "org.keycloak.events" in line]

    def issued(self) -> dict[str, str]:
        """The `jti` of each token that the server's log names, and the client it was issued to."""
        return {event["token_id"]: event["clientId"] for event in self.logins()}

    def subjects(self) -> dict[str, str]:
        """The `jti` of each token, and the `sub` of the assertion that it was issued for."""
        return {event["token_id"]: event.get("client_assertion_sub", "") for event in self.logins()}

    def logins(self) -> list[dict[str, str]]:
        return [event for event in self.events() if event.get("type") == "CLIENT_LOGIN"]

    def refusals(self) -> list[str]:
        return [event.get("error", "") for event in self.events() if event.get("type") == "CLIENT_LOGIN_ERROR"]

    def stop(self) -> None:
        self.process.stop()
        shutil.rmtree(self.HOME / "data" / "import", ignore_errors=True)


def answers(url: str, trusted: ssl.SSLContext) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5, context=trusted) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False
