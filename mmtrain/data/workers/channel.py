"""Messages between the main process and one data worker, over a socket pair that only the two of them use."""

import select
import socket
import struct
from collections.abc import Callable

# Waits until the socket is ready for select.POLLIN or select.POLLOUT; called only for a non-blocking socket.
Wait = Callable[[socket.socket, int], None]

_LENGTH = struct.Struct("!Q")


def send_message(end: socket.socket, message: bytes | memoryview, wait: Wait | None = None) -> None:
    """Send the bytes of one message, preceded by their number.

    Raises:
        OSError: the other end is closed.
    """
    for part in (_LENGTH.pack(len(message)), message):
        left = memoryview(part)
        while left:
            try:
                left = left[end.send(left) :]
            except BlockingIOError:
                assert wait is not None
                wait(end, select.POLLOUT)


def receive_message(end: socket.socket, wait: Wait | None = None) -> bytearray:
    """Return the bytes of the next message.

    Raises:
        EOFError: the other end is closed, perhaps in the middle of a message.
        OSError: the other end is closed.
    """
    (length,) = _LENGTH.unpack(_receive(end, _LENGTH.size, wait))
    return _receive(end, length, wait)


def _receive(end: socket.socket, length: int, wait: Wait | None) -> bytearray:
    buffer = bytearray(length)
    left = memoryview(buffer)
    while left:
        try:
            count = end.recv_into(left)
        except BlockingIOError:
            assert wait is not None
            wait(end, select.POLLIN)
            continue
        if count == 0:
            raise EOFError("the other end of the socket is closed")
        left = left[count:]
    return buffer


def is_closed(end: socket.socket) -> bool:
    """Return whether the other end was closed, even while messages that it sent before are still unread."""
    poller = select.poll()
    poller.register(end, 0)  # POLLHUP is always reported
    return bool(poller.poll(0))
