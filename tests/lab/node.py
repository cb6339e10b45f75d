"""Small programs that the lab's tests run at nodes. `python node.py ROLE ADDRESS [PORT] [...]`."""

from __future__ import annotations

import socket
import sys
import threading
import time


def serve(address: str, port: int) -> None:
    """Echo every connection's bytes back, with the caller's address as the first line."""
    with socket.create_server((address, port)) as server:
        print("ready", flush=True)
        while True:
            connection, caller = server.accept()
            threading.Thread(target=_echo, args=(connection, caller[0]), daemon=True).start()


def _echo(connection: socket.socket, caller: str) -> None:
    with connection:
        connection.sendall(f"{caller}\n".encode())
        while data := connection.recv(65536):
            connection.sendall(data)


def ask(address: str, port: int, wait_s: float) -> None:
    """Connect, and print who the server says we are, or how it failed."""
    try:
        with socket.create_connection((address, port), wait_s) as connection:
            print(connection.makefile().readline().strip(), flush=True)
    except OSError as error:
        print(f"failed {type(error).__name__}", flush=True)


def tick(address: str, port: int) -> None:
    """Send a small datagram each 20 ms, for ever."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
        print("ready", flush=True)
        while True:
            end.sendto(b"tick", (address, port))
            time.sleep(0.02)


def count(address: str, port: int) -> None:
    """Print the number of datagrams of each 0.1 s as a line, for ever."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
        end.bind((address, port))
        end.settimeout(0.01)
        print("ready", flush=True)
        while True:
            until, number = time.monotonic() + 0.1, 0
            while time.monotonic() < until:
                try:
                    end.recv(2048)
                    number += 1
                except TimeoutError:
                    continue
            print(number, flush=True)


def fetch(addresses: list[tuple[str, int]], num_bytes: int) -> None:
    """Send `num_bytes` to every echo server at the same time; print how long until all came back."""

    def one(address: tuple[str, int]) -> None:
        with socket.create_connection(address, 20) as connection:
            reader = connection.makefile("rb")
            reader.readline()
            sender = threading.Thread(target=connection.sendall, args=(bytes(num_bytes),))
            sender.start()
            assert len(reader.read(num_bytes)) == num_bytes
            sender.join()

    start = time.monotonic()
    threads = [threading.Thread(target=one, args=(address,)) for address in addresses]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(time.monotonic() - start, flush=True)


if __name__ == "__main__":
    role, *rest = sys.argv[1:]
    match role:
        case "serve":
            serve(rest[0], int(rest[1]))
        case "ask":
            ask(rest[0], int(rest[1]), float(rest[2]))
        case "tick":
            tick(rest[0], int(rest[1]))
        case "count":
            count(rest[0], int(rest[1]))
        case "fetch":
            fetch([(host, int(port)) for host, port in zip(rest[1::2], rest[2::2], strict=True)], int(rest[0]))
