"""redis_cli.py SOCKET DB COMMAND...: what redis-cli does for one command, where there is no redis-cli."""

import os
import socket
import sys


def send(stream, args):
    stream.write(b"*%d\r\n" % len(args))
    for arg in map(os.fsencode, args):
        stream.write(b"$%d\r\n%s\r\n" % (len(arg), arg))
    stream.flush()


def receive(stream):
    """The lines to print for a reply."""
    line = stream.readline()
    kind, rest = line[:1], line[1:].rstrip(b"\r\n")
    if kind in (b"+", b":"):
        return [rest]
    if kind == b"$":
        return [stream.read(int(rest) + 2)[:-2]] if int(rest) >= 0 else [b""]
    if kind == b"*":
        return [line for _ in range(int(rest)) for line in receive(stream)]
    sys.exit(os.fsdecode(rest) or "the connection was closed")


connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
stream = connection.makefile("rwb")
send(stream, ["SELECT", sys.argv[2]])
receive(stream)
send(stream, sys.argv[3:])
for line in receive(stream):
    sys.stdout.buffer.write(line + b"\n")
