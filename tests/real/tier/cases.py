"""What holds before every authorization server: the cases that the servers' modules inherit."""

import pathlib
import re
import secrets
import tempfile
import unittest

from .agent import PLAIN_HOST, SECURE_HOST, Agent, Clients, Configuration, Surroundings
from .authorization_servers import AUDIENCE, NODE_CLIENT
from .processes import AGENT, Certificates, Process, client_key, node_server

SECURE_ORDERS = f"https://{SECURE_HOST}/v1/orders"
PLAIN_ORDERS = f"http://{PLAIN_HOST}/v1/orders"


class Server(unittest.TestCase):
    """An authorization server, the API that trusts it, and an agent that holds a key registered there."""

    host_names = ["localhost", SECURE_HOST]

    @classmethod
    def start_authorization_server(cls):
        """Starts the server that the class is about, with `cls.jwks` as the agent's keys."""
        raise NotImplementedError

    @classmethod
    def setUpClass(cls) -> None:
        # Not in the clone: a Unix socket's path has at most 107 bytes, and nobody knows how deep the clone lies.
        directory = tempfile.TemporaryDirectory(prefix="countersign-real-", ignore_cleanup_errors=True)
        cls.addClassCleanup(directory.cleanup)
        cls.directory = pathlib.Path(directory.name)
        cls.certificates = Certificates.make(cls.directory, cls.host_names)
        cls.key_file = cls.directory / "client.pem"
        cls.jwks = client_key(cls.key_file)
        cls.authorization_server = cls.start_authorization_server()
        cls.addClassCleanup(cls.authorization_server.stop)
        cls.api = cls.start_origin("api", {"audience": AUDIENCE})
        ports = cls.api.ready()
        cls.surroundings = Surroundings(
            cls.certificates, cls.authorization_server.issuer, ports["http_port"], ports["https_port"]
        )
        cls.start_more_origins()
        cls.agent = cls.start_agent("agent", cls.key_file)
        cls.clients = cls.clients_of(cls.agent)

    @classmethod
    def start_origin(cls, name: str, settings: dict) -> Process:
        """Starts `NAME/server.mjs`, which demands tokens of the authorization server and says what it received."""
        settings = {
            **cls.certificates.of_server(),
            "issuer": cls.authorization_server.issuer,
            "jwks_uri": cls.authorization_server.jwks_uri,
            **settings,
        }
        trusted = {"NODE_EXTRA_CA_CERTS": str(cls.certificates.authority_file)}
        origin = node_server(name, f"{name}/server.mjs", cls.directory, settings, trusted)
        cls.addClassCleanup(origin.stop)
        return origin

    @classmethod
    def start_more_origins(cls) -> None:
        """Starts what the class needs beside the API."""

    @classmethod
    def configure_agent(cls, directory: pathlib.Path, key_file: pathlib.Path) -> Configuration:
        return Configuration(directory, cls.surroundings, key_file)

    @classmethod
    def clients_of(cls, agent: Agent) -> Clients:
        return Clients(agent)

    @classmethod
    def start_agent(cls, name: str, key_file: pathlib.Path) -> Agent:
        agent = Agent(cls.configure_agent(cls.directory / name, key_file))
        cls.addClassCleanup(agent.stop)
        return agent

    @classmethod
    def clients_of_a_swapped_key(cls) -> Clients:
        name = f"swapped-{secrets.token_hex(4)}"
        key_file = cls.directory / f"{name}.pem"
        client_key(key_file)
        return cls.clients_of(cls.start_agent(name, key_file))

    def setUp(self) -> None:
        self.seen_before = len(self.received())

    def received(self) -> list[dict]:
        """Every request that reached the API, whoever sent it and whatever became of it."""
        return [event for event in self.api.events() if event["event"] == "request"]

    def arrived(self) -> list[dict]:
        """What reached the API since the test began."""
        return self.received()[self.seen_before :]

    def assert_issued(self, jti: str, client: str) -> None:
        """The server's own log names the token, soon after it was issued at the latest, and the client."""
        server = self.authorization_server
        self.assertEqual(server.process.until(lambda: server.issued().get(jti), 30), client)

    def assert_injected(self, body: dict, client: str = NODE_CLIENT) -> dict:
        """The API verified a token, and the server's own log names it; gives what the API saw."""
        jti = body["verified"]["jti"]
        self.assert_issued(jti, client)
        seen = self.arrived()[-1]
        self.assertEqual(seen["jti"], jti)
        self.assertTrue(seen["verified"])
        self.assertEqual(len(seen["authorization"]), 1)
        self.assertNotIn("proxy-authorization", seen["header_names"])
        return seen

    def assert_refused(self, status: int, problem: dict, code: str) -> None:
        """A readable refusal, and the origin saw nothing of it."""
        self.assertEqual((status, problem["code"]), (problem["status"], code), problem)
        self.assertGreater(len(problem["detail"]), 20, problem)
        self.assertTrue(problem["request_id"], problem)
        self.assertEqual(self.arrived(), [])

    def assert_denied(self, answer: dict) -> None:
        self.assertEqual(answer["status"], 403)
        self.assert_refused(403, answer["body"], "policy_denied")
        self.assertIn("orders-api", answer["body"]["detail"])


class Cases:
    """The cases. A mixin, so that they run only with a server."""

    def test_curl_over_http(self) -> None:
        answer = self.clients.curl("GET", PLAIN_ORDERS)
        self.assertEqual(answer["status"], 200)
        self.assertEqual(self.assert_injected(answer["body"])["transport"], "http")

    def test_curl_over_https_with_http_1(self) -> None:
        answer = self.clients.curl("GET", SECURE_ORDERS, "--http1.1")
        self.assertEqual((answer["status"], answer["version"]), (200, "1.1"))
        self.assertEqual(self.assert_injected(answer["body"])["transport"], "https")

    def test_curl_over_https_with_http_2(self) -> None:
        answer = self.clients.curl("GET", SECURE_ORDERS, "--http2")
        self.assertEqual((answer["status"], answer["version"]), (200, "2"))
        seen = self.assert_injected(answer["body"])
        self.assertEqual((seen["transport"], seen["http_version"]), ("https", "2.0"))
        self.assertEqual(seen["authority"], SECURE_HOST)

    def test_requests_over_http(self) -> None:
        answer = self.clients.requests("GET", PLAIN_ORDERS)
        self.assertEqual(answer["status"], 200)
        self.assertEqual(self.assert_injected(answer["body"])["transport"], "http")

    def test_requests_over_https(self) -> None:
        answer = self.clients.requests("GET", SECURE_ORDERS)
        self.assertEqual(answer["status"], 200)
        self.assertEqual(self.assert_injected(answer["body"])["transport"], "https")

    def test_fetch_over_http_through_connect(self) -> None:
        answer = self.clients.fetch("GET", PLAIN_ORDERS)
        self.assertEqual(answer["status"], 200)
        self.assertEqual(self.assert_injected(answer["body"])["transport"], "http")
        self.assertIn(f"CONNECT {PLAIN_HOST}".encode(), self.agent.sent.read_bytes())

    def test_fetch_over_https(self) -> None:
        answer = self.clients.fetch("GET", SECURE_ORDERS)
        self.assertEqual(answer["status"], 200)
        self.assertEqual(self.assert_injected(answer["body"])["transport"], "https")

    def test_grpc_unary(self) -> None:
        answer = self.clients.grpc("ListOrders")
        self.assertEqual(answer["status"], "OK", answer)
        (message,) = answer["messages"]
        self.assertEqual(message["request"], {"asked": "by grpc"})
        seen = self.assert_injected(message)
        self.assertEqual((seen["transport"], seen["http_version"]), ("grpc", "2.0"))

    def test_grpc_stream(self) -> None:
        answer = self.clients.grpc("WatchOrders")
        self.assertEqual(answer["status"], "OK", answer)
        self.assertEqual([message["sequence"] for message in answer["messages"]], [1, 2, 3])
        seen = self.assert_injected(answer["messages"][0])
        self.assertEqual((seen["transport"], seen["http_version"]), ("grpc", "2.0"))

    def test_denial_of_curl_over_http(self) -> None:
        answer = self.clients.curl("DELETE", f"{PLAIN_ORDERS}/7")
        self.assert_denied(answer)
        self.assertEqual(answer["headers"]["content-type"], "application/problem+json")
        self.assertIn("policy_denied", answer["headers"]["proxy-status"])

    def test_denial_of_curl_over_https_with_http_1(self) -> None:
        self.assert_denied(self.clients.curl("DELETE", f"{SECURE_ORDERS}/7", "--http1.1"))

    def test_denial_of_curl_over_https_with_http_2(self) -> None:
        answer = self.clients.curl("DELETE", f"{SECURE_ORDERS}/7", "--http2")
        self.assertEqual(answer["version"], "2")
        self.assert_denied(answer)

    def test_denial_of_requests_over_http(self) -> None:
        self.assert_denied(self.clients.requests("DELETE", f"{PLAIN_ORDERS}/7"))

    def test_denial_of_requests_over_https(self) -> None:
        self.assert_denied(self.clients.requests("DELETE", f"{SECURE_ORDERS}/7"))

    def test_denial_of_fetch_over_http(self) -> None:
        self.assert_denied(self.clients.fetch("DELETE", f"{PLAIN_ORDERS}/7"))

    def test_denial_of_fetch_over_https(self) -> None:
        self.assert_denied(self.clients.fetch("DELETE", f"{SECURE_ORDERS}/7"))

    def test_denial_of_grpc(self) -> None:
        answer = self.clients.grpc("DeleteOrder")
        self.assertEqual(answer["status"], "PERMISSION_DENIED", answer)
        self.assertIn("policy_denied", answer["details"])
        self.assertIn("orders-api", answer["details"])
        self.assertEqual(self.arrived(), [])

    def test_the_callers_own_authorization_stays_behind(self) -> None:
        for url in (PLAIN_ORDERS, SECURE_ORDERS):
            answer = self.clients.curl("GET", url, "-H", "Authorization: Bearer callers-own")
            self.assertEqual(answer["status"], 200)
            self.assertFalse(self.assert_injected(answer["body"])["caller_authorization_arrived"])

    def test_a_swapped_key_is_refused(self) -> None:
        """Begins and ends with a good request: only the key of the second agent differs."""
        self.assertEqual(self.clients.curl("GET", SECURE_ORDERS)["status"], 200)
        swapped = self.clients_of_a_swapped_key()
        refusals_before = len(self.authorization_server.refusals())
        self.seen_before = len(self.received())
        for method in (swapped.curl, swapped.requests, swapped.fetch):
            for url in (SECURE_ORDERS, PLAIN_ORDERS):
                answer = method("GET", url)
                self.assertEqual(answer["status"], 502)
                self.assert_refused(502, answer["body"], "invalid_client")
        answer = swapped.grpc("ListOrders")
        self.assertEqual(answer["status"], "UNAVAILABLE", answer)
        self.assertIn("invalid_client", answer["details"])
        self.assertEqual(self.arrived(), [])
        self.assertGreater(len(self.authorization_server.refusals()), refusals_before)
        self.assertEqual(self.clients.curl("GET", SECURE_ORDERS)["status"], 200)

    def test_every_case_that_injects_fails_with_a_swapped_key(self) -> None:
        """The tier itself, with only the key of the agent swapped: that it is green says that a token was issued for *this* key."""
        swapped = self.clients_of_a_swapped_key()
        injecting = re.compile("test_(curl|requests|fetch|grpc)_")
        names = [name for name in unittest.defaultTestLoader.getTestCaseNames(type(self)) if injecting.match(name)]
        self.assertEqual(len(names), 9, names)
        for name in names:
            case = type(self)(name)
            case.clients = swapped
            result = unittest.TestResult()
            case.run(result)
            self.assertEqual((result.testsRun, len(result.failures)), (1, 1), f"{name}: {result}")

    def test_the_audit_is_whole_and_names_no_token(self) -> None:
        answer = self.clients.curl("GET", SECURE_ORDERS)
        token = self.arrived()[-1]["token"]
        self.assertEqual(answer["status"], 200)
        verified = self.clients.run(AGENT, "audit", "verify", self.agent.configuration.audit)
        self.assertEqual(verified.returncode, 0, verified.stderr)
        for place in (self.agent.configuration.audit.read_text(), self.agent.logs()):
            self.assertNotIn(token, place)
            self.assertNotIn(token.rpartition(".")[2], place)

    def test_zz_clients_held_and_sent_no_secret(self) -> None:
        """Last by its name: looks through all that the clients of the other tests held and sent."""
        tokens = {event["token"] for event in self.received() if event.get("token")}
        self.assertTrue(tokens)
        known = {part for token in tokens if token.count(".") == 2 for part in (token, token.rpartition(".")[2])}
        known |= {line for line in self.key_file.read_text().splitlines() if not line.startswith("-")}
        sent = self.agent.sent.read_bytes()
        for target in (SECURE_HOST, PLAIN_HOST):
            self.assertIn(f"CONNECT {target}".encode(), sent)
        self.assertIn(f"GET {PLAIN_ORDERS} HTTP/1.1".encode(), sent)
        self.assertNotIn(b"proxy-authorization", sent.lower())
        for place in (sent, self.clients.held):
            for secret in known:
                self.assertNotIn(secret.encode(), place)
            # Nor any other token or key, whoever made it: an assertion, a token of another test, PEM.
            self.assertIsNone(re.search(rb"eyJ[\w-]{10,}\.|PRIVATE KEY", place))
