"""An HTTPS client: `tls_client.py PORT`. It prints `ready` once it is connected.

`ask PATH` sends a request and reads a short answer; `send PATH` only sends it. `end` waits for the server's
end of the connection, `leave` sends a close_notify and closes, and `part` waits for the server's close_notify
in between.
"""

import socket
import ssl
import sys

context = ssl.create_default_context()
context.check_hostname = False
context.verify_mode = ssl.CERT_NONE
stream = context.wrap_socket(socket.create_connection(("127.0.0.1", int(sys.argv[1]))))
print("ready", flush=True)
for line in sys.stdin:
    order, _, path = line.strip().partition(" ")
    if order in ("ask", "send"):
        stream.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    if order == "ask":
        answer = b""
        while not answer.endswith(b"42"):
            answer += stream.recv(4096)
    if order == "end":
        assert stream.recv(4096) == b""
    if order == "leave":
        stream.settimeout(0)
        try:
            stream.unwrap()
        except ssl.SSLError:
            # close_notify is sent; the server's is not waited for.
            pass
        stream.close()
    if order == "part":
        stream.unwrap().close()
    print("done", flush=True)
