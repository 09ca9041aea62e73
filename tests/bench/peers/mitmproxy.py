"""Adds the bearer header, and reaches the origin where it really is."""


class Inject:
    def server_connect(self, data):
        data.server.address = ("127.0.0.1", @HTTPS_ORIGIN_PORT@)

    def requestheaders(self, flow):
        flow.request.headers["authorization"] = "@CREDENTIAL@"


addons = [Inject()]
