/* The function's side of the tcp fabric: one blocking thread for each connection.
 *
 * A thread costs an idle connection a few KiB and nothing else, a slow peer holds up nobody, and a
 * request costs two system calls, recv and send: the floor. Replies are kept back while the buffer
 * holds further requests, so a batch costs two system calls as well. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "serve.h"
#include "verbs.h"

#define PATIENCE_NS 100000000ll  /* for a peer that reads slowly, before its value is put aside */
#define STACK (256u << 10)

static bool reply(struct mf_stream *stream, struct mf_reply answer) {
    return mf_stream_queue(stream, &answer, sizeof answer);
}

static bool reply_status(struct mf_stream *stream, int status) {
    return reply(stream, (struct mf_reply){.status = (uint8_t)status});
}

/* More bytes than the buffer holds are coming from the peer: it may wait for our replies first. */
static bool before_blocking(struct mf_stream *stream, size_t needed) {
    return stream->have - stream->at >= needed || mf_stream_flush(stream);
}

static void gather(uint8_t *to, const struct iovec *pieces, size_t count) {
    for (size_t i = 0; i < count; to += pieces[i++].iov_len)
        memcpy(to, pieces[i].iov_base, pieces[i].iov_len);
}

/* From the heap to the socket, without a copy between (a cut mapping is EFAULT there, and ends the
 * connection). But a peer that reads slowly must not keep our pin, and with it all that is freed
 * meanwhile: what it has not taken soon is put aside, and the pin let go. */
static bool send_pinned(struct mf_op *op, struct mf_stream *stream, struct iovec *pieces, size_t count) {
    int64_t soon = mf_now() + PATIENCE_NS;
    if (!mf_stream_flush(stream) || !mf_stream_send_until(stream, &pieces, &count, soon))
        return false;
    if (!count)
        return true;
    size_t length = 0;
    for (size_t i = 0; i < count; i++)
        length += pieces[i].iov_len;
    uint8_t *aside = malloc(length);
    if (!aside)
        return false;
    volatile bool good = true;
    MF_GUARDED(op->memory->data, op->memory->at.data_bytes, gather(aside, pieces, count), good = false);
    mf_unpin(op);
    good = good && mf_stream_send(stream, &(struct iovec){aside, length}, 1);
    free(aside);
    return good;
}

static bool serve_get(struct mf_memory *memory, struct mf_stream *stream, const struct mf_request *request,
                      const void *key) {
    struct mf_op op;
    mf_op_begin(&op, memory, OPERATION_NS);
    op.space = request->space;
    int status = mf_get(&op, key, request->key_len);
    volatile bool good = true;
    if (status != MF_OK || request->flags & MF_HEAD_ONLY)
        good = reply_status(stream, status);
    else {
        struct mf_reply answer = {.status = MF_OK,
                                  .flags = op.flags,
                                  .meta_len = (uint16_t)op.meta_len,
                                  .segments = op.segments,
                                  .value_len = op.value_len,
                                  .checksum = op.checksum};
        if (op.chunks == 0) {
            size_t room = sizeof answer + op.meta_len + op.value_len;
            if (room > MF_BUFFER - stream->pending)
                good = mf_stream_flush(stream);
            volatile size_t pending = stream->pending;
            if (good)
                MF_GUARDED(
                    memory->data, memory->at.data_bytes,
                    {
                        mf_stream_queue(stream, &answer, sizeof answer);
                        mf_stream_queue(stream, op.meta, op.meta_len);
                        mf_stream_queue(stream, op.piece[0].iov_base, op.value_len);
                    },
                    {
                        stream->pending = pending;
                        good = reply_status(stream, MF_REVOKED);
                    });
        } else {
            good = mf_stream_queue(stream, &answer, sizeof answer) &&
                   mf_stream_queue(stream, op.meta, op.meta_len) &&
                   mf_stream_queue(stream, op.sums, op.segments * sizeof *op.sums) &&
                   send_pinned(&op, stream, op.piece, op.pieces);
        }
    }
    mf_op_end(&op);
    return good;
}

/* `server->mutex` is held. */
static void let_go_of_writer(struct connection *connection) {
    if (connection->writer)
        connection->server->writers[connection->writer - connection->server->memory->control->writers] = false;
    connection->writer = NULL;
}

struct mf_writer *mf_writer_of(struct connection *connection, uint64_t id) {
    struct mf_server *server = connection->server;
    struct mf_writer *writer = connection->writer;
    if (writer && connection->writer_id == id)
        return writer;
    pthread_mutex_lock(&server->mutex);
    writer = connection->writer;
    if (writer && connection->end) {
        if (connection->writer_id != id)
            writer = NULL; /* its other thread may be at work with that one */
    } else {
        let_go_of_writer(connection);
        connection->writer_id = id;
        if ((writer = mf_writer_open(server->memory, id, server->writers)))
            server->writers[writer - server->memory->control->writers] = true;
        connection->writer = writer;
    }
    pthread_mutex_unlock(&server->mutex);
    return writer;
}

/* Without the tag that is expected. */
static uint32_t kept_meta(const struct mf_request *request) {
    return request->meta_len - (request->conditional ? MF_TAG : 0);
}

/* Small enough for the buffer: nothing of the shard is touched before all of it is here. */
static int put_inline(struct mf_op *op, struct mf_stream *stream, const struct mf_request *request,
                      struct mf_replaced *replaced) {
    const uint8_t *key = stream->in + stream->at, *meta = key + request->key_len, *value = meta + request->meta_len;
    if (mf_value_sum(meta, request->meta_len, value, request->value_len) != request->c)
        return MF_CORRUPT;
    return mf_put(op, key, request->key_len, meta, kept_meta(request), value, request->value_len, request->flags,
                  replaced);
}

static void copy_tail(struct mf_op *op, uint32_t from, const uint8_t *tail) {
    for (uint32_t i = from; i < op->pieces; tail += op->piece[i++].iov_len)
        memcpy(op->piece[i].iov_base, tail, op->piece[i].iov_len);
}

/* Hashed here and not by the client: on one machine the sender is the busier side, on a network the
 * wire is. */
static bool receive_piece(struct mf_stream *stream, uint8_t *into, size_t length, uint64_t *sums) {
    for (size_t at = 0; at < length; at += MF_SEGMENT) {
        size_t count = length - at < MF_SEGMENT ? length - at : MF_SEGMENT;
        if (!mf_stream_read(stream, into + at, count))
            return false;
        *sums++ = mf_hash(into + at, count, 0);
    }
    return true;
}

static bool receive_spans(struct mf_op *op, struct mf_stream *stream) {
    for (uint32_t i = 0; i < op->pieces; i++)
        if (!receive_piece(stream, op->piece[i].iov_base, op->piece[i].iov_len, op->sums + i * (MF_SPAN / MF_SEGMENT)))
            return false;
    return true;
}

/* No whole spans are left. In smaller pieces it may still fit, but those share their spans with others:
 * all of the value has to be here before they are taken. */
static bool put_scattered(struct mf_op *op, struct mf_stream *stream, const struct mf_request *request,
                          const uint8_t *key, struct mf_replaced *replaced, int *status) {
    mf_unpin(op);
    uint8_t *value = malloc(request->value_len);
    if (!value)
        return mf_stream_skip(stream, request->value_len);
    bool good = mf_stream_read(stream, value, request->value_len);
    op->deadline = 0; /* the peer's time is not ours */
    if (good)
        *status = mf_put(op, key, request->key_len, key + request->key_len, kept_meta(request), value,
                         request->value_len, request->flags, replaced);
    free(value);
    return good;
}

/* A large value goes from the socket to where it will lie, as far as that is whole spans: these we may
 * hold while the peer takes its time. The rest waits in `tail`. False: the stream broke. */
static bool put_chunked(struct mf_op *op, struct mf_stream *stream, const struct mf_request *request,
                        const uint8_t *key, uint8_t *tail, struct mf_replaced *replaced, int *status) {
    *status = mf_put_reserve_spans(op, request->key_len, kept_meta(request), request->value_len);
    if (*status == MF_FULL)
        return put_scattered(op, stream, request, key, replaced, status);
    mf_unpin(op);
    if (*status != MF_OK)
        return mf_stream_skip(stream, request->value_len);
    const uint32_t spans = op->pieces;
    volatile bool good = false;
    MF_GUARDED(op->memory->data, op->memory->at.data_bytes, good = receive_spans(op, stream), good = false);
    if (!good || !receive_piece(stream, tail, request->value_len % MF_SPAN, op->sums + spans * (MF_SPAN / MF_SEGMENT)))
        return false;
    op->deadline = 0; /* the peer's time is not ours */
    if ((*status = mf_put_reserve_rest(op)) != MF_OK)
        return true;
    MF_GUARDED(op->memory->data, op->memory->at.data_bytes, copy_tail(op, spans, tail), return false);
    *status = mf_put_commit(op, key, key + request->key_len, request->flags, replaced);
    return true;
}

static bool serve_put(struct connection *connection, const struct mf_request *request) {
    struct mf_stream *stream = &connection->stream;
    struct mf_op op;
    struct mf_replaced replaced = {0};
    size_t head = request->key_len + request->meta_len;
    int status = MF_OK;
    bool good = true;
    mf_op_begin(&op, connection->server->memory, OPERATION_NS);
    op.space = request->space;
    op.number = (uint32_t)request->b;
    if ((op.conditional = request->conditional))
        memcpy(&op.expected, stream->in + stream->at + request->key_len + kept_meta(request), MF_TAG);
    if (!(op.writer = mf_writer_of(connection, request->a)))
        return false;
    if (mf_is_inline(request->key_len, request->meta_len, request->value_len)) {
        size_t whole = head + request->value_len;
        if (!before_blocking(stream, whole) || !mf_stream_fill(stream, whole))
            return false;
        status = put_inline(&op, stream, request, &replaced);
        stream->at += whole;
    } else {
        uint8_t *aside = aligned_alloc(64, MF_SPAN + MF_BUFFER); /* the buffer is used again for the value */
        if (!aside || !mf_stream_flush(stream))
            return free(aside), false;
        memcpy(aside + MF_SPAN, stream->in + stream->at, head);
        stream->at += head;
        good = put_chunked(&op, stream, request, aside + MF_SPAN, aside, &replaced, &status);
        if (!good)
            mf_put_abort(&op);
        free(aside);
    }
    mf_op_end(&op);
    return good && reply(stream, (struct mf_reply){.status = (uint8_t)status, .value_len = replaced.length}) &&
           mf_stream_queue(stream, replaced.manifest, replaced.length);
}

static bool serve_delete(struct connection *connection, const struct mf_request *request, const void *key) {
    struct mf_stream *stream = &connection->stream;
    struct mf_op op;
    struct mf_replaced replaced = {0};
    mf_op_begin(&op, connection->server->memory, OPERATION_NS);
    op.space = request->space;
    op.writer = mf_writer_of(connection, request->a);
    op.number = (uint32_t)request->b;
    op.conditional = request->conditional;
    op.expected = request->c;
    if (!op.writer)
        return false;
    int status = mf_delete(&op, key, request->key_len, &replaced);
    mf_op_end(&op);
    return reply(stream, (struct mf_reply){.status = (uint8_t)status, .value_len = replaced.length}) &&
           mf_stream_queue(stream, replaced.manifest, replaced.length);
}

static bool serve_scan(struct mf_memory *memory, struct mf_stream *stream, const struct mf_request *request) {
    size_t room = MF_GROUP * (16 + MF_MAX_KEY), length; /* one group always fits */
    uint8_t *out = malloc(room);
    uint64_t cursor = request->a;
    struct mf_op op;
    if (!out)
        return false;
    mf_op_begin(&op, memory, OPERATION_NS);
    op.space = request->space;
    int status = mf_scan(&op, &cursor, out, room, &length);
    mf_op_end(&op);
    struct mf_reply answer = {
        .status = (uint8_t)status, .value_len = status == MF_OK ? length : 0, .a = cursor};
    bool good = reply(stream, answer) &&
                (answer.value_len == 0 || mf_stream_send(stream, &(struct iovec){out, length}, 1));
    free(out);
    return good;
}

static bool serve_stats(struct mf_memory *memory, struct mf_stream *stream) {
    struct mf_stats stats;
    int status = mf_stats(memory, &stats);
    return reply(stream, (struct mf_reply){.status = (uint8_t)status, .value_len = sizeof stats}) &&
           mf_stream_queue(stream, &stats, sizeof stats);
}

static bool serve_region(struct mf_memory *memory, struct mf_stream *stream, const struct mf_request *request) {
    struct mf_op op;
    uint64_t before = 0;
    int status = mf_region_range(memory, request->a, request->verb < MF_SWAP ? request->value_len : 8);
    uint8_t *at = memory->data + memory->at.heap + (status == MF_OK ? request->a : 0);
    volatile bool good = true;
    mf_op_begin(&op, memory, OPERATION_NS);
    switch (request->verb) {
    case MF_READ:
        if (status == MF_OK && (status = mf_pin(&op)) == MF_OK) {
            struct mf_reply answer = {.status = MF_OK, .value_len = request->value_len};
            good = mf_stream_queue(stream, &answer, sizeof answer) &&
                   send_pinned(&op, stream, &(struct iovec){at, request->value_len}, 1);
            mf_op_end(&op);
            return good;
        }
        break;
    case MF_WRITE:
        good = before_blocking(stream, request->value_len);
        if (good && status == MF_OK && (status = mf_pin(&op)) == MF_OK) {
            MF_GUARDED(memory->data, memory->at.data_bytes, good = mf_stream_read(stream, at, request->value_len),
                       good = false);
            mf_region_written(&op, request->a, request->value_len);
            mf_op_end(&op);
            break;
        }
        good = good && mf_stream_skip(stream, request->value_len);
        break;
    case MF_SWAP:
        status = mf_region_swap(&op, request->a, request->b, request->c, &before);
        break;
    default:
        status = mf_region_add(&op, request->a, request->c, &before);
    }
    mf_op_end(&op);
    return good && reply(stream, (struct mf_reply){.status = (uint8_t)status, .a = before});
}

/* Did a change take effect that another, broken connection of this client was asked for? That one may
 * still be at work on it: it is ended first. */
static bool serve_resume(struct connection *connection, const struct mf_request *request) {
    struct mf_server *server = connection->server;
    int64_t until = mf_now() + OPERATION_NS;
    struct timespec time = {until / 1000000000, until % 1000000000};
    int error = 0;
    bool busy = true;
    pthread_mutex_lock(&server->mutex);
    mf_writer_open(server->memory, request->a, server->writers); /* a fence, if it has no record yet */
    while (busy && !error) {
        busy = false;
        for (struct connection *c = server->all; c; c = c->next)
            if (c != connection && c->writer && c->writer_id == request->a) {
                shutdown(c->stream.fd, SHUT_RDWR);
                busy = true;
            }
        if (busy)
            error = pthread_cond_timedwait(&server->ended, &server->mutex, &time);
    }
    bool happened = mf_writer_asked(server->memory, request->a, (uint32_t)request->b);
    pthread_mutex_unlock(&server->mutex);
    if (busy)
        return reply_status(&connection->stream, MF_TIMEOUT);
    return reply(&connection->stream, (struct mf_reply){.status = MF_OK, .a = happened});
}

/* What a client needs for its queue pair: the key of a chunk of DATA, or the atomics of a region. */
static bool serve_end(struct connection *connection, const struct mf_request *request) {
    uint64_t key = 0;
    int status = request->verb == MF_KEY ? mf_end_key(connection->end, request->a, &key) : mf_end_claim(connection->end);
    return reply(&connection->stream, (struct mf_reply){.status = (uint8_t)status, .a = key});
}

static bool serve_whole(struct connection *connection, const struct mf_request *request) {
    struct mf_memory *memory = connection->server->memory;
    struct mf_stream *stream = &connection->stream;
    const uint8_t *key = stream->in + stream->at;
    switch (request->verb) {
    case MF_PUT:
        return serve_put(connection, request);
    case MF_GET:
        stream->at += request->key_len;
        return serve_get(memory, stream, request, key);
    case MF_DELETE:
        stream->at += request->key_len;
        return serve_delete(connection, request, key);
    case MF_SCAN:
        return serve_scan(memory, stream, request);
    case MF_STATS:
        return serve_stats(memory, stream);
    case MF_RESUME:
        return serve_resume(connection, request);
    case MF_KEY:
    case MF_CLAIM:
        return serve_end(connection, request);
    default:
        return serve_region(memory, stream, request);
    }
}

/* False ends the connection: it broke, or what came is not a request. */
static bool serve_one(struct connection *connection) {
    struct mf_memory *memory = connection->server->memory;
    struct mf_stream *stream = &connection->stream;
    struct mf_request request;
    if (!before_blocking(stream, sizeof request))
        return false;
    while (!mf_stream_fill(stream, sizeof request))
        if (stream->error != EAGAIN || stream->at != stream->have)
            return false; /* between requests it may say nothing for ever */
    memcpy(&request, stream->in + stream->at, sizeof request);
    bool keyed = request.verb == MF_GET || request.verb == MF_PUT || request.verb == MF_DELETE;
    uint64_t largest = request.verb == MF_PUT ? MF_MAX_PART
                       : request.verb == MF_READ || request.verb == MF_WRITE ? MF_READ_MAX
                                                                              : 0;
    bool region = request.verb >= MF_READ && request.verb <= MF_ADD;
    bool ends = request.verb == MF_KEY || request.verb == MF_CLAIM, any = request.verb == MF_STATS || ends;
    bool changes = request.verb == MF_PUT || request.verb == MF_DELETE || request.verb == MF_RESUME;
    if (request.verb < MF_GET || request.verb > MF_CLAIM || (ends && !connection->end) ||
        request.key_len > (keyed ? MF_MAX_KEY : 0) ||
        request.meta_len > (request.verb == MF_PUT ? MF_MAX_META : 0) || request.value_len > largest ||
        request.space > 1 || (changes && (request.a == 0 || request.b == 0)) ||
        (request.conditional && !(request.verb == MF_PUT && request.meta_len == 2 * MF_TAG) &&
         request.verb != MF_DELETE) ||
        (!any && region != (memory->at.kind == MF_REGION))) {
        reply_status(stream, MF_BAD);
        mf_stream_flush(stream);
        return false;
    }
    stream->at += sizeof request;
    size_t head = (size_t)request.key_len + request.meta_len;
    if (!before_blocking(stream, head) || !mf_stream_fill(stream, head))
        return false;
    atomic_store(&connection->leans, request.verb == MF_GET || request.verb == MF_READ || request.verb == MF_WRITE);
    bool good = serve_whole(connection, &request);
    atomic_store(&connection->leans, false);
    return good;
}

static void *run(void *argument) {
    struct connection *connection = argument;
    struct mf_server *server = connection->server;
    while (serve_one(connection)) {
    }
    if (connection->end)
        mf_end_free(connection->end);
    pthread_mutex_lock(&server->mutex);
    *connection->link = connection->next;
    if (connection->next)
        connection->next->link = connection->link;
    let_go_of_writer(connection);
    close(connection->stream.fd);
    server->count--;
    pthread_cond_broadcast(&server->ended);
    pthread_mutex_unlock(&server->mutex);
    free(connection);
    return NULL;
}

struct mf_server *mf_server_new(struct mf_memory *memory) {
    struct mf_server *server = calloc(1, sizeof *server);
    if (!server)
        return NULL;
    server->memory = memory;
    if (!mf_verbs_make(server)) {
        free(server);
        return NULL;
    }
    mf_region_release(memory); /* a killed function's device has no part in it any more */
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_mutex_init(&server->mutex, NULL);
    pthread_cond_init(&server->ended, &attributes);
    return server;
}

int mf_server_serve(struct mf_server *server, int fd, struct mf_end *end) {
    struct connection *connection = aligned_alloc(64, sizeof *connection);
    if (!connection) {
        if (end)
            mf_end_free(end);
        return ENOMEM;
    }
    connection->server = server;
    connection->writer = NULL;
    connection->leans = false;
    connection->end = end;
    mf_stream_open(&connection->stream, fd, PEER_NS);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    if (end)
        mf_end_bind(end, connection);
    pthread_mutex_lock(&server->mutex);
    pthread_t thread;
    int error = server->stopping                        ? ESHUTDOWN
                : server->count >= (int)MF_WRITERS / 2 ? EMFILE
                                                        : pthread_create(&thread, &attributes, run, connection);
    if (!error) {
        connection->next = server->all;
        connection->link = &server->all;
        if (connection->next)
            connection->next->link = &connection->next;
        server->all = connection;
        server->count++;
    }
    pthread_mutex_unlock(&server->mutex);
    pthread_attr_destroy(&attributes);
    if (error) {
        if (end)
            mf_end_free(end);
        pthread_mutex_lock(&server->mutex);
        let_go_of_writer(connection); /* of a message that came already */
        pthread_mutex_unlock(&server->mutex);
        free(connection);
    }
    return error;
}

int mf_server_connections(struct mf_server *server) {
    pthread_mutex_lock(&server->mutex);
    int count = server->count;
    pthread_mutex_unlock(&server->mutex);
    return count;
}

void mf_server_cut(struct mf_server *server) {
    pthread_mutex_lock(&server->mutex);
    for (struct connection *c = server->all; c; c = c->next)
        if (atomic_load(&c->leans))
            shutdown(c->stream.fd, SHUT_RDWR);
    pthread_mutex_unlock(&server->mutex);
}

bool mf_server_stop(struct mf_server *server, int64_t timeout_ns) {
    int64_t until = mf_now() + timeout_ns;
    struct timespec time = {until / 1000000000, until % 1000000000};
    int error = 0;
    pthread_mutex_lock(&server->mutex);
    server->stopping = true;
    for (struct connection *c = server->all; c; c = c->next)
        shutdown(c->stream.fd, SHUT_RDWR);
    while (server->count && !error)
        error = pthread_cond_timedwait(&server->ended, &server->mutex, &time);
    bool ended = server->count == 0;
    pthread_mutex_unlock(&server->mutex);
    return ended;
}

void mf_server_free(struct mf_server *server) {
    mf_verbs_free(server);
    free(server);
}
