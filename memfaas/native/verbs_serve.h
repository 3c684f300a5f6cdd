/* What verbs_serve.c and verbs_messages.c share: the queue pairs of a function. */
#ifndef MEMFAAS_VERBS_SERVE_H
#define MEMFAAS_VERBS_SERVE_H

#include "serve.h"
#include "verbs.h"

#define MF_END_MESSAGES (2 * MF_SLOTS * MF_SLOT) /* bytes of an end's buffer before its landing area */

struct mf_end {
    struct mf_verbs_server *verbs;
    struct mf_end *next, **link; /* NULL: it has no queue pair any more, or not yet */
    struct connection *connection;
    struct mf_pair pair;
    uint8_t *buffer; /* messages received, messages to send, landing area */
    struct ibv_mr *messages, *landing; /* the latter of a shard only */
    uint32_t replies;
    bool broken;
    bool more; /* messages may have come that no event will tell of */
    bool reserved;
    int64_t stalled; /* when the reservation is given up */
    struct mf_op op; /* of the reservation */
};

struct mf_verbs_server {
    struct mf_server *server;
    struct mf_memory *memory;
    struct mf_chunks chunks; /* order of locks: the chunks' turn, then `turns`, then server->mutex */
    struct mf_turns turns;   /* for all below; the thread comes last */
    struct mf_device *device;
    struct ibv_pd *pd;
    struct ibv_comp_channel *channel;
    pthread_t thread;
    int wake; /* eventfd: the thread is to end */
    bool stopping;
    char closed[MF_WHY]; /* why nobody may come in; empty: it is open. Written by who has the chunks' turn, too */
    uint32_t closings;
    uint64_t generation;
    struct mf_end *all;
    unsigned first; /* of those, to be drained next */
    _Atomic int count; /* of those */
    int places;        /* taken, also by those who come and go */
    enum { TO_DO, IN_WORK, DONE } ahead; /* to register what nobody has asked for yet */
};

/* --- verbs_messages.c ---------------------------------------------------------------------------------------- */

bool mf_end_receive(struct mf_end *end, uint64_t slot); /* one more message, there */
bool mf_end_drain(struct mf_end *end);                  /* executes a few messages. False: there was no more */
void mf_end_lose(struct mf_end *end);                   /* the connection's thread then ends, and frees the end */

#endif
