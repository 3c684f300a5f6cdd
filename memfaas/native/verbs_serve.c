/* The function's side of the verbs fabric: what is registered, and the thread that executes changes.
 *
 * Each connection has a queue pair and an `mf_end`, which the connection's own thread frees when it ends, before
 * anybody is told that it ended. So what is known of a connection's changes (writers.c) is final then, and a
 * reservation is given up only when no write of its client can come any more. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "serve.h"
#include "verbs.h"

#define STACK (256u << 10)
#define SIGNAL_EVERY 16u /* replies; the others need no completion */
#define AREA (2 * MF_SLOTS * MF_SLOT)
#define END_BYTES (AREA + MF_LANDING)
#define LOOK_MS 1000 /* at reservations whose client may have stalled */

struct mf_end {
    struct mf_verbs_server *verbs;
    struct mf_end *next, **link; /* NULL: it has no queue pair any more */
    struct connection *connection;
    struct mf_pair pair;
    uint8_t *buffer; /* messages received, messages to send, landing area */
    struct ibv_mr *messages, *landing;
    uint32_t replies;
    bool broken;
    bool reserved;
    int64_t stalled; /* when the reservation is given up */
    struct mf_op op; /* of the reservation */
};

struct mf_verbs_server {
    struct mf_server *server;
    struct mf_memory *memory;
    pthread_mutex_t registering; /* taken before `mutex`: it takes long */
    pthread_mutex_t mutex;
    struct mf_device *device;
    struct ibv_pd *pd;
    struct ibv_comp_channel *channel;
    pthread_t thread;
    int wake; /* eventfd: the thread is to end */
    bool stopping;
    char closed[MF_WHY]; /* why nobody may come in; empty: it is open */
    uint64_t generation;
    uint64_t chunks;
    struct ibv_mr **registered; /* by chunk */
    struct mf_end *all;
    int count;
};

/* --- what is registered ----------------------------------------------------------------------------------- */

static int access_of(const struct mf_memory *memory) {
    int access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE;
    return memory->at.kind == MF_REGION ? access | IBV_ACCESS_REMOTE_ATOMIC : access;
}

/* The key of a chunk, which is registered now if it was not. `registering` is held. */
static int register_chunk(struct mf_verbs_server *verbs, uint64_t chunk, uint64_t *key) {
    struct mf_memory *memory = verbs->memory;
    if (chunk >= verbs->chunks)
        return EINVAL;
    if (!verbs->registered[chunk]) {
        uint64_t from = chunk * MF_CHUNK, to = from + MF_CHUNK;
        if (to > memory->at.data_bytes)
            to = memory->at.data_bytes;
        /* From here on the pages are pinned: who cuts the memory off must end us, or they are not free. It revokes
         * first, and looks then; we the other way round, so one of us sees the other. */
        atomic_store(&memory->control->registered, 1);
        if (atomic_load(&memory->control->state) == MF_STATE_REVOKED)
            return EIDRM;
        verbs->registered[chunk] = mf_verbs.reg_mr(verbs->pd, memory->data + from, to - from, access_of(memory));
        if (!verbs->registered[chunk])
            return errno;
        /* What is written one-sided into a region, nobody notes. (Into a shard's spans: who commits it.) */
        if (memory->at.kind == MF_REGION)
            mf_note_written(memory, from, to - from);
    }
    *key = verbs->registered[chunk]->rkey;
    return 0;
}

/* --- one connection --------------------------------------------------------------------------------------- */

/* No write of the client can land after this. */
static void silence(struct mf_end *end) {
    if (!end->link)
        return;
    *end->link = end->next;
    if (end->next)
        end->next->link = end->link;
    end->link = NULL;
    mf_pair_free(&end->pair);
    if (--end->verbs->count == 0 && mf_region_release(end->verbs->memory))
        end->verbs->generation++; /* a link that lives on without connections must claim them again */
    if (end->reserved)
        mf_put_abort(&end->op);
    end->reserved = false;
    if (end->messages)
        mf_verbs.dereg_mr(end->messages);
    if (end->landing)
        mf_verbs.dereg_mr(end->landing);
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
    mf_op_begin(op, end->verbs->memory, OPERATION_NS);
    op->space = request->space;
    op->number = (uint32_t)request->b;
    op->writer = mf_writer_of(end->connection, request->a);
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
    return answer_change(end, status, &replaced);
}

static bool serve_delete(struct mf_end *end, const struct mf_request *request, const uint8_t *key) {
    struct mf_replaced replaced = {0};
    struct mf_op op;
    begin(end, &op, request);
    if (!op.writer)
        return false;
    int status = mf_delete(&op, key, request->key_len, &replaced);
    mf_op_end(&op);
    return answer_change(end, status, &replaced);
}

/* The whole spans of a large value, for the client to write into: see put_chunked of serve.c. */
static bool serve_reserve(struct mf_end *end, const struct mf_request *request) {
    uint64_t offsets[MF_MAX_PART / MF_SPAN];
    if (end->reserved) /* it has given that up, and its writes have come before this message */
        mf_put_abort(&end->op);
    mf_op_begin(&end->op, end->verbs->memory, OPERATION_NS);
    int status = mf_put_reserve_spans(&end->op, request->key_len, request->meta_len, request->value_len);
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
    op->deadline = 0; /* the peer's time is not ours */
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
    return answer_change(end, status, &replaced);
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

static void drain(struct mf_end *end) {
    struct ibv_wc done[16];
    int count = 0;
    while (!end->broken && (count = ibv_poll_cq(end->pair.cq, 16, done)) > 0)
        for (int i = 0; i < count && !end->broken; i++) {
            bool good = done[i].status == IBV_WC_SUCCESS;
            if (good && done[i].opcode & IBV_WC_RECV)
                good = serve_message(end, end->buffer + done[i].wr_id * MF_SLOT, done[i].byte_len) &&
                       post_receive(end, done[i].wr_id);
            if (!good)
                lose(end);
        }
    if (count < 0)
        lose(end);
}

/* --- the thread -------------------------------------------------------------------------------------------- */

static bool look_at_reservations(struct mf_verbs_server *verbs) {
    bool any = false;
    int64_t now = mf_now();
    for (struct mf_end *end = verbs->all; end; end = end->next) {
        if (end->reserved && now > end->stalled)
            lose(end);
        any = any || end->reserved;
    }
    return any;
}

static void *run(void *argument) {
    struct mf_verbs_server *verbs = argument;
    struct pollfd watched[2] = {{verbs->channel->fd, POLLIN, 0}, {verbs->wake, POLLIN, 0}};
    bool reserved = false;
    for (;;) {
        poll(watched, 2, reserved ? LOOK_MS : -1);
        pthread_mutex_lock(&verbs->mutex);
        if (verbs->stopping)
            break;
        struct ibv_cq *cq;
        void *end;
        while (mf_verbs.get_cq_event(verbs->channel, &cq, &end) == 0) {
            mf_verbs.ack_cq_events(cq, 1);
            ibv_req_notify_cq(cq, 0); /* before the look: what comes after it makes a new event */
            drain(end);
        }
        reserved = look_at_reservations(verbs);
        pthread_mutex_unlock(&verbs->mutex);
    }
    pthread_mutex_unlock(&verbs->mutex);
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

/* --- opening ------------------------------------------------------------------------------------------------ */

static struct mf_verbs_server *server_of(struct mf_server *server) {
    pthread_mutex_lock(&server->mutex);
    struct mf_verbs_server *verbs = server->verbs;
    if (!verbs && (verbs = calloc(1, sizeof *verbs))) {
        verbs->server = server;
        verbs->memory = server->memory;
        verbs->chunks = (server->memory->at.data_bytes + MF_CHUNK - 1) / MF_CHUNK;
        pthread_mutex_init(&verbs->mutex, NULL);
        pthread_mutex_init(&verbs->registering, NULL);
        server->verbs = verbs;
    }
    pthread_mutex_unlock(&server->mutex);
    return verbs;
}

/* With the first client; both mutexes are held. */
static int prepare(struct mf_verbs_server *verbs, const char *name, char *why) {
    struct mf_device *device = verbs->pd ? verbs->device : mf_device_open(name, why);
    if (verbs->pd || !device)
        return device ? 0 : ENODEV;
    int error = ENOMEM;
    verbs->device = device;
    verbs->wake = -1;
    if (!verbs->registered)
        verbs->registered = calloc(verbs->chunks, sizeof(struct ibv_mr *));
    if (verbs->registered) {
        verbs->pd = mf_verbs.alloc_pd(device->context);
        verbs->channel = verbs->pd ? mf_verbs.create_comp_channel(device->context) : NULL;
        verbs->wake = eventfd(0, EFD_CLOEXEC);
        error = !verbs->channel || verbs->wake < 0 || fcntl(verbs->channel->fd, F_SETFL, O_NONBLOCK) < 0
                    ? errno
                    : start_thread(verbs);
    }
    if (!error)
        return 0;
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

static int connect_end(struct mf_end *end, const struct mf_address *peer) {
    struct mf_verbs_server *verbs = end->verbs;
    int error = mf_pair_make(&end->pair, verbs->device, verbs->pd, verbs->channel, end);
    if (error)
        return error;
    end->messages = mf_verbs.reg_mr(verbs->pd, end->buffer, AREA, IBV_ACCESS_LOCAL_WRITE);
    end->landing = mf_verbs.reg_mr(verbs->pd, end->buffer + AREA, MF_LANDING,
                                   IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
    if (!end->messages || !end->landing)
        return errno;
    unsigned access = IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE;
    if (verbs->memory->at.kind == MF_REGION)
        access |= IBV_ACCESS_REMOTE_ATOMIC;
    if ((error = mf_pair_connect(&end->pair, peer, access)))
        return error;
    for (uint64_t slot = 0; slot < MF_SLOTS; slot++)
        if (!post_receive(end, slot))
            return EIO;
    return ibv_req_notify_cq(end->pair.cq, 0);
}

static void welcome_of(struct mf_end *end, uint64_t first_key, struct mf_welcome *welcome) {
    struct mf_verbs_server *verbs = end->verbs;
    *welcome = (struct mf_welcome){.address = mf_pair_address(&end->pair),
                                   .generation = verbs->generation,
                                   .kind = verbs->memory->at.kind,
                                   .size = verbs->memory->at.size,
                                   .data = (uintptr_t)verbs->memory->data,
                                   .landing = (uintptr_t)(end->buffer + AREA),
                                   .landing_key = end->landing->rkey,
                                   .first_key = (uint32_t)first_key};
}

struct mf_end *mf_end_new(struct mf_server *server, const char *device, const struct mf_address *peer,
                          struct mf_welcome *welcome, char *why) {
    struct mf_verbs_server *verbs = server_of(server);
    struct mf_end *end = verbs ? calloc(1, sizeof *end) : NULL;
    uint64_t first_key = 0;
    int error = end && (end->buffer = mf_buffer_make(END_BYTES)) ? 0 : ENOMEM;
    why[0] = 0;
    if (error) {
        free(end);
        snprintf(why, MF_WHY, "there is no memory for it");
        return NULL;
    }
    end->verbs = verbs;
    pthread_mutex_lock(&verbs->registering);
    pthread_mutex_lock(&verbs->mutex);
    if (verbs->closed[0]) {
        memcpy(why, verbs->closed, MF_WHY);
        error = EAGAIN;
    } else if (!mf_address_good(peer)) {
        snprintf(why, MF_WHY, "the client's address makes no sense");
        error = EPROTO;
    } else if (mf_punched(verbs->memory)) { /* to register that would bring its pages back */
        snprintf(why, MF_WHY, "some of its memory was given back to the node");
        error = EBUSY;
    } else {
        error = prepare(verbs, device, why);
    }
    pthread_mutex_unlock(&verbs->mutex); /* what follows takes long, and `registering` keeps it open */
    if (!error && (error = register_chunk(verbs, 0, &first_key)))
        snprintf(why, MF_WHY, "its memory cannot be registered: %s", strerror(error));
    pthread_mutex_lock(&verbs->mutex);
    if (!error) {
        end->next = verbs->all;
        end->link = &verbs->all;
        if (end->next)
            end->next->link = &end->next;
        verbs->all = end;
        verbs->count++;
        if ((error = connect_end(end, peer))) {
            snprintf(why, MF_WHY, "device %s made no queue pair: %s", verbs->device->name, strerror(error));
            silence(end);
        } else
            welcome_of(end, first_key, welcome);
    }
    pthread_mutex_unlock(&verbs->mutex);
    pthread_mutex_unlock(&verbs->registering);
    if (!error)
        return end;
    mf_buffer_free(end->buffer, END_BYTES);
    free(end);
    return NULL;
}

void mf_end_bind(struct mf_end *end, struct connection *connection) {
    pthread_mutex_lock(&end->verbs->mutex);
    end->connection = connection;
    if (!end->link)
        lose(end); /* it was closed meanwhile */
    pthread_mutex_unlock(&end->verbs->mutex);
}

void mf_end_free(struct mf_end *end) {
    pthread_mutex_lock(&end->verbs->mutex);
    silence(end);
    pthread_mutex_unlock(&end->verbs->mutex);
    mf_buffer_free(end->buffer, END_BYTES);
    free(end);
}

int mf_end_key(struct mf_end *end, uint64_t chunk, uint64_t *key) {
    struct mf_verbs_server *verbs = end->verbs;
    pthread_mutex_lock(&verbs->registering);
    pthread_mutex_lock(&verbs->mutex);
    bool closed = verbs->closed[0] || !end->link;
    pthread_mutex_unlock(&verbs->mutex);
    int error = closed ? EAGAIN : register_chunk(verbs, chunk, key);
    pthread_mutex_unlock(&verbs->registering);
    return error == 0 ? MF_OK : error == EINVAL ? MF_BAD : MF_BROKEN;
}

/* CPUs and devices do not see each other's atomics, so a region has those of the side that asked first. */
int mf_end_claim(struct mf_end *end) {
    if (!end->verbs->device->atomics)
        return MF_ABSENT;
    return mf_region_claim(end->verbs->memory, MF_ATOMICS_DEVICE);
}

/* --- closing ------------------------------------------------------------------------------------------------ */

void mf_verbs_close(struct mf_server *server, const char *why) {
    struct mf_verbs_server *verbs = server_of(server);
    if (!verbs)
        return; /* nobody can come in either */
    pthread_mutex_lock(&verbs->registering);
    pthread_mutex_lock(&verbs->mutex);
    snprintf(verbs->closed, MF_WHY, "%s", why);
    verbs->generation++;
    while (verbs->all) {
        struct mf_end *end = verbs->all;
        silence(end);
        lose(end);
    }
    for (uint64_t i = 0; verbs->registered && i < verbs->chunks; i++)
        if (verbs->registered[i]) {
            mf_verbs.dereg_mr(verbs->registered[i]);
            verbs->registered[i] = NULL;
        }
    atomic_store(&verbs->memory->control->registered, 0);
    pthread_mutex_unlock(&verbs->mutex);
    pthread_mutex_unlock(&verbs->registering);
}

void mf_verbs_reopen(struct mf_server *server) {
    struct mf_verbs_server *verbs = server_of(server);
    if (!verbs)
        return;
    pthread_mutex_lock(&verbs->mutex);
    verbs->closed[0] = 0;
    pthread_mutex_unlock(&verbs->mutex);
}

int mf_verbs_connections(struct mf_server *server) {
    struct mf_verbs_server *verbs = server_of(server);
    if (!verbs)
        return 0;
    pthread_mutex_lock(&verbs->mutex);
    int count = verbs->count;
    pthread_mutex_unlock(&verbs->mutex);
    return count;
}

void mf_verbs_free(struct mf_server *server) {
    struct mf_verbs_server *verbs = server->verbs;
    if (!verbs)
        return;
    mf_verbs_close(server, "the function ends");
    if (verbs->pd) {
        uint64_t one = 1;
        pthread_mutex_lock(&verbs->mutex);
        verbs->stopping = true;
        pthread_mutex_unlock(&verbs->mutex);
        if (write(verbs->wake, &one, sizeof one) == sizeof one)
            pthread_join(verbs->thread, NULL);
        mf_verbs.destroy_comp_channel(verbs->channel);
        mf_verbs.dealloc_pd(verbs->pd);
        close(verbs->wake);
    }
    free(verbs->registered);
    free(verbs);
    server->verbs = NULL;
}
