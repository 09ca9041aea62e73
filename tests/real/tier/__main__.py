"""Runs the tests of the names given as arguments and compares their number with `expected-counts`.

Closing line: `N passed, N failed`. Exit code 0 only where every test that should run ran and passed.
"""

import signal
import sys
import unittest

from . import exec_clients, keycloak, oidc_provider, systemd
from .processes import HERE

TESTS = {
    "oidc-provider": oidc_provider.OidcProviderTest,
    "keycloak": keycloak.KeycloakTest,
    "clients": exec_clients.ExecClientsTest,
    "systemd": systemd.SystemdTest,
}


class Result(unittest.TextTestResult):
    """Counts what passed: a test that was skipped, or that a failed set-up kept from running, did not."""

    passed = 0

    def addSuccess(self, test: unittest.TestCase) -> None:
        super().addSuccess(test)
        self.passed += 1


def expected_count(name: str) -> int:
    lines = (HERE / "expected-counts").read_text().splitlines()
    counts = dict(line.split() for line in lines if line and not line.startswith("#"))
    return int(counts[name])


def main(names: list[str]) -> int:
    passed = failed = 0
    for name in names:
        print(f"== {name}", flush=True)
        suite = unittest.defaultTestLoader.loadTestsFromTestCase(TESTS[name])
        result = unittest.TextTestRunner(stream=sys.stdout, verbosity=2, resultclass=Result).run(suite)
        expected = expected_count(name)
        if result.testsRun != expected or result.passed + len(result.failures) + len(result.errors) < expected:
            print(f"{name}: expected {expected} tests, {result.testsRun} ran, {result.passed} passed", flush=True)
        passed += result.passed
        # What did not pass failed, whether it ran or not; more tests than expected is a count that nobody updated.
        failed += max(expected - result.passed, len(result.failures) + len(result.errors), int(result.testsRun != expected))
    print(f"{passed} passed, {failed} failed", flush=True)
    return 1 if failed else 0


# As an interrupt from the keyboard, so that what was started is ended.
signal.signal(signal.SIGTERM, signal.default_int_handler)
sys.exit(main(sys.argv[1:]))
