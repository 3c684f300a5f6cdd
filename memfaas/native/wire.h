/* The tcp fabric's frames, after the ticket's handshake. Little-endian, as every machine we run on.
 *
 * A request is the structure, then key, meta and value. A value that the shard would not keep inline
 * is followed by one checksum for each segment of 64 KiB. A reply is the structure, then meta, the
 * checksums of a value that is not inline, and the value; to GET and READ. Requests may be sent one
 * behind the other; replies come in their order. */
#ifndef MEMFAAS_WIRE_H
#define MEMFAAS_WIRE_H

#include "memfaas.h"

enum mf_verb { MF_GET = 1, MF_PUT, MF_DELETE, MF_SCAN, MF_STATS, MF_READ, MF_WRITE, MF_SWAP, MF_ADD };

#define MF_HEAD_ONLY 1u /* flag of a GET: is it there? */

struct mf_request {
    uint8_t verb;
    uint8_t flags;
    uint8_t space;
    uint8_t pad;
    uint32_t key_len;
    uint32_t meta_len;
    uint32_t pad2;
    uint64_t value_len; /* PUT, WRITE: that follows; READ: that is asked for */
    uint64_t a;         /* offset, cursor, or the writer of a PUT */
    uint64_t b;         /* SWAP: expected */
    uint64_t c;         /* SWAP: new; ADD: amount; PUT: checksum of an inline value */
};
_Static_assert(sizeof(struct mf_request) == 48, "request");

struct mf_reply {
    uint8_t status;
    uint8_t flags;
    uint16_t meta_len;
    uint32_t segments;
    uint64_t value_len;
    uint64_t a; /* SWAP, ADD: the word before; SCAN: the next cursor */
    uint64_t checksum;
};
_Static_assert(sizeof(struct mf_reply) == 32, "reply");

#define MF_WINDOW (32u << 10) /* bytes of requests that may be under way: fits any socket's buffer */
#define MF_WINDOW_COUNT 128u
#define MF_READ_MAX (1u << 30)
#define MF_BUFFER (80u << 10)
_Static_assert(sizeof(struct mf_request) + MF_MAX_KEY + MF_MAX_META < MF_BUFFER, "a request's head fits the buffer");

/* stream.c: a blocking socket with a buffer on each side. All return false when it broke or timed out. */
struct mf_stream {
    int fd;
    int error; /* errno of what broke it; 0 at its end */
    size_t at, have, pending;
    uint8_t in[MF_BUFFER];
    uint8_t out[MF_BUFFER];
};
void mf_stream_open(struct mf_stream *stream, int fd, int64_t timeout_ns);
bool mf_stream_send(struct mf_stream *stream, const struct iovec *pieces, size_t count); /* after flushing */
bool mf_stream_flush(struct mf_stream *stream);
bool mf_stream_queue(struct mf_stream *stream, const void *data, size_t length); /* any length */
bool mf_stream_fill(struct mf_stream *stream, size_t length); /* at least so much is in `in` at `at` */
bool mf_stream_read(struct mf_stream *stream, void *into, size_t length);
/* What one recv gives, at least 1 and at most `length`. 0: broken. */
size_t mf_stream_some(struct mf_stream *stream, void *into, size_t length);
bool mf_stream_skip(struct mf_stream *stream, uint64_t length);

/* serve.c */
struct mf_server;
struct mf_server *mf_server_new(struct mf_memory *memory);
int mf_server_serve(struct mf_server *server, int fd);
int mf_server_connections(struct mf_server *server);
bool mf_server_stop(struct mf_server *server, int64_t timeout_ns);
void mf_server_free(struct mf_server *server);

/* dial.c: the client's side */
struct mf_pool; /* the connections of one link */
struct mf_pool *mf_pool_new(int64_t timeout_ns);
int mf_pool_add(struct mf_pool *pool, int fd);
struct mf_stream *mf_pool_take(struct mf_pool *pool); /* NULL: none is free */
void mf_pool_give(struct mf_pool *pool, struct mf_stream *stream); /* a broken one is closed */
void mf_pool_close(struct mf_pool *pool);
void mf_pool_free(struct mf_pool *pool);
uint32_t mf_pool_generation(struct mf_pool *pool);
int64_t mf_pool_timeout(struct mf_pool *pool);

struct mf_pull { /* a reply whose value is still in the stream */
    struct mf_reply reply;
    uint8_t meta[MF_MAX_META];
    uint64_t sums[MF_MAX_SEGMENTS];
};
int mf_ask(struct mf_stream *stream, const struct mf_request *request, const void *key, const void *meta,
           const void *value);
int mf_pull_reply(struct mf_stream *stream, struct mf_pull *pull);
int mf_pull_value(struct mf_stream *stream, struct mf_pull *pull, void *into);
int mf_pull_bytes(struct mf_stream *stream, void *into, size_t length);
int mf_pull_replaced(struct mf_stream *stream, struct mf_pull *pull, struct mf_replaced *replaced);

#endif
