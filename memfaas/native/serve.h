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
    struct mf_writer *writer;
    uint64_t writer_id;
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

#endif
