/* The client's side of a queue pair: lists of work requests, and waiting for them. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "verbs.h"

#define RECEIVED (1ull << 63) /* in wr_id: a message, in the slot of this number */
#define LOOKS 16              /* at the queue, for each one at the clock, which takes as long as several */
#define SPIN_NS 20000         /* before the thread sleeps, at least; to wake it takes about as long */
#define SPIN_MOST_NS 1000000

struct mf_remote *mf_remote_new(const char *name, char *why) {
    struct mf_device *device = mf_device_open(name, why);
    struct mf_remote *remote = device ? calloc(1, sizeof *remote) : NULL;
    if (!remote)
        return NULL;
    remote->device = device;
    remote->pd = mf_verbs.alloc_pd(device->context);
    remote->places = calloc(MF_PLACES, sizeof *remote->places);
    if (remote->pd && remote->places)
        return remote;
    snprintf(why, MF_WHY, "device %s cannot be used: %s", device->name, strerror(errno));
    mf_remote_free(remote);
    return NULL;
}

void mf_remote_free(struct mf_remote *remote) {
    if (remote->pd && remote->device->context) /* else it is the parent's */
        mf_verbs.dealloc_pd(remote->pd);
    free((void *)remote->keys);
    free((void *)remote->places);
    free(remote);
}

/* The first welcome says what there is; those of later connections must be of the same. */
static int learn(struct mf_remote *remote, const struct mf_welcome *welcome) {
    if (remote->keys)
        return welcome->generation == remote->generation && welcome->data == remote->data ? 0 : ESTALE;
    if ((welcome->kind != MF_SHARD && welcome->kind != MF_REGION) || welcome->size > 1ull << 46)
        return EPROTO;
    mf_geometry((enum mf_kind)welcome->kind, welcome->size, &remote->memory.at);
    remote->chunks = (uint32_t)((remote->memory.at.data_bytes + MF_CHUNK - 1) / MF_CHUNK);
    remote->keys = calloc(remote->chunks, sizeof *remote->keys);
    if (!remote->keys)
        return ENOMEM;
    remote->data = welcome->data;
    remote->generation = welcome->generation;
    atomic_store(&remote->keys[0], 1ull << 32 | welcome->first_key);
    return 0;
}

static bool post_receive(struct mf_queue *queue, uint64_t slot) {
    struct ibv_sge piece = {(uintptr_t)(queue->buffer + slot * MF_SLOT), MF_SLOT, queue->mr->lkey};
    struct ibv_recv_wr work = {.wr_id = RECEIVED | slot, .sg_list = &piece, .num_sge = 1}, *bad;
    return ibv_post_recv(queue->pair.qp, &work, &bad) == 0;
}

struct mf_queue *mf_queue_new(struct mf_remote *remote, struct mf_address *address, char *why) {
    struct mf_device *device = remote->device;
    struct mf_queue *queue = device->context ? calloc(1, sizeof *queue) : NULL;
    if (!queue) {
        snprintf(why, MF_WHY, "there is no memory for it");
        return NULL;
    }
    queue->remote = remote;
    queue->generation = mf_fork_generation();
    queue->buffer = mf_buffer_make(MF_QUEUE_BYTES);
    int error = queue->buffer ? 0 : ENOMEM;
    if (!error && !(queue->mr = mf_verbs.reg_mr(remote->pd, queue->buffer, MF_QUEUE_BYTES, IBV_ACCESS_LOCAL_WRITE)))
        error = mf_errno();
    if (!error && !(queue->channel = mf_verbs.create_comp_channel(device->context)))
        error = mf_errno();
    if (!error)
        error = mf_pair_make(&queue->pair, device, remote->pd, queue->channel, queue);
    if (!error) {
        *address = mf_pair_address(&queue->pair);
        return queue;
    }
    snprintf(why, MF_WHY, "device %s made no queue pair: %s%s", device->name, strerror(error),
             error == ENOMEM ? " (is `ulimit -l` too low?)" : "");
    mf_queue_free(queue);
    return NULL;
}

int mf_queue_connect(struct mf_queue *queue, const struct mf_welcome *welcome, char *why) {
    int error = mf_address_good(&welcome->address) ? learn(queue->remote, welcome) : EPROTO;
    if (!error)
        error = mf_pair_connect(&queue->pair, &welcome->address, 0);
    for (uint64_t slot = 0; !error && slot < MF_SLOTS; slot++)
        if (!post_receive(queue, slot))
            error = EIO;
    queue->landing = welcome->landing;
    queue->landing_key = welcome->landing_key;
    if (error)
        snprintf(why, MF_WHY, "the queue pair cannot be connected: %s",
                 error == ESTALE ? "its memory was registered anew" : strerror(error));
    return error;
}

void mf_queue_free(struct mf_queue *queue) {
    if (queue->generation != mf_fork_generation()) { /* the device is the parent's, and has no copy of the buffer */
        if (queue->channel)
            close(queue->channel->fd);
        free(queue);
        return;
    }
    mf_pair_free(&queue->pair);
    if (queue->channel)
        mf_verbs.destroy_comp_channel(queue->channel);
    if (queue->mr)
        mf_verbs.dereg_mr(queue->mr);
    mf_buffer_free(queue->buffer, MF_QUEUE_BYTES);
    free(queue);
}

/* --- lists ------------------------------------------------------------------------------------------------ */

static struct ibv_send_wr *add(struct mf_list *list, struct mf_queue *queue, const uint8_t *at, size_t length) {
    unsigned i = list->count++;
    list->piece[i] = (struct ibv_sge){(uintptr_t)at, (uint32_t)length, mf_key_here(queue, at)};
    list->work[i] = (struct ibv_send_wr){.sg_list = &list->piece[i], .num_sge = 1};
    if (i)
        list->work[i - 1].next = &list->work[i];
    return &list->work[i];
}

void mf_list_read(struct mf_list *list, struct mf_queue *queue, uint8_t *into, size_t length, uint64_t from,
                  uint32_t key) {
    struct ibv_send_wr *work = add(list, queue, into, length);
    work->opcode = IBV_WR_RDMA_READ;
    work->wr.rdma.remote_addr = from;
    work->wr.rdma.rkey = key;
}

void mf_list_write(struct mf_list *list, struct mf_queue *queue, const uint8_t *from, size_t length, uint64_t to,
                   uint32_t key) {
    struct ibv_send_wr *work = add(list, queue, from, length);
    work->opcode = IBV_WR_RDMA_WRITE;
    work->send_flags = length <= queue->pair.inline_max ? IBV_SEND_INLINE : 0;
    work->wr.rdma.remote_addr = to;
    work->wr.rdma.rkey = key;
}

void mf_list_message(struct mf_list *list, struct mf_queue *queue, const struct mf_request *request,
                     const struct iovec *payload, size_t count) {
    uint8_t *slot = queue->buffer + (MF_SLOTS + queue->sent++ % MF_SLOTS) * MF_SLOT;
    size_t length = sizeof *request;
    memcpy(slot, request, sizeof *request);
    for (size_t i = 0; i < count; length += payload[i++].iov_len)
        if (payload[i].iov_len) /* memcpy takes no NULL, even of no bytes */
            memcpy(slot + length, payload[i].iov_base, payload[i].iov_len);
    struct ibv_send_wr *work = add(list, queue, slot, length);
    work->opcode = IBV_WR_SEND;
    work->send_flags = length <= queue->pair.inline_max ? IBV_SEND_INLINE : 0;
}

/* A list of messages needs a signal only now and then: the replies tell that they are done. */
int mf_list_post(struct mf_list *list, struct mf_queue *queue, bool signal) {
    struct ibv_send_wr *bad;
    if (!list->count)
        return MF_OK;
    queue->posted += list->count;
    if (signal || queue->posted - queue->done > MF_SENDS / 4) {
        list->work[list->count - 1].wr_id = queue->posted;
        list->work[list->count - 1].send_flags |= IBV_SEND_SIGNALED;
    }
    int error = ibv_post_send(queue->pair.qp, list->work, &bad);
    list->count = 0;
    return error ? MF_BROKEN : MF_OK;
}

/* --- waiting ------------------------------------------------------------------------------------------------ */

/* How many completions there were; negative: one of them is an error. */
static int look(struct mf_queue *queue) {
    struct ibv_wc done[8];
    int count = ibv_poll_cq(queue->pair.cq, 8, done);
    for (int i = 0; i < count; i++) {
        if (done[i].status != IBV_WC_SUCCESS)
            return -1;
        if (!(done[i].wr_id & RECEIVED)) {
            queue->done = done[i].wr_id;
        } else {
            uint64_t at = queue->replies++ % MF_SLOTS;
            queue->order[at] = (uint16_t)(done[i].wr_id & ~RECEIVED);
            queue->length[at] = (uint16_t)done[i].byte_len;
        }
    }
    return count;
}

/* Until the device has something new, or the function has hung up. */
static int sleep_until(struct mf_queue *queue, int fd, int64_t left) {
    struct pollfd watched[2] = {{queue->channel->fd, POLLIN, 0}, {fd, POLLIN | POLLRDHUP, 0}};
    struct ibv_cq *cq;
    void *context;
    if (poll(watched, 2, (int)(left / 1000000) + 1) < 0 && errno != EINTR)
        return MF_BROKEN;
    if (watched[0].revents) {
        if (mf_verbs.get_cq_event(queue->channel, &cq, &context))
            return MF_BROKEN;
        mf_verbs.ack_cq_events(cq, 1);
        queue->armed = false;
        return MF_OK;
    }
    return watched[1].revents ? MF_BROKEN : MF_OK; /* it says nothing unasked */
}

/* For how long a thread looks before it sleeps: for as long as it takes most times, while that is worth it. */
static int64_t patience_of(const struct mf_queue *queue) {
    int64_t twice = 2 * (int64_t)queue->usual;
    return twice > SPIN_NS && twice <= SPIN_MOST_NS ? twice : SPIN_NS;
}

/* Until all work up to `done` is done, and there were so many replies. */
int mf_queue_wait(struct mf_queue *queue, int fd, uint64_t done, uint64_t replies, int64_t deadline) {
    int64_t begun = 0, now = 0, awake = 0;
    for (unsigned turn = 0; queue->done < done || queue->replies < replies;) {
        int count = look(queue), status;
        if (count < 0)
            return MF_BROKEN;
        if (count || turn++ % LOOKS)
            continue;
        now = mf_now();
        if (now >= deadline)
            return MF_TIMEOUT;
        if (!begun) {
            begun = now;
            awake = now + patience_of(queue);
        }
        if (now < awake)
            continue;
        turn = 0;
        if (!queue->armed) {
            if (ibv_req_notify_cq(queue->pair.cq, 0))
                return MF_BROKEN;
            queue->armed = true; /* and now look once more: what came before makes no event */
        } else if ((status = sleep_until(queue, fd, deadline - now)) != MF_OK)
            return status;
    }
    if (begun) {
        int64_t took = now - begun < SPIN_MOST_NS ? now - begun : SPIN_MOST_NS, usual = queue->usual;
        queue->usual = (uint32_t)(usual + (took - usual) / 8);
    }
    return MF_OK;
}

int mf_queue_reply(struct mf_queue *queue, int fd, struct mf_reply *reply, void *rest, size_t room, int64_t deadline) {
    int status = mf_queue_wait(queue, fd, 0, queue->taken + 1, deadline);
    if (status != MF_OK)
        return status;
    uint64_t at = queue->taken++ % MF_SLOTS;
    uint8_t *slot = queue->buffer + queue->order[at] * MF_SLOT;
    uint32_t length = queue->length[at];
    if (length < sizeof *reply || length > MF_SLOT)
        return MF_BROKEN;
    memcpy(reply, slot, sizeof *reply);
    if (reply->status > MF_STALE || reply->value_len != length - sizeof *reply || reply->value_len > room)
        return MF_BROKEN;
    if (reply->value_len) /* memcpy takes no NULL, even of no bytes */
        memcpy(rest, slot + sizeof *reply, reply->value_len);
    return post_receive(queue, queue->order[at]) ? reply->status : MF_BROKEN;
}

int mf_queue_test(struct mf_queue *queue, int fd, int64_t deadline) {
    struct mf_remote *remote = queue->remote;
    const struct mf_header *header = (const struct mf_header *)(queue->buffer + MF_BULK_AT);
    struct mf_list list;
    mf_list_begin(&list);
    mf_list_read(&list, queue, queue->buffer + MF_BULK_AT, sizeof *header, remote->data,
                 (uint32_t)atomic_load(&remote->keys[0]));
    int status = mf_list_post(&list, queue, true);
    if (status == MF_OK)
        status = mf_queue_wait(queue, fd, queue->posted, 0, deadline);
    if (status != MF_OK)
        return status;
    struct mf_header *at = &remote->memory.at;
    if (!at->seed) /* the first connection, which nobody else uses yet */
        at->seed = header->seed;
    bool same = header->magic == MF_MAGIC && header->format == MF_FORMAT && header->kind == at->kind &&
                header->size == at->size && header->seed == at->seed;
    return same ? MF_OK : MF_CORRUPT;
}

/* The key for bytes from this offset of DATA on, which the function may have to register first. */
int mf_queue_key(struct mf_queue *queue, struct mf_stream *stream, int64_t deadline, uint64_t offset, uint32_t *key) {
    struct mf_remote *remote = queue->remote;
    uint64_t chunk = offset / MF_CHUNK;
    if (chunk >= remote->chunks)
        return MF_BAD;
    uint64_t known = atomic_load(&remote->keys[chunk]);
    if (!known) {
        struct mf_request request = {.verb = MF_KEY, .a = chunk};
        struct mf_pull pull;
        mf_pool_hurry(stream, deadline);
        int status = mf_ask(stream, &request, NULL, NULL, NULL);
        if (status == MF_OK)
            status = mf_pull_reply(stream, &pull);
        if (status != MF_OK)
            return status;
        known = 1ull << 32 | pull.reply.a;
        atomic_store(&remote->keys[chunk], known);
    }
    *key = (uint32_t)known;
    return MF_OK;
}
