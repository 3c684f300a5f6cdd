"""The zygote: a small process that forks memory functions.

It has loaded all that a function needs, so a new one takes milliseconds, and shares those pages with
all the others. It runs no thread and no event loop of its own, so forking is safe. Functions are its
children and not the agent's: they live on when the agent dies. The zygote itself ends with its agent.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
import socket
import sys

from memfaas.server.function import main as serve_lease


def main() -> None:
    """Serves one agent at the other end of an inherited SOCK_SEQPACKET socket.

    A request is any byte with a descriptor beside it: the function's end of its socket to the agent.
    The reply is the process id, in decimal.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=int, required=True)
    agent = socket.socket(fileno=parser.parse_args().socket)
    logging.raiseExceptions = False  # the terminal or pipe that we log to may go away before us
    logging.basicConfig(format="%(asctime)s %(levelname)s function %(process)d: %(message)s", level=logging.WARNING)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps functions; the agent watches them
    gc.collect()
    gc.freeze()  # a collection in a child would write to pages that all share
    while True:
        try:
            data, descriptors, _, _ = socket.recv_fds(agent, 16, 1, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            return
        if not data:
            return
        (descriptor,) = descriptors
        pid = os.fork()
        if pid == 0:
            agent.close()
            _child(descriptor)
        os.close(descriptor)
        try:
            agent.send(str(pid).encode())
        except OSError:
            return


def _child(descriptor: int) -> None:
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        serve_lease(socket.socket(fileno=descriptor))
        status = 0
    except BaseException:
        logging.exception("ended by an error")
    finally:
        sys.stderr.flush()
        os._exit(status)  # never back into the zygote's loop


if __name__ == "__main__":
    main()
