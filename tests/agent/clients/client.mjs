// A client on node:http and node:tls, which know no proxy variables in Node 20 and earlier: it opens its
// tunnels itself. It is told of the proxy and of the certificates when it starts. For each URL on
// standard input it says the status that it got, or what went wrong.
import { readFileSync } from "node:fs";
import http from "node:http";
import https from "node:https";
import readline from "node:readline";
import tls from "node:tls";

const proxy = new URL(process.argv[2]);
const ca = readFileSync(process.argv[3]);
const sessions = new Map();

function tunnel(host, port) {
  return new Promise((resolve, reject) => {
    const connect = http.request({
      host: proxy.hostname,
      port: proxy.port,
      method: "CONNECT",
      path: `${host}:${port}`,
      headers: { host: `${host}:${port}` },
      agent: false,
    });
    connect.once("connect", (response, socket) => {
      if (response.statusCode === 200) return resolve(socket);
      socket.destroy();
      reject(new Error(`CONNECT was answered ${response.statusCode}`));
    });
    connect.once("error", reject);
    connect.end();
  });
}

function secure(socket, servername) {
  return new Promise((resolve, reject) => {
    const session = sessions.get(servername);
    const stream = tls.connect({ socket, servername, ca, session }, () => resolve(stream));
    stream.on("session", (session) => sessions.set(servername, session));
    stream.on("error", reject);
  });
}

function get(url, stream) {
  return new Promise((resolve, reject) => {
    // Without an agent of its own, `https` would name port 80 in `Host`.
    const options = { createConnection: () => stream, defaultPort: 443 };
    const request = https.get(url, options, (response) => {
      response.once("end", () => resolve(response.statusCode));
      response.once("error", reject);
      response.resume();
    });
    request.once("error", reject);
  });
}

async function ask(text) {
  const url = new URL(text);
  try {
    const stream = await secure(await tunnel(url.hostname, url.port || 443), url.hostname);
    const is_resumed = stream.isSessionReused();
    const status = await get(url, stream);
    stream.destroy();
    return `${status} ${is_resumed ? "resumed" : "full handshake"}`;
  } catch (error) {
    const is_tls = /^(ERR_TLS|ERR_SSL|CERT_|UNABLE_TO|SELF_SIGNED|DEPTH_ZERO|EPROTO)/.test(error.code ?? "");
    return `${is_tls ? "tls" : "connection"} ${error.code} ${error.message}`;
  }
}

for await (const line of readline.createInterface({ input: process.stdin })) {
  console.log((await ask(line)).replaceAll("\n", " "));
}
