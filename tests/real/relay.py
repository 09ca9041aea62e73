"""A TCP relay that stands between the clients and the agent and keeps every byte that the clients sent.

Usage: relay.py PORT RECORD. Prints `{"event":"ready","port":N}` once it listens; RECORD is flushed as bytes arrive.
A process of its own, so that the socket which the agent attests is held by this process alone.
"""

import asyncio
import json
import sys


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, record=None) -> None:
    try:
        while chunk := await reader.read(65536):
            if record:
                record.write(chunk)
                record.flush()
            writer.write(chunk)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
    except ConnectionError:
        writer.close()


async def main(port: int, path: str) -> None:
    with open(path, "ab") as record:

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                agent_reader, agent_writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                writer.close()
                return
            await asyncio.gather(pump(reader, agent_writer, record), pump(agent_reader, writer))
            agent_writer.close()
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        print(json.dumps({"event": "ready", "port": server.sockets[0].getsockname()[1]}), flush=True)
        await server.serve_forever()


asyncio.run(main(int(sys.argv[1]), sys.argv[2]))
