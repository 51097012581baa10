// An HTTP server: `keep_alive.js PORT MILLISECONDS`. It says `ready` once it listens, and closes connections
// that have had no request for so long.

const server = require("http").createServer((_, response) => response.end("42"));
server.keepAliveTimeout = Number(process.argv[3]);
server.listen(Number(process.argv[2]), "127.0.0.1", () => console.log("ready"));
