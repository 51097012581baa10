// An HTTP server: `upload.js PORT`. It prints `ready` once it listens, and `asked` when a request has
// arrived. When it reads a line, it destroys the request, whose body it has not read.

const server = require("http").createServer((request) => {
  console.log("asked");
  process.stdin.once("data", () => request.destroy());
});
server.listen(Number(process.argv[2]), "127.0.0.1", () => console.log("ready"));
