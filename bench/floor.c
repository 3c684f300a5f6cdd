/* The floor under every request over a TCP socket: the fewest system calls that move the bytes.
 *
 * One side asks, the other answers, both block in the kernel, nothing is parsed, hashed or copied in
 * user space. A put sends the value and waits for 32 bytes; a get sends 32 bytes and waits for the
 * value. Built by the benchmark with the system's compiler, called by ctypes (without the GIL).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>

#define SMALL 32

/* What the asking side sends before each run, so that both sides know what follows. */
struct order {
    uint64_t request;
    uint64_t response;
    uint64_t count;
    uint64_t unused;
};

static int send_all(int fd, const char *from, size_t left)
{
    while (left > 0) {
        ssize_t n = send(fd, from, left, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno == EINTR)
                continue;
            return -errno;
        }
        from += n;
        left -= (size_t)n;
    }
    return 0;
}

static int recv_all(int fd, char *into, size_t left)
{
    while (left > 0) {
        ssize_t n = recv(fd, into, left, MSG_WAITALL);
        if (n < 0) {
            if (errno == EINTR)
                continue;
            return -errno;
        }
        if (n == 0)
            return -ECONNRESET;
        into += n;
        left -= (size_t)n;
    }
    return 0;
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Answers until the other side closes; 0 then, or a negative errno. `buffer` holds `room` bytes. */
int floor_serve(int fd, char *buffer, uint64_t room)
{
    for (;;) {
        struct order order;
        int rc = recv_all(fd, (char *)&order, sizeof order);
        if (rc == -ECONNRESET)
            return 0;
        if (rc < 0)
            return rc;
        if (order.request > room || order.response > room)
            return -EMSGSIZE;
        for (uint64_t i = 0; i < order.count; i++) {
            if ((rc = recv_all(fd, buffer, order.request)) < 0)
                return rc;
            if ((rc = send_all(fd, buffer, order.response)) < 0)
                return rc;
        }
    }
}

/* Asks `count` times and writes the nanoseconds of each round trip to `times`; 0 or a negative errno. */
int floor_ask(int fd, char *buffer, uint64_t request, uint64_t response, uint64_t count, uint64_t *times)
{
    struct order order = {request, response, count, 0};
    int rc = send_all(fd, (char *)&order, sizeof order);
    if (rc < 0)
        return rc;
    uint64_t before = now_ns();
    for (uint64_t i = 0; i < count; i++) {
        if ((rc = send_all(fd, buffer, request)) < 0)
            return rc;
        if ((rc = recv_all(fd, buffer, response)) < 0)
            return rc;
        uint64_t after = now_ns();
        times[i] = after - before;
        before = after;
    }
    return 0;
}
