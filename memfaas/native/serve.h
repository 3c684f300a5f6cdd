/* What serve.c and verbs_serve.c share: the function's connections. */
#ifndef MEMFAAS_SERVE_H
#define MEMFAAS_SERVE_H

#include <pthread.h>

#include "wire.h"

#define OPERATION_NS 5000000000ll /* for locks; the client's own deadline is what counts for it */
#define PEER_NS 20000000000ll     /* a peer that stalls inside a request for so long is cut off: it holds memory */

struct mf_end;
struct mf_verbs_server;

struct connection {
    struct mf_server *server;
    struct connection *next, **link;
    /* Of a connection with a queue pair two threads ask for it, so there it stays the same once it is set. */
    _Atomic(struct mf_writer *) writer;
    uint64_t writer_id; /* set before `writer` */
    _Atomic bool leans; /* on its peer: its request may wait for it while it is pinned */
    struct mf_end *end; /* the queue pair beside it, or NULL */
    struct mf_stream stream;
};

struct mf_server {
    struct mf_memory *memory;
    pthread_mutex_t mutex;
    pthread_cond_t ended;
    struct connection *all;
    int count;
    bool stopping;
    bool writers[MF_WRITERS]; /* records in use */
    struct mf_verbs_server *verbs;
};

/* The record that tells whether this connection's changes took effect. NULL: the change must not be
 * made, somebody has been told that it did not happen. */
struct mf_writer *mf_writer_of(struct connection *connection, uint64_t id);

/* --- turns.c ------------------------------------------------------------------------------------------------ */

/* A mutex, one user of which gives way to all others: it could hold them up for ever, as a mutex is not fair. */
struct mf_turns {
    pthread_mutex_t mutex;
    pthread_cond_t quiet;
    _Atomic uint32_t wanted; /* by how many, the one that has it included */
};
void mf_turns_make(struct mf_turns *turns);
void mf_turns_enter(struct mf_turns *turns);
void mf_turns_leave(struct mf_turns *turns);
void mf_turns_enter_last(struct mf_turns *turns, int64_t patience); /* when nobody wants it, or after so many ns */
void mf_turns_leave_last(struct mf_turns *turns);

/* --- verbs_chunks.c: what of DATA a device can reach --------------------------------------------------------- */

struct ibv_mr;
struct mf_device;

/* Each chunk of DATA is a memory region of its own. Invariants:
 * - A chunk is registered, and all are dropped, by who has `turns`, which is never kept for longer than one registration
 *   takes (that of 64 MiB, some milliseconds). Whoever registers ahead gives way: a client that waits for a key, or a
 *   close, waits for one chunk at most.
 * - Nothing is registered while verbs is closed: who registers looks, and who closes says so, while it has `turns`.
 * - All chunks below `ahead` are registered, unless `failure` is set: then nothing more is registered ahead.
 * - The pages of a registered chunk are pinned, so the kernel does not take them back: who wants them back drops all
 *   chunks first (punch, give_back), or ends the process (the agent, when it evicts).
 * - A region's chunk counts as written from when its key is first given away, not from when it is registered: what
 *   was only registered ahead need not be copied when the lease moves. */
struct mf_chunks {
    struct mf_turns turns;
    struct mf_memory *memory;
    struct mf_device *device; /* with `pd`, set by the first client */
    struct ibv_pd *pd;
    struct ibv_mr **registered; /* by chunk, of `count` */
    uint64_t count, ahead;
    int failure; /* errno */
};
void mf_chunks_make(struct mf_chunks *chunks, struct mf_memory *memory);
/* For those who have the turn. 0 or an errno: EINVAL no such chunk, EIDRM the memory is revoked. */
int mf_chunks_key(struct mf_chunks *chunks, uint64_t chunk, uint64_t *key);
int mf_chunks_ahead(struct mf_chunks *chunks); /* one more; ENOENT: none is left */
void mf_chunks_drop(struct mf_chunks *chunks);
void mf_chunks_explain(struct mf_chunks *chunks, int error, char *why); /* which limit it was, and what to do */

#endif
