/* The function's side of the verbs fabric: its queue pairs, who comes and goes, and the thread that serves them.
 *
 * Each connection has a queue pair and an `mf_end`, which the connection's own thread frees when it ends, before
 * anybody is told that it ended. So what is known of a connection's changes (writers.c) is final then, and a
 * reservation is given up only when no write of its client can come any more.
 *
 * One thread serves all queue pairs, so none may keep it: of each it takes a few messages at a time, it executes nothing
 * that has to wait for long (the connection's own thread can: see or_wait in verbs_messages.c), and between messages
 * gives way to whoever comes in, leaves or closes. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <unistd.h>

#include "verbs_serve.h"

#define STACK (256u << 10)
#define END_BYTES (MF_END_MESSAGES + MF_LANDING)
#define LOOK_MS 1000 /* at reservations whose client may have stalled */
#define ENDS 256u    /* at once: each of a shard pins END_BYTES of this process, which count as nobody's */
#define GIVE_WAY_NS 5000000ll /* to those who come and go, who may never cease */
#define LONG_NS 1000000000ll

/* --- one connection --------------------------------------------------------------------------------------- */

/* No write of the client can land after this. */
static void disconnect(struct mf_end *end) {
    mf_pair_free(&end->pair);
    if (end->messages)
        mf_verbs.dereg_mr(end->messages);
    if (end->landing)
        mf_verbs.dereg_mr(end->landing);
    end->messages = end->landing = NULL;
}

static void silence(struct mf_end *end) {
    if (!end->link)
        return;
    *end->link = end->next;
    if (end->next)
        end->next->link = end->link;
    end->link = NULL;
    disconnect(end);
    if (--end->verbs->count == 0 && mf_region_release(end->verbs->memory))
        end->verbs->generation++; /* a link that lives on without connections must claim them again */
    if (end->reserved)
        mf_put_abort(&end->op);
    end->reserved = false;
}

/* --- the thread -------------------------------------------------------------------------------------------- */

static bool look_at_reservations(struct mf_verbs_server *verbs) {
    bool any = false;
    int64_t now = mf_now();
    for (struct mf_end *end = verbs->all; end; end = end->next) {
        if (end->reserved && now > end->stalled)
            mf_end_lose(end);
        any = any || (end->reserved && !end->broken);
    }
    return any;
}

/* Something of a kind is done in each turn, and more if nobody waits for the turn to be over. */
static bool goes_on(struct mf_verbs_server *verbs, unsigned *done) {
    return (*done)++ == 0 || !atomic_load(&verbs->turns.wanted);
}

/* What the last turn has left over, beginning with somebody else each time. */
static bool drain_more(struct mf_verbs_server *verbs) {
    unsigned done = 0, from = verbs->count ? verbs->first++ % (unsigned)verbs->count : 0;
    bool any = false;
    for (int before = 0; before < 2; before++) {
        unsigned at = 0;
        for (struct mf_end *end = verbs->all; end; end = end->next) {
            if ((at++ < from) != (before == 1))
                continue;
            if (end->more && goes_on(verbs, &done))
                end->more = mf_end_drain(end);
            any = any || end->more;
        }
    }
    return any;
}

static void *run(void *argument) {
    struct mf_verbs_server *verbs = argument;
    struct pollfd watched[2] = {{verbs->channel->fd, POLLIN, 0}, {verbs->wake, POLLIN, 0}};
    bool reserved = false, more = false;
    for (;;) {
        poll(watched, 2, more ? 0 : reserved ? LOOK_MS : -1);
        mf_turns_enter_last(&verbs->turns, GIVE_WAY_NS);
        if (verbs->stopping)
            break;
        struct ibv_cq *cq;
        void *context;
        unsigned done = 0;
        more = more && drain_more(verbs);
        while (done < ENDS && goes_on(verbs, &done)) {
            if (mf_verbs.get_cq_event(verbs->channel, &cq, &context))
                break;
            struct mf_end *end = context;
            mf_verbs.ack_cq_events(cq, 1);
            ibv_req_notify_cq(cq, 0); /* before the look: what comes after it makes a new event */
            end->more = mf_end_drain(end);
            more = more || end->more;
        }
        reserved = look_at_reservations(verbs);
        mf_turns_leave_last(&verbs->turns);
    }
    mf_turns_leave_last(&verbs->turns);
    return NULL;
}

static int start_thread(struct mf_verbs_server *verbs) {
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK);
    int error = pthread_create(&verbs->thread, &attributes, run, verbs);
    pthread_attr_destroy(&attributes);
    return error;
}

/* --- closing ------------------------------------------------------------------------------------------------ */

/* By who has the chunks' turn. */
static void close_all(struct mf_verbs_server *verbs, const char *why) {
    mf_turns_enter(&verbs->turns);
    snprintf(verbs->closed, MF_WHY, "%s", why);
    verbs->closings++;
    if (verbs->ahead == DONE)
        verbs->ahead = TO_DO;
    verbs->generation++;
    while (verbs->all) {
        struct mf_end *end = verbs->all;
        silence(end);
        mf_end_lose(end);
    }
    mf_turns_leave(&verbs->turns); /* of many chunks, what follows takes long */
    mf_chunks_drop(&verbs->chunks);
}

/* --- opening ------------------------------------------------------------------------------------------------ */

bool mf_verbs_make(struct mf_server *server) {
    struct mf_verbs_server *verbs = server->verbs = calloc(1, sizeof *verbs);
    if (!verbs || getrandom(&verbs->generation, sizeof verbs->generation, 0) != sizeof verbs->generation)
        return false; /* it is random as a function that takes the place of another one may have its keys */
    verbs->server = server;
    verbs->memory = server->memory;
    mf_turns_make(&verbs->turns);
    mf_chunks_make(&verbs->chunks, server->memory);
    return true;
}

/* With the first client; by who has both turns. */
static int prepare(struct mf_verbs_server *verbs, const char *name, char *why) {
    struct mf_device *device = verbs->pd ? verbs->device : mf_device_open(name, why);
    if (verbs->pd || !device)
        return device ? 0 : ENODEV;
    int error = ENOMEM;
    verbs->device = device;
    verbs->wake = -1;
    if (!verbs->chunks.registered)
        verbs->chunks.registered = calloc(verbs->chunks.count, sizeof(struct ibv_mr *));
    if (verbs->chunks.registered) {
        verbs->pd = mf_verbs.alloc_pd(device->context);
        verbs->channel = verbs->pd ? mf_verbs.create_comp_channel(device->context) : NULL;
        verbs->wake = eventfd(0, EFD_CLOEXEC);
        error = !verbs->channel || verbs->wake < 0 || fcntl(verbs->channel->fd, F_SETFL, O_NONBLOCK) < 0
                    ? mf_errno()
                    : start_thread(verbs);
    }
    if (!error) {
        verbs->chunks.device = device;
        verbs->chunks.pd = verbs->pd;
        return 0;
    }
    snprintf(why, MF_WHY, "device %s cannot be used: %s", device->name, strerror(error));
    if (verbs->channel)
        mf_verbs.destroy_comp_channel(verbs->channel);
    if (verbs->pd)
        mf_verbs.dealloc_pd(verbs->pd);
    if (verbs->wake >= 0)
        close(verbs->wake);
    verbs->channel = NULL;
    verbs->pd = NULL;
    return error;
}

/* Nobody waits for this: that an address cannot be reached shows only after a second. */
static int connect_end(struct mf_end *end, const struct mf_address *peer) {
    struct mf_verbs_server *verbs = end->verbs;
    int error = mf_pair_make(&end->pair, verbs->device, verbs->pd, verbs->channel, end);
    if (error)
        return error;
    end->messages = mf_verbs.reg_mr(verbs->pd, end->buffer, MF_END_MESSAGES, IBV_ACCESS_LOCAL_WRITE);
    if (!end->messages)
        return mf_errno();
    unsigned access = IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE;
    if (verbs->memory->at.kind == MF_REGION) {
        access |= IBV_ACCESS_REMOTE_ATOMIC;
    } else {
        end->landing = mf_verbs.reg_mr(verbs->pd, end->buffer + MF_END_MESSAGES, MF_LANDING,
                                       IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
        if (!end->landing)
            return mf_errno();
    }
    if ((error = mf_pair_connect(&end->pair, peer, access)))
        return error;
    for (uint64_t slot = 0; slot < MF_SLOTS; slot++)
        if (!mf_end_receive(end, slot))
            return EIO;
    return 0;
}

static void welcome_of(struct mf_end *end, uint64_t first_key, struct mf_welcome *welcome) {
    struct mf_verbs_server *verbs = end->verbs;
    *welcome = (struct mf_welcome){.address = mf_pair_address(&end->pair),
                                   .generation = verbs->generation,
                                   .kind = verbs->memory->at.kind,
                                   .size = verbs->memory->at.size,
                                   .data = (uintptr_t)verbs->memory->data,
                                   .landing = end->landing ? (uintptr_t)end->landing->addr : 0,
                                   .landing_key = end->landing ? end->landing->rkey : 0,
                                   .first_key = (uint32_t)first_key};
}

static bool is_closed(struct mf_verbs_server *verbs, char *why) {
    mf_turns_enter(&verbs->turns);
    bool closed = verbs->closed[0];
    if (closed)
        memcpy(why, verbs->closed, MF_WHY);
    mf_turns_leave(&verbs->turns);
    return closed;
}

/* Takes a place, and makes sure that there is something to connect to. */
static int admit(struct mf_verbs_server *verbs, const char *device, const struct mf_address *peer, uint32_t *closings,
                 uint64_t *first_key, char *why) {
    int error = 0;
    if (is_closed(verbs, why)) /* who closes it may have the chunks' turn for long */
        return EAGAIN;
    mf_turns_enter(&verbs->chunks.turns);
    mf_turns_enter(&verbs->turns);
    uint32_t state = atomic_load(&verbs->memory->control->state);
    if (verbs->closed[0]) {
        memcpy(why, verbs->closed, MF_WHY);
        error = EAGAIN;
    } else if (state != MF_STATE_SERVING) { /* it may be served elsewhere, and a device does not look at this */
        snprintf(why, MF_WHY, state == MF_STATE_FROZEN ? "the lease is moving" : "the lease is over");
        error = EAGAIN;
    } else if (peer->version != MF_VERBS_VERSION) {
        snprintf(why, MF_WHY, "the client speaks version %u of verbs, the function %u", peer->version,
                 MF_VERBS_VERSION);
        error = EPROTO;
    } else if (!mf_address_good(peer)) {
        snprintf(why, MF_WHY, "the client's address makes no sense");
        error = EPROTO;
    } else if (verbs->places >= (int)ENDS) {
        snprintf(why, MF_WHY, "all its %u places are taken", ENDS);
        error = EMFILE;
    } else {
        error = prepare(verbs, device, why);
    }
    verbs->places += !error;
    *closings = verbs->closings;
    bool admitted = !error;
    mf_turns_leave(&verbs->turns); /* what follows takes long, and the chunks' turn keeps it open */
    if (admitted && mf_punched(verbs->memory)) { /* to register that would bring its pages back */
        snprintf(why, MF_WHY, "some of its memory was given back to the node");
        error = EBUSY;
    } else if (admitted && (error = mf_chunks_key(&verbs->chunks, 0, first_key)))
        mf_chunks_explain(&verbs->chunks, error, why);
    if (admitted && error) {
        mf_turns_enter(&verbs->turns);
        verbs->places--;
        mf_turns_leave(&verbs->turns);
    }
    mf_turns_leave(&verbs->chunks.turns);
    return error;
}

/* It is connected: from now on it is served, unless verbs was closed meanwhile. */
static int enter(struct mf_end *end, uint32_t closings, char *why) {
    struct mf_verbs_server *verbs = end->verbs;
    if (verbs->closings != closings) {
        snprintf(why, MF_WHY, "%s", verbs->closed[0] ? verbs->closed : "its memory was registered anew");
        return EAGAIN;
    }
    end->next = verbs->all;
    end->link = &verbs->all;
    if (end->next)
        end->next->link = &end->next;
    verbs->all = end;
    verbs->count++;
    return ibv_req_notify_cq(end->pair.cq, 0);
}

static void free_end(struct mf_end *end) {
    mf_buffer_free(end->buffer, END_BYTES);
    free(end);
}

struct mf_end *mf_end_new(struct mf_server *server, const char *device, const struct mf_address *peer,
                          struct mf_welcome *welcome, char *why) {
    struct mf_verbs_server *verbs = server->verbs;
    struct mf_end *end = calloc(1, sizeof *end);
    uint64_t first_key = 0;
    uint32_t closings;
    why[0] = 0;
    if (!end || !(end->buffer = mf_buffer_make(END_BYTES))) {
        free(end);
        snprintf(why, MF_WHY, "there is no memory for it");
        return NULL;
    }
    end->verbs = verbs;
    if (admit(verbs, device, peer, &closings, &first_key, why)) {
        free_end(end);
        return NULL;
    }
    int error = connect_end(end, peer);
    mf_turns_enter(&verbs->turns);
    if (!error)
        error = enter(end, closings, why);
    if (!error)
        welcome_of(end, first_key, welcome);
    mf_turns_leave(&verbs->turns);
    if (!error)
        return end;
    if (!why[0])
        snprintf(why, MF_WHY, "device %s made no queue pair: %s", verbs->device->name, strerror(error));
    mf_end_free(end);
    return NULL;
}

void mf_end_bind(struct mf_end *end, struct connection *connection) {
    mf_turns_enter(&end->verbs->turns);
    end->connection = connection;
    if (!end->link || end->broken) /* verbs was closed meanwhile, or its first messages made no sense */
        mf_end_lose(end);
    mf_turns_leave(&end->verbs->turns);
}

void mf_end_free(struct mf_end *end) {
    struct mf_verbs_server *verbs = end->verbs;
    mf_turns_enter(&verbs->turns);
    silence(end);
    disconnect(end);
    verbs->places--;
    mf_turns_leave(&verbs->turns);
    free_end(end);
}

int mf_end_key(struct mf_end *end, uint64_t chunk, uint64_t *key) {
    struct mf_verbs_server *verbs = end->verbs;
    char why[MF_WHY];
    mf_turns_enter(&verbs->chunks.turns);
    mf_turns_enter(&verbs->turns);
    bool closed = verbs->closed[0] || !end->link;
    mf_turns_leave(&verbs->turns);
    int error = closed ? EAGAIN : mf_chunks_key(&verbs->chunks, chunk, key);
    if (error && error != EAGAIN && error != EINVAL && error != EIDRM) {
        /* What cannot be had as a whole is not served: its clients come over tcp. */
        mf_chunks_explain(&verbs->chunks, error, why);
        close_all(verbs, why);
    }
    mf_turns_leave(&verbs->chunks.turns);
    return error == 0 ? MF_OK : error == EINVAL ? MF_BAD : MF_BROKEN;
}

/* CPUs and devices do not see each other's atomics, so a region has those of the side that asked first. */
int mf_end_claim(struct mf_end *end) {
    struct mf_verbs_server *verbs = end->verbs;
    mf_turns_enter(&verbs->turns);
    int status = verbs->memory->at.kind != MF_REGION ? MF_BAD
                 : !end->link                        ? MF_BROKEN /* nobody would release them */
                 : !verbs->device->atomics           ? MF_ABSENT
                                                     : mf_region_claim(verbs->memory, MF_ATOMICS_DEVICE);
    mf_turns_leave(&verbs->turns);
    return status;
}

void mf_verbs_close(struct mf_server *server, const char *why) {
    struct mf_verbs_server *verbs = server->verbs;
    mf_turns_enter(&verbs->chunks.turns);
    close_all(verbs, why);
    mf_turns_leave(&verbs->chunks.turns);
}

void mf_verbs_reopen(struct mf_server *server) {
    struct mf_verbs_server *verbs = server->verbs;
    mf_turns_enter(&verbs->turns);
    verbs->closed[0] = 0;
    mf_turns_leave(&verbs->turns);
}

int mf_verbs_connections(struct mf_server *server) { return atomic_load(&server->verbs->count); }

/* --- registering ahead -------------------------------------------------------------------------------------- */

bool mf_verbs_ahead_begin(struct mf_server *server) {
    struct mf_verbs_server *verbs = server->verbs;
    mf_turns_enter(&verbs->turns);
    bool begins = verbs->ahead == TO_DO && verbs->count > 0 && !verbs->closed[0];
    if (begins)
        verbs->ahead = IN_WORK;
    mf_turns_leave(&verbs->turns);
    return begins;
}

/* Ends when all is registered, and also without clients: memory that is pinned is harder to get back. */
int mf_verbs_ahead(struct mf_server *server, char *why) {
    struct mf_verbs_server *verbs = server->verbs;
    why[0] = 0;
    mf_turns_enter_last(&verbs->chunks.turns, LONG_NS);
    mf_turns_enter(&verbs->turns);
    bool goes_on = verbs->count > 0 && !verbs->closed[0];
    if (!goes_on)
        verbs->ahead = TO_DO;
    mf_turns_leave(&verbs->turns);
    int error = goes_on ? mf_chunks_ahead(&verbs->chunks) : ENOENT;
    if (error && goes_on) {
        mf_turns_enter(&verbs->turns);
        verbs->ahead = DONE;
        mf_turns_leave(&verbs->turns);
    }
    if (error && error != ENOENT && error != EIDRM)
        mf_chunks_explain(&verbs->chunks, error, why);
    mf_turns_leave_last(&verbs->chunks.turns);
    return error == 0 ? MF_OK : why[0] ? MF_BROKEN : MF_ABSENT;
}

void mf_verbs_free(struct mf_server *server) {
    struct mf_verbs_server *verbs = server->verbs;
    mf_verbs_close(server, "the function ends");
    if (verbs->pd) {
        uint64_t one = 1;
        mf_turns_enter(&verbs->turns);
        verbs->stopping = true;
        mf_turns_leave(&verbs->turns);
        if (write(verbs->wake, &one, sizeof one) == sizeof one)
            pthread_join(verbs->thread, NULL);
        mf_verbs.destroy_comp_channel(verbs->channel);
        mf_verbs.dealloc_pd(verbs->pd);
        close(verbs->wake);
    }
    free(verbs->chunks.registered);
    free(verbs);
    server->verbs = NULL;
}
