// An HTTP server: `upload.js PORT`. It says `ready` once it listens, and `asked` when a request has come. It destroys the
// request, whose body it has not read, when it reads a line.

const server = require("http").createServer((request) => {
  console.log("asked");
  process.stdin.once("data", () => request.destroy());
});
server.listen(Number(process.argv[2]), "127.0.0.1", () => console.log("ready"));
