// An unmodified Node `fetch` client: METHOD URL. It knows of no proxy and of no token.
const [method, url] = process.argv.slice(2);
const response = await fetch(url, { method });
console.log(JSON.stringify({ status: response.status, body: await response.json() }));
