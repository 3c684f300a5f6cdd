/* The tcp fabric's frames, after the ticket's handshake. Little-endian, as every machine we run on.
 *
 * A request is the structure, then key, meta and value. A reply is the structure, then meta, the
 * checksums of a value that is not inline, and the value; to GET and READ. Requests may be sent one
 * behind the other; replies come in their order. */
#ifndef MEMFAAS_WIRE_H
#define MEMFAAS_WIRE_H

#include "memfaas.h"

enum mf_verb {
    MF_GET = 1,
    MF_PUT,
    MF_DELETE,
    MF_SCAN,
    MF_STATS,
    MF_READ,
    MF_WRITE,
    MF_SWAP,
    MF_ADD,
    MF_RESUME,
    /* of a connection that has a queue pair (verbs.h) */
    MF_KEY,
    MF_CLAIM,
    /* by its queue pair alone, as PUT and DELETE */
    MF_RESERVE,
    MF_COMMIT,
};

#define MF_HEAD_ONLY 1u /* flag of a GET: is it there? */

struct mf_request {
    uint8_t verb;
    uint8_t flags;
    uint8_t space;
    uint8_t conditional; /* PUT, DELETE: the tag expected ends the meta, or is `c` */
    uint32_t key_len;
    uint32_t meta_len;
    uint32_t landing;   /* by a queue pair: where in the landing area the rest is, if not in the message */
    uint64_t value_len; /* PUT, WRITE: that follows; READ: that is asked for */
    uint64_t a;         /* offset or cursor; PUT, DELETE, RESUME: id of the connection */
    uint64_t b;         /* SWAP: expected; PUT, DELETE, RESUME: number of the operation there */
    uint64_t c;         /* SWAP: new; ADD: amount; PUT: checksum of an inline value */
};
_Static_assert(sizeof(struct mf_request) == 48, "request");

struct mf_reply {
    uint8_t status;
    uint8_t flags;
    uint16_t meta_len;
    uint32_t segments;
    uint64_t value_len;
    uint64_t a; /* SWAP, ADD: the word before; SCAN: the next cursor; RESUME: whether it took effect */
    uint64_t checksum;
};
_Static_assert(sizeof(struct mf_reply) == 32, "reply");

#define MF_WINDOW (32u << 10) /* bytes of requests that may be under way: fits any socket's buffer */
#define MF_WINDOW_COUNT MF_REMEMBERED
#define MF_READ_MAX (64u << 20) /* bytes of a region in one request */
#define MF_BUFFER (80u << 10)
_Static_assert(sizeof(struct mf_request) + MF_MAX_KEY + MF_MAX_META < MF_BUFFER, "a request's head fits the buffer");

/* stream.c: a blocking socket with a buffer on each side. All return false when it broke or timed out. */
struct mf_stream {
    int fd;
    int error; /* errno of what broke it, 0 at its end; negative: not to be used again */
    uint64_t id; /* client: names the connection to the function, with the number of its last change */
    uint32_t number;
    size_t at, have, pending;
    bool hurried; /* it has less time than others of its pool */
    /* Aligned: into an address that is 16 mod 64, as malloc gives, some CPUs copy at a third of the speed. */
    uint8_t in[MF_BUFFER] __attribute__((aligned(64)));
    uint8_t out[MF_BUFFER] __attribute__((aligned(64)));
};
void mf_stream_open(struct mf_stream *stream, int fd, int64_t timeout_ns);
void mf_stream_patience(struct mf_stream *stream, int64_t timeout_ns); /* for each wait */
bool mf_stream_send(struct mf_stream *stream, const struct iovec *pieces, size_t count); /* after flushing */
/* Sends until the deadline what the peer takes; the pieces then are what is left. */
bool mf_stream_send_until(struct mf_stream *stream, struct iovec **pieces, size_t *count, int64_t deadline);
bool mf_stream_flush(struct mf_stream *stream);
bool mf_stream_queue(struct mf_stream *stream, const void *data, size_t length); /* any length */
bool mf_stream_fill(struct mf_stream *stream, size_t length); /* at least so much is in `in` at `at` */
bool mf_stream_read(struct mf_stream *stream, void *into, size_t length);
/* What one recv gives, at least 1 and at most `length`. 0: broken. */
size_t mf_stream_some(struct mf_stream *stream, void *into, size_t length);
bool mf_stream_skip(struct mf_stream *stream, uint64_t length);

/* serve.c */
struct mf_server;
struct mf_end;
struct mf_server *mf_server_new(struct mf_memory *memory);
int mf_server_serve(struct mf_server *server, int fd, struct mf_end *end); /* end: NULL, or a queue pair beside it */
int mf_server_connections(struct mf_server *server);
/* Ends the connections whose peer may keep an operation from coming to its end. Their requests can be made
 * again; an atomic's, which cannot, waits for nobody. */
void mf_server_cut(struct mf_server *server);
bool mf_server_stop(struct mf_server *server, int64_t timeout_ns);
void mf_server_free(struct mf_server *server);

/* dial.c: the client's side */
struct mf_queue;
struct mf_pool; /* the connections of one link */
struct mf_pool *mf_pool_new(int64_t timeout_ns);
int mf_pool_add(struct mf_pool *pool, int fd, struct mf_queue *queue); /* queue: NULL, or a queue pair beside it */
struct mf_queue *mf_queue_of(struct mf_stream *stream);
struct mf_stream *mf_pool_take(struct mf_pool *pool); /* NULL: none is free */
/* Until it is given back it waits no longer than until then: part of an operation is over already. */
void mf_pool_hurry(struct mf_stream *stream, int64_t deadline);
void mf_pool_give(struct mf_pool *pool, struct mf_stream *stream); /* a broken one is closed */
void mf_pool_close(struct mf_pool *pool);
void mf_pool_free(struct mf_pool *pool);
uint32_t mf_pool_generation(struct mf_pool *pool);

struct mf_pull { /* a reply whose value is still in the stream */
    struct mf_reply reply;
    uint8_t meta[MF_MAX_META];
    uint64_t sums[MF_MAX_SEGMENTS];
};
struct mf_change { /* a put or delete that may have taken effect; id 0: none */
    uint64_t id;
    uint32_t number;
};
void mf_number(struct mf_stream *stream, struct mf_request *request, struct mf_change *change);
int mf_ask(struct mf_stream *stream, const struct mf_request *request, const void *key, const void *meta,
           const void *value);
int mf_pull_reply(struct mf_stream *stream, struct mf_pull *pull);
int mf_pull_value(struct mf_stream *stream, struct mf_pull *pull, void *into);
int mf_pull_bytes(struct mf_stream *stream, void *into, size_t length);
int mf_pull_replaced(struct mf_stream *stream, struct mf_pull *pull, struct mf_replaced *replaced);

/* link.c: one operation on one link, whichever its fabric.
 *
 * An impatient call holds the GIL: it does what takes a microsecond, and returns MF_WAIT otherwise. A sure one
 * has the function read for it where others would read one-sided, and never gives MF_CHANGED. */
enum mf_patience { MF_IMPATIENT, MF_PATIENT, MF_SURE };
enum mf_fabric { MF_SHM = 1, MF_TCP, MF_VERBS };
struct mf_remote;
struct mf_link {
    enum mf_fabric fabric;
    _Atomic bool closed;
    int64_t timeout;
    struct mf_memory memory;  /* shm */
    struct mf_pool *pool;     /* tcp and verbs */
    struct mf_remote *remote; /* verbs */
};

struct mf_got { /* by mf_link_get, until mf_link_leave */
    uint64_t value_len;
    uint32_t meta_len;
    uint8_t flags;
    bool taken;
    bool one_sided; /* `op` has what was read, not `pull` */
    struct mf_op op;
    int64_t deadline;
    struct mf_stream *stream;
    struct mf_pull pull;
};
int mf_link_get(struct mf_link *link, int patience, uint8_t space, const void *key, uint32_t key_len,
                struct mf_got *got);
int mf_link_take(struct mf_link *link, struct mf_got *got, void *into, void *meta);
void mf_link_leave(struct mf_link *link, struct mf_got *got);
int mf_link_has(struct mf_link *link, bool patient, const void *key, uint32_t key_len);

struct mf_putting {
    uint8_t space, flags;
    bool conditional; /* on `expected`; MF_DIFFERS */
    uint64_t expected;
    bool constant; /* nobody can change the value meanwhile */
    const void *key, *meta, *value;
    uint32_t key_len, meta_len;
    uint64_t value_len;
    struct mf_change change; /* begins as {0}, is kept from attempt to attempt */
    struct mf_replaced replaced;
};
int mf_link_put(struct mf_link *link, bool patient, struct mf_putting *put);
int mf_link_delete(struct mf_link *link, bool patient, struct mf_putting *put);
int mf_link_scan(struct mf_link *link, uint8_t space, uint64_t *cursor, uint8_t *out, size_t room, size_t *length);
int mf_link_stats(struct mf_link *link, struct mf_stats *out);
int mf_link_region(struct mf_link *link, uint8_t verb, uint64_t offset, void *data, uint64_t length, uint64_t b,
                   uint64_t c, uint64_t *before);
struct mf_stream *mf_link_stream(struct mf_link *link); /* for a batch; NULL: none, or shm */

/* A batch of puts on one stream: requests one behind the other, then as many replies. MF_WAIT: replies first. */
int mf_batch_put(struct mf_stream *stream, struct mf_request *request, const void *key, const void *value);
int mf_batch_reply(struct mf_link *link, struct mf_stream *stream, struct mf_replaced *replaced);

/* A batch of gets on a stream of a verbs link, one-sided. What is not MF_OK then is to be asked for singly. */
#define MF_WANTED_MOST 64u
struct mf_wanted {
    const void *key;
    uint32_t key_len;
    int status;
    uint64_t hash, slot;
    uint64_t at; /* in the queue's buffer */
};
int mf_batch_get(struct mf_link *link, struct mf_stream *stream, struct mf_wanted *wanted, unsigned count);
int mf_batch_open(struct mf_link *link, struct mf_stream *stream, const struct mf_wanted *one, struct mf_op *found);

#endif
