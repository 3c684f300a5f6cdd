#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>

#include "wire.h"

void mf_stream_patience(struct mf_stream *stream, int64_t timeout_ns) {
    struct timeval time = {timeout_ns / 1000000000, timeout_ns % 1000000000 / 1000};
    setsockopt(stream->fd, SOL_SOCKET, SO_RCVTIMEO, &time, sizeof time);
    setsockopt(stream->fd, SOL_SOCKET, SO_SNDTIMEO, &time, sizeof time);
}

void mf_stream_open(struct mf_stream *stream, int fd, int64_t timeout_ns) {
    stream->fd = fd;
    stream->error = 0;
    stream->id = stream->number = 0;
    stream->at = stream->have = stream->pending = 0;
    stream->hurried = false;
    int one = 1, idle = 30, tries = 3;
    mf_stream_patience(stream, timeout_ns);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    /* A node that dies sends no end: find out within a minute. */
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof idle);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &idle, sizeof idle);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &tries, sizeof tries);
}

static bool broke(struct mf_stream *stream, int error) {
    stream->error = error;
    return false;
}

/* Takes what was sent off the front of the pieces. */
static void advance(struct iovec **pieces, size_t *count, size_t sent) {
    while (*count && sent >= (*pieces)->iov_len) {
        sent -= (*pieces)->iov_len;
        ++*pieces;
        --*count;
    }
    if (*count) {
        (*pieces)->iov_base = (uint8_t *)(*pieces)->iov_base + sent;
        (*pieces)->iov_len -= sent;
    }
}

static ssize_t send_some(struct mf_stream *stream, struct iovec *pieces, size_t count, int flags) {
    struct msghdr message = {.msg_iov = pieces, .msg_iovlen = count < IOV_MAX ? count : IOV_MAX};
    ssize_t sent;
    do
        sent = sendmsg(stream->fd, &message, MSG_NOSIGNAL | flags);
    while (sent < 0 && errno == EINTR);
    return sent;
}

static bool send_all(struct mf_stream *stream, struct iovec *pieces, size_t count) {
    while (count) {
        ssize_t sent = send_some(stream, pieces, count, 0);
        if (sent < 0)
            return broke(stream, errno);
        advance(&pieces, &count, (size_t)sent);
    }
    return true;
}

bool mf_stream_send_until(struct mf_stream *stream, struct iovec **pieces, size_t *count, int64_t deadline) {
    while (*count) {
        ssize_t sent = send_some(stream, *pieces, *count, MSG_DONTWAIT);
        if (sent < 0 && errno != EAGAIN)
            return broke(stream, errno);
        if (sent >= 0) {
            advance(pieces, count, (size_t)sent);
            continue;
        }
        int64_t left = deadline - mf_now();
        struct pollfd writable = {stream->fd, POLLOUT, 0};
        if (left <= 0 || poll(&writable, 1, (int)(left / 1000000) + 1) == 0)
            return true;
    }
    return true;
}

bool mf_stream_send(struct mf_stream *stream, const struct iovec *pieces, size_t count) {
    struct iovec all[MF_MAX_CHUNKS + 8];
    size_t n = 0;
    if (stream->pending)
        all[n++] = (struct iovec){stream->out, stream->pending};
    if (count) /* memcpy takes no NULL, even of no bytes */
        memcpy(all + n, pieces, count * sizeof *pieces);
    stream->pending = 0;
    return send_all(stream, all, n + count);
}

bool mf_stream_flush(struct mf_stream *stream) { return !stream->pending || mf_stream_send(stream, NULL, 0); }

bool mf_stream_queue(struct mf_stream *stream, const void *data, size_t length) {
    if (length > MF_BUFFER - stream->pending && !mf_stream_flush(stream))
        return false;
    if (length > MF_BUFFER)
        return mf_stream_send(stream, &(struct iovec){(void *)data, length}, 1);
    if (length) /* memcpy takes no NULL, even of no bytes */
        memcpy(stream->out + stream->pending, data, length);
    stream->pending += length;
    return true;
}

static size_t receive(struct mf_stream *stream, void *into, size_t length, int flags) {
    for (;;) {
        ssize_t got = recv(stream->fd, into, length, flags);
        if (got > 0)
            return (size_t)got;
        if (got == 0 || errno != EINTR)
            return broke(stream, got == 0 ? 0 : errno), 0;
    }
}

bool mf_stream_fill(struct mf_stream *stream, size_t length) {
    while (stream->have - stream->at < length) {
        if (stream->at == stream->have)
            stream->at = stream->have = 0;
        else if (stream->at + length > MF_BUFFER) {
            memmove(stream->in, stream->in + stream->at, stream->have - stream->at);
            stream->have -= stream->at;
            stream->at = 0;
        }
        size_t got = receive(stream, stream->in + stream->have, MF_BUFFER - stream->have, 0);
        if (!got)
            return false;
        stream->have += got;
    }
    return true;
}

size_t mf_stream_some(struct mf_stream *stream, void *into, size_t length) {
    size_t buffered = stream->have - stream->at;
    if (buffered) {
        if (buffered > length)
            buffered = length;
        memcpy(into, stream->in + stream->at, buffered);
        stream->at += buffered;
        return buffered;
    }
    return receive(stream, into, length, MSG_WAITALL);
}

bool mf_stream_read(struct mf_stream *stream, void *into, size_t length) {
    while (length) {
        size_t got = mf_stream_some(stream, into, length);
        if (!got)
            return false;
        into = (uint8_t *)into + got;
        length -= got;
    }
    return true;
}

bool mf_stream_skip(struct mf_stream *stream, uint64_t length) {
    while (length) {
        if (stream->at == stream->have && !mf_stream_fill(stream, 1))
            return false;
        size_t count = stream->have - stream->at;
        if (count > length)
            count = length;
        stream->at += count;
        length -= count;
    }
    return true;
}
