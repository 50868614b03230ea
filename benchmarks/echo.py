"""A bare Unix socket server: the floor of any call that carries this many bytes.

python -m benchmarks.echo SOCKET REQUEST_BYTES ANSWER_BYTES
"""

import socket
import sys


def receive(connection: socket.socket, buffer: memoryview) -> bool:
    """Fills ``buffer``; False at the end of the stream."""
    at = 0
    while at < len(buffer):
        got = connection.recv_into(buffer[at:])
        if not got:
            return False
        at += got
    return True


def main() -> None:
    """Answers one client until it goes away."""
    path, request_bytes, answer_bytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    answer, buffer = bytes(answer_bytes), memoryview(bytearray(request_bytes))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        connection, _ = listener.accept()
        with connection:
            while receive(connection, buffer):
                connection.sendall(answer)


if __name__ == "__main__":
    main()
