"""Keycloak: `private_key_jwt` with the agent's key, and `workload_assertion` with a CI job's own token and no key."""

import json
import os
import pathlib
import secrets
import ssl
import subprocess
import threading
import time
import urllib.request

from .agent import BRANCH, REPOSITORY, WORKLOAD_CLIENT, Agent, Client, Clients, Configuration
from .authorization_servers import Keycloak
from .cases import PLAIN_ORDERS, SECURE_ORDERS, Cases, Server
from .processes import AGENT, HERE, PYTHON, node_server

SUBJECT = f"repo:acme/orders:ref:{BRANCH}"
TOKEN_SECONDS = 15
REFRESH_SECONDS = 3
JOB_SECONDS = 40


class CiSystem:
    """A CI system: its issuer, and the file in which it keeps a job's token fresh."""

    def __init__(self, directory: pathlib.Path, certificates) -> None:
        self.mint_secret = secrets.token_hex()
        settings = {**certificates.of_server(), "mint_secret": self.mint_secret}
        self.process = node_server("ci-issuer", "issuer/server.mjs", directory, settings)
        self.issuer = self.process.ready()["issuer"]
        self.trusted = ssl.create_default_context(cafile=certificates.authority_file)
        self.minted = []

    def mint(self, audience: str, branch: str = BRANCH, lifetime: int = TOKEN_SECONDS) -> str:
        claims = {
            "sub": SUBJECT,
            "aud": audience,
            "repository": "acme/orders",
            "repository_id": REPOSITORY,
            "ref": branch,
            "job_workflow_ref": f"acme/orders/.github/workflows/test.yml@{branch}",
            "runner_environment": "self-hosted",
        }
        request = urllib.request.Request(
            f"{self.issuer}/mint",
            data=json.dumps({"claims": claims, "lifetime": lifetime}).encode(),
            headers={"x-mint-secret": self.mint_secret},
        )
        with urllib.request.urlopen(request, context=self.trusted, timeout=10) as response:
            token = json.load(response)["token"]
        self.minted.append(token)
        return token


class TokenFile:
    """A job's token in a file that is replaced before the token ends, as CI systems and kubelets do it."""

    def __init__(self, ci: CiSystem, file: pathlib.Path, audience: str, branch: str = BRANCH) -> None:
        self.ci, self.file, self.audience, self.branch = ci, file, audience, branch
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.refresh)

    def write(self) -> None:
        fresh = self.file.with_suffix(".new")
        fresh.write_text(self.ci.mint(self.audience, self.branch))
        fresh.replace(self.file)

    def refresh(self) -> None:
        while not self.stopped.wait(REFRESH_SECONDS):
            self.write()

    def __enter__(self) -> pathlib.Path:
        self.write()
        self.thread.start()
        return self.file

    def __exit__(self, *_error) -> None:
        self.stopped.set()
        self.thread.join()
        self.file.unlink()


class JobClients(Clients):
    """Clients as a CI job's commands, under `exec`: the environment that they were given goes to standard error first."""

    SHOW_AND_START = 'tr "\\0" "\\n" </proc/self/environ >&2; exec "$@"'

    def __init__(self, configuration: Configuration, ci: CiSystem, audience: str) -> None:
        self.ci, self.audience = ci, audience
        self.token_file = configuration.directory / "job.jwt"
        self.environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": str(configuration.directory)}
        self.exec = [AGENT, "exec", "--config", configuration.file, "--token-file", self.token_file, "--"]
        self.held = b""

    def run(self, *command) -> Client:
        # A fresh token for each: Keycloak takes an assertion once.
        self.token_file.write_text(self.ci.mint(self.audience, lifetime=60))
        client = super().run(*self.exec, "sh", "-c", self.SHOW_AND_START, "sh", *command)
        self.held += client.stderr.encode()
        return client


class KeycloakServer(Server):
    @classmethod
    def start_authorization_server(cls) -> Keycloak:
        cls.ci = CiSystem(cls.directory, cls.certificates)
        cls.addClassCleanup(cls.ci.process.stop)
        return Keycloak(cls.directory, cls.certificates, cls.jwks, cls.ci.issuer, WORKLOAD_CLIENT, SUBJECT)


class KeycloakTest(Cases, KeycloakServer):
    """The cases of every server, and those of a workload that presents its own token to an agent without a key."""

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.keyless = Configuration(cls.directory / "keyless", cls.surroundings, None, cls.ci.issuer)

    def token_file(self, branch: str = BRANCH) -> TokenFile:
        return TokenFile(self.ci, self.directory / f"{self.id()}.jwt", self.authorization_server.issuer, branch)

    def job(self, token_file: pathlib.Path, seconds: float) -> dict:
        """`exec` with an agent of its own, as on a CI runner, which has no daemon."""
        script = HERE / "clients" / "ci_job.py"
        command = [AGENT, "exec", "--config", self.keyless.file, "--token-file", token_file, "--", PYTHON, script]
        ended = subprocess.run(
            [*map(str, command), SECURE_ORDERS, str(seconds)],
            env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": str(self.directory)},
            capture_output=True,
            text=True,
            timeout=seconds + 120,
        )
        try:
            return json.loads(ended.stdout.strip().splitlines()[-1])
        except (ValueError, IndexError):
            raise AssertionError(f"exec ended with {ended.returncode}: {ended.stdout[-1000:]}{ended.stderr[-3000:]}") from None

    def assert_names_the_workload(self, jti: str) -> None:
        self.assert_issued(jti, WORKLOAD_CLIENT)
        self.assertEqual(self.authorization_server.subjects()[jti], SUBJECT)

    def test_a_token_in_the_proxys_url_is_the_assertion(self) -> None:
        """And a request on the same agent without one is asked for it."""
        agent = Agent(self.keyless)
        self.addCleanup(agent.stop)
        token = self.ci.mint(self.authorization_server.issuer, lifetime=60)
        presenting, bare = Clients(agent), Clients(agent)
        for name in ("http_proxy", "https_proxy"):
            presenting.environment[name] = f"http://token:{token}@127.0.0.1:{agent.relay_port}"
        for url in (SECURE_ORDERS, PLAIN_ORDERS):
            answer = presenting.curl("GET", url)
            self.assertEqual(answer["status"], 200, answer)
            seen = self.assert_injected(answer["body"], WORKLOAD_CLIENT)
            self.assertNotIn(token, seen["authorization"][0])
            self.assert_names_the_workload(answer["body"]["verified"]["jti"])
            self.seen_before = len(self.received())
            answer = bare.curl("GET", url)
            self.assertEqual(answer["status"], 407, answer)
            self.assert_refused(407, answer["body"], "proxy_token_required")
            self.assertIn("Bearer", answer["headers"]["proxy-authenticate"])

    def test_exec_carries_a_job_past_the_life_of_its_tokens(self) -> None:
        with self.token_file() as token_file:
            job = self.job(token_file, JOB_SECONDS)
        answers = job["answers"]
        self.assertEqual([answer["status"] for answer in answers], [200] * len(answers), answers[-1])
        self.assertGreater(len(answers), 10)
        self.assertGreaterEqual(answers[-1]["time"] - answers[0]["time"], 2 * TOKEN_SECONDS)
        tokens = {answer["body"]["verified"]["jti"] for answer in answers}
        self.assertGreater(len(tokens), 2)
        for jti in tokens:
            self.assert_names_the_workload(jti)
        self.assertFalse(any(answer["body"]["caller_authorization_arrived"] for answer in answers))
        for token in self.ci.minted:
            self.assertNotIn(token, job["environ"])
            self.assertNotIn(token, job["cmdline"])
        for seen in self.arrived():
            self.assertNotIn(seen["token"], self.ci.minted)

    def test_exec_serves_every_client(self) -> None:
        """Each under an agent of its own that has no key: the job's token is the assertion, and no client holds it."""
        clients = JobClients(self.keyless, self.ci, self.authorization_server.issuer)
        answers = [
            clients.curl("GET", SECURE_ORDERS, "--http1.1"),
            clients.curl("GET", SECURE_ORDERS, "--http2"),
            clients.curl("GET", PLAIN_ORDERS),
            clients.requests("GET", SECURE_ORDERS),
            clients.requests("GET", PLAIN_ORDERS),
            clients.fetch("GET", SECURE_ORDERS),
            clients.fetch("GET", PLAIN_ORDERS),
        ]
        self.assertEqual([answer["status"] for answer in answers], [200] * 7)
        bodies = [answer["body"] for answer in answers]
        for method, count in (("ListOrders", 1), ("WatchOrders", 3)):
            answer = clients.grpc(method)
            self.assertEqual((answer["status"], len(answer.get("messages", []))), ("OK", count), answer)
            bodies.append(answer["messages"][0])
        arrived = [seen["jti"] for seen in self.arrived()]
        self.assertEqual(arrived, [body["verified"]["jti"] for body in bodies])
        self.assertEqual(len(set(arrived)), len(bodies))
        for jti in arrived:
            self.assert_names_the_workload(jti)
        self.seen_before = len(self.received())
        self.assert_denied(clients.curl("DELETE", f"{SECURE_ORDERS}/7"))
        denied = clients.grpc("DeleteOrder")
        self.assertEqual(denied["status"], "PERMISSION_DENIED", denied)
        self.assertIn("policy_denied", denied["details"])
        self.assertEqual(self.arrived(), [])
        self.assertEqual(clients.curl("GET", SECURE_ORDERS)["status"], 200)
        self.assertIn(b"NODE_USE_ENV_PROXY=1", clients.held)
        for token in self.ci.minted + [seen["token"] for seen in self.received()]:
            self.assertNotIn(token.encode(), clients.held)

    def test_exec_is_denied_on_another_branch(self) -> None:
        with self.token_file("refs/heads/elsewhere") as token_file:
            (answer,) = self.job(token_file, 0)["answers"]
        self.assert_denied(answer)
        with self.token_file() as token_file:
            (answer,) = self.job(token_file, 0)["answers"]
        self.assertEqual(answer["status"], 200)

    def test_token_serves_a_script_past_the_life_of_its_tokens(self) -> None:
        agent = Agent(self.keyless)
        self.addCleanup(agent.stop)
        command = [AGENT, "token", "--agent", f"unix:{self.keyless.workload_api}", "--credential", "orders-api", "--token-file"]
        started = time.monotonic()
        tokens = set()
        with self.token_file() as token_file:
            while time.monotonic() - started < JOB_SECONDS:
                printed = subprocess.run([*map(str, command), token_file], capture_output=True, text=True, timeout=30)
                self.assertEqual(printed.returncode, 0, printed.stderr)
                token = printed.stdout.strip()
                tokens.add(token)
                body = self.call_without_agent(token)
                self.assert_names_the_workload(body["verified"]["jti"])
                time.sleep(REFRESH_SECONDS + 0.5)
        self.assertGreater(len(tokens), 2)
        self.assertNotIn("client.pem", self.keyless.file.read_text())

    def call_without_agent(self, token: str) -> dict:
        request = urllib.request.Request(
            f"https://localhost:{self.surroundings.api_https_port}/v1/orders", headers={"authorization": f"Bearer {token}"}
        )
        with urllib.request.urlopen(request, context=self.ci.trusted, timeout=10) as response:
            return json.load(response)

    def test_token_is_denied_on_another_branch(self) -> None:
        agent = Agent(self.keyless)
        self.addCleanup(agent.stop)
        command = [AGENT, "token", "--agent", f"unix:{self.keyless.workload_api}", "--credential", "orders-api", "--token-file"]
        with self.token_file("refs/heads/elsewhere") as token_file:
            denied = subprocess.run([*map(str, command), token_file], capture_output=True, text=True, timeout=30)
        self.assertEqual((denied.returncode, denied.stdout), (77, ""))
        self.assertIn("policy_denied", denied.stderr)
