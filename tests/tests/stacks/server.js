// Closes each connection once it has received something.
const net = require("net");
function hangUp(socket) {
  socket.destroy();
}
const server = net.createServer((socket) => socket.on("data", () => hangUp(socket)));
server.listen(Number(process.argv[2]), "127.0.0.1", () => console.log("ready"));
