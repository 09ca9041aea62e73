"""Adds the bearer header, and sends requests where the origin really is."""


class Inject:
    def requestheaders(self, flow):
        flow.request.host = "127.0.0.1"
        flow.request.port = @HTTPS_ORIGIN_PORT@
        flow.request.headers["authorization"] = "@CREDENTIAL@"


addons = [Inject()]
