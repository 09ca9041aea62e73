"""A client on urllib that is told of the proxy and of the certificates when it starts. For each URL on
standard input it says the status that it got, or what went wrong."""

import ssl
import sys
import urllib.error
import urllib.request

proxy, certificates = sys.argv[1:]
opener = urllib.request.build_opener(
    urllib.request.ProxyHandler({"http": proxy, "https": proxy}),
    urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=certificates)),
)


def get(url):
    try:
        with opener.open(url, timeout=20) as response:
            response.read()
            return f"{response.status} OK"
    except urllib.error.HTTPError as error:
        return f"{error.code} {error.reason}"
    except OSError as error:
        reason = getattr(error, "reason", error)
        # A connection that ends in the middle of a handshake is not a failure of it.
        is_tls = isinstance(reason, ssl.SSLError) and not isinstance(reason, ssl.SSLEOFError)
        return f"{'tls' if is_tls else 'connection'} {reason!r}"
    except Exception as error:  # http.client's own errors, when a connection breaks off.
        return f"connection {error!r}"


for line in sys.stdin:
    print(get(line.strip()), flush=True)
