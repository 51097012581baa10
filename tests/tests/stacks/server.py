"""Closes each connection that it accepts."""
import socket
import sys


def hang_up(connection):
    connection.close()


def serve(listener):
    while True:
        connection, _ = listener.accept()
        connection.recv(1)
        hang_up(connection)


listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print("ready", flush=True)
serve(listener)
