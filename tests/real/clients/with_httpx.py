"""An unmodified Python `httpx` client: METHOD URL. It knows of no proxy and of no token."""

import json
import sys

import httpx

method, url = sys.argv[1:3]
response = httpx.request(method, url, timeout=20)
print(json.dumps({"status": response.status_code, "body": response.json()}))
