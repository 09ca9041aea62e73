"""Connects to NAME=PORT... on loopback, trusting one root: a line for each, `NAME ok` or what is wrong."""
import socket
import ssl
import sys

context = ssl.create_default_context(cafile=sys.argv[1])
for pair in sys.argv[2:]:
    name, port = pair.split("=")
    try:
        with socket.create_connection(("127.0.0.1", int(port))) as connection:
            context.wrap_socket(connection, server_hostname=name).close()
        print(name, "ok")
    except ssl.SSLError as error:
        print(name, error)
