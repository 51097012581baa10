"""Connects to a port and closes the connection at the end of a call path, whose steps it reads from standard input.
First prints the frames that the interpreter itself shows at that moment."""
import json
import socket
import sys


def say(connection, frame):
    frames = []
    while frame is not None:
        code = frame.f_code
        name = getattr(code, "co_qualname", code.co_name)
        frames.append([name, code.co_filename, frame.f_lineno])
        frame = frame.f_back
    print(json.dumps({"port": connection.getsockname()[1], "frames": frames}), flush=True)


def hang_up(connection):
    # On one line, so that the frame is at the same line both times.
    say(connection, sys._getframe()); connection.close()


def step(connection, rest):
    if not rest:
        return hang_up(connection)
    return STEPS[rest[0]](connection, rest[1:])


def left(connection, rest):
    return step(connection, rest)


def right(
    connection,
    rest,
):
    return step(
        connection,
        rest,
    )


def sorts(connection, rest):
    """The interpreter calls C, which calls the interpreter."""
    [rest].sort(key=lambda rest: step(connection, rest))


def generator(connection, rest):
    yield
    yield step(connection, rest)


def pulls(connection, rest):
    for _ in generator(connection, rest):
        pass


class Guard:
    def __init__(self, connection, rest):
        self.arguments = (connection, rest)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        step(*self.arguments)
        return True

    def __del__(self):
        pass


def fails(connection, rest):
    """What follows an exception is rarely used code of the interpreter, which compilers put elsewhere."""
    with Guard(connection, rest):
        raise ValueError


class Größe:
    @property
    def wert(self):
        return step(*self.arguments)


def looks(connection, rest):
    size = Größe()
    size.arguments = (connection, rest)
    return size.wert


def makes(connection, rest):
    """The code object is gone when the call returns."""
    names = {"step": step, "connection": connection, "rest": rest}
    exec(compile("\n" * len(rest) + "step(connection, rest)", f"<made for {rest}>", "exec"), names)


STEPS = {"l": left, "r": right, "s": sorts, "g": pulls, "f": fails, "p": looks, "x": makes}

port = int(sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    step(socket.create_connection(("127.0.0.1", port)), line.strip())
