/* The function's side of the verbs fabric: its queue pairs, and the thread that executes changes.
 *
 * Each connection has a queue pair and an `mf_end`, which the connection's own thread frees when it ends, before
 * anybody is told that it ended. So what is known of a connection's changes (writers.c) is final then, and a
 * reservation is given up only when no write of its client can come any more.
 *
 * One thread serves all queue pairs, so none may keep it: of each it takes a few messages at a time, it executes nothing
 * that has to wait for long (the connection's own thread can: see or_wait), and between messages gives way to whoever
 * comes in, leaves or closes. What clients write, and when, is theirs to choose: nothing is believed. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <unistd.h>

#include "serve.h"
#include "verbs.h"

#define STACK (256u << 10)
#define SIGNAL_EVERY 16u /* replies; the others need no completion */
#define AREA (2 * MF_SLOTS * MF_SLOT)
#define END_BYTES (AREA + MF_LANDING)
#define LOOK_MS 1000 /* at reservations whose client may have stalled */
#define ENDS 256u    /* at once: each pins END_BYTES of this process, which count as nobody's */
#define AT_ONCE 8    /* messages of one queue pair, before another has its turn */
#define SHORT_NS 2000000ll /* that an operation may wait here */
#define GIVE_WAY_NS 5000000ll /* to those who come and go, who may never cease */
#define LONG_NS 1000000000ll

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

/* The connection's thread then ends, and frees the end. */
static void lose(struct mf_end *end) {
    end->broken = true;
    if (end->connection)
        shutdown(end->connection->stream.fd, SHUT_RDWR);
}

static bool post_receive(struct mf_end *end, uint64_t slot) {
    struct ibv_sge piece = {(uintptr_t)(end->buffer + slot * MF_SLOT), MF_SLOT, end->messages->lkey};
    struct ibv_recv_wr work = {.wr_id = slot, .sg_list = &piece, .num_sge = 1}, *bad;
    return ibv_post_recv(end->pair.qp, &work, &bad) == 0;
}

static bool send_reply(struct mf_end *end, struct mf_reply answer, const void *rest) {
    uint8_t *slot = end->buffer + (MF_SLOTS + end->replies % MF_SLOTS) * MF_SLOT;
    uint32_t length = (uint32_t)(sizeof answer + answer.value_len);
    memcpy(slot, &answer, sizeof answer);
    if (answer.value_len) /* memcpy takes no NULL, even of no bytes */
        memcpy(slot + sizeof answer, rest, answer.value_len);
    struct ibv_sge piece = {(uintptr_t)slot, length, end->messages->lkey};
    unsigned flags = ++end->replies % SIGNAL_EVERY == 0 ? IBV_SEND_SIGNALED : 0;
    if (length <= end->pair.inline_max)
        flags |= IBV_SEND_INLINE;
    struct ibv_send_wr work = {.sg_list = &piece, .num_sge = 1, .opcode = IBV_WR_SEND, .send_flags = flags}, *bad;
    return ibv_post_send(end->pair.qp, &work, &bad) == 0;
}

static void begin(struct mf_end *end, struct mf_op *op, const struct mf_request *request) {
    mf_op_begin(op, end->verbs->memory, SHORT_NS);
    op->space = request->space;
    op->number = (uint32_t)request->b;
    op->writer = mf_writer_of(end->connection, request->a);
}

/* What had to wait: a lock whose holder is stopped, say. The client then asks for it over the stream. */
static int or_wait(const struct mf_op *op, int status) {
    bool waited = status == MF_FULL && op->deadline && mf_now() >= op->deadline; /* for what somebody still sees */
    return waited || status == MF_TIMEOUT ? MF_WAIT : status;
}

static bool answer_change(struct mf_end *end, int status, const struct mf_replaced *replaced) {
    return send_reply(end, (struct mf_reply){.status = (uint8_t)status, .value_len = replaced->length},
                      replaced->manifest);
}

static bool serve_put(struct mf_end *end, const struct mf_request *request, const uint8_t *payload) {
    const uint8_t *key = payload, *meta = key + request->key_len, *value = meta + request->meta_len;
    struct mf_replaced replaced = {0};
    struct mf_op op;
    begin(end, &op, request);
    if (!op.writer)
        return false;
    int status = MF_CORRUPT;
    if (mf_value_sum(meta, request->meta_len, value, request->value_len) == request->c)
        status = mf_put(&op, key, request->key_len, meta, request->meta_len, value, request->value_len, request->flags,
                        &replaced);
    mf_op_end(&op);
    return answer_change(end, or_wait(&op, status), &replaced);
}

static bool serve_delete(struct mf_end *end, const struct mf_request *request, const uint8_t *key) {
    struct mf_replaced replaced = {0};
    struct mf_op op;
    begin(end, &op, request);
    if (!op.writer)
        return false;
    int status = mf_delete(&op, key, request->key_len, &replaced);
    mf_op_end(&op);
    return answer_change(end, or_wait(&op, status), &replaced);
}

/* The whole spans of a large value, for the client to write into: see put_chunked of serve.c. */
static bool serve_reserve(struct mf_end *end, const struct mf_request *request) {
    uint64_t offsets[MF_MAX_PART / MF_SPAN];
    if (end->reserved) /* it has given that up, and its writes have come before this message */
        mf_put_abort(&end->op);
    mf_op_begin(&end->op, end->verbs->memory, SHORT_NS);
    int status = mf_put_reserve_spans(&end->op, request->key_len, request->meta_len, request->value_len);
    status = or_wait(&end->op, status);
    end->reserved = status == MF_OK;
    if (status != MF_OK) {
        mf_op_end(&end->op);
        return send_reply(end, (struct mf_reply){.status = (uint8_t)status}, NULL);
    }
    mf_unpin(&end->op);
    end->stalled = mf_now() + PEER_NS;
    for (uint32_t i = 0; i < end->op.pieces; i++)
        offsets[i] = (uint64_t)((uint8_t *)end->op.piece[i].iov_base - end->verbs->memory->data);
    return send_reply(end, (struct mf_reply){.status = MF_OK, .value_len = end->op.pieces * sizeof *offsets}, offsets);
}

static void copy_tail(struct mf_op *op, uint32_t from, const uint8_t *tail) {
    for (uint32_t i = from; i < op->pieces; tail += op->piece[i++].iov_len)
        memcpy(op->piece[i].iov_base, tail, op->piece[i].iov_len);
}

/* The landing area has checksums, key, meta, and what of the value is no whole span. */
static bool serve_commit(struct mf_end *end, const struct mf_request *request, const uint8_t *payload) {
    struct mf_op *op = &end->op;
    struct mf_memory *memory = end->verbs->memory;
    if (!end->reserved || op->key_len != request->key_len || op->meta_len != request->meta_len ||
        op->value_len != request->value_len)
        return false;
    const uint8_t *key = payload + mf_segments_of(op->value_len) * sizeof *op->sums, *meta = key + op->key_len;
    const uint32_t spans = op->pieces;
    struct mf_replaced replaced = {0};
    op->writer = mf_writer_of(end->connection, request->a);
    op->number = (uint32_t)request->b;
    op->space = request->space;
    op->deadline = 0; /* SHORT_NS from now */
    if (!op->writer)
        return false;
    end->reserved = false;
    volatile int status = mf_put_reserve_rest(op);
    if (status == MF_OK) {
        memcpy(op->sums, payload, op->segments * sizeof *op->sums);
        MF_GUARDED(memory->data, memory->at.data_bytes, copy_tail(op, spans, meta + op->meta_len), status = MF_REVOKED);
        if (status == MF_OK)
            status = mf_put_commit(op, key, meta, request->flags, &replaced);
        else
            mf_put_abort(op);
    }
    mf_op_end(op);
    return answer_change(end, or_wait(op, status), &replaced);
}

/* False: what came is not a request, or must not be executed. */
static bool serve_message(struct mf_end *end, const uint8_t *message, uint32_t length) {
    struct mf_request request;
    if (!end->connection || length < sizeof request || end->verbs->memory->at.kind != MF_SHARD)
        return false;
    memcpy(&request, message, sizeof request);
    uint64_t sums = request.verb == MF_COMMIT ? mf_segments_of(request.value_len) * sizeof(uint64_t) : 0;
    uint64_t values = request.verb == MF_PUT ? request.value_len : request.verb == MF_COMMIT ? request.value_len % MF_SPAN : 0;
    if (request.key_len > MF_MAX_KEY || request.meta_len > MF_MAX_META || request.value_len > MF_MAX_PART ||
        request.space > 1 || ((request.a == 0 || request.b == 0) && request.verb != MF_RESERVE))
        return false;
    if ((request.verb == MF_RESERVE || request.verb == MF_COMMIT) &&
        mf_is_inline(request.key_len, request.meta_len, request.value_len))
        return false;
    if (request.verb == MF_RESERVE)
        return serve_reserve(end, &request);
    uint64_t payload = sums + request.key_len + request.meta_len + values;
    const uint8_t *at = message + sizeof request;
    if (length == sizeof request) { /* else it is in the message itself */
        at = end->buffer + AREA + request.landing;
        if (request.landing > MF_LANDING || payload > MF_LANDING - request.landing)
            return false;
    } else if (payload != length - sizeof request)
        return false;
    switch (request.verb) {
    case MF_PUT:
        return serve_put(end, &request, at);
    case MF_DELETE:
        return serve_delete(end, &request, at);
    case MF_COMMIT:
        return serve_commit(end, &request, at);
    default:
        return false;
    }
}

/* A WRITE with a number has the code of a message too, but nothing of it is in the slot: its length says how
 * much was written elsewhere. */
static bool is_message(const struct ibv_wc *done) { return done->opcode == IBV_WC_RECV && done->byte_len <= MF_SLOT; }

/* False: there was no more. */
static bool drain(struct mf_end *end) {
    struct ibv_wc done[AT_ONCE];
    int count = end->broken ? 0 : ibv_poll_cq(end->pair.cq, AT_ONCE, done);
    for (int i = 0; i < count && !end->broken; i++) {
        bool good = done[i].status == IBV_WC_SUCCESS;
        if (good && done[i].opcode & IBV_WC_RECV)
            good = is_message(&done[i]) &&
                   serve_message(end, end->buffer + done[i].wr_id * MF_SLOT, done[i].byte_len) &&
                   post_receive(end, done[i].wr_id);
        if (!good)
            lose(end);
    }
    if (count < 0)
        lose(end);
    return count == AT_ONCE;
}

/* --- the thread -------------------------------------------------------------------------------------------- */

static bool look_at_reservations(struct mf_verbs_server *verbs) {
    bool any = false;
    int64_t now = mf_now();
    for (struct mf_end *end = verbs->all; end; end = end->next) {
        if (end->reserved && now > end->stalled)
            lose(end);
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
                end->more = drain(end);
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
            end->more = drain(end);
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
        lose(end);
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
    end->messages = mf_verbs.reg_mr(verbs->pd, end->buffer, AREA, IBV_ACCESS_LOCAL_WRITE);
    if (!end->messages)
        return mf_errno();
    unsigned access = IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE;
    if (verbs->memory->at.kind == MF_REGION) {
        access |= IBV_ACCESS_REMOTE_ATOMIC;
    } else {
        end->landing = mf_verbs.reg_mr(verbs->pd, end->buffer + AREA, MF_LANDING,
                                       IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
        if (!end->landing)
            return mf_errno();
    }
    if ((error = mf_pair_connect(&end->pair, peer, access)))
        return error;
    for (uint64_t slot = 0; slot < MF_SLOTS; slot++)
        if (!post_receive(end, slot))
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
        lose(end);
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
