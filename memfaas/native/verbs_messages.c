/* What the clients of a function ask for in messages: changes of a shard. What they write, and when, is theirs to
 * choose: nothing is believed. */
#include <string.h>
#include <sys/socket.h>

#include "verbs_serve.h"

#define SIGNAL_EVERY 16u   /* replies; the others need no completion */
#define AT_ONCE 8          /* messages of one queue pair, before another has its turn */
#define SHORT_NS 2000000ll /* that an operation may wait here */

void mf_end_lose(struct mf_end *end) {
    end->broken = true;
    if (end->connection)
        shutdown(end->connection->stream.fd, SHUT_RDWR);
}

bool mf_end_receive(struct mf_end *end, uint64_t slot) {
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
        at = end->buffer + MF_END_MESSAGES + request.landing;
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

bool mf_end_drain(struct mf_end *end) {
    struct ibv_wc done[AT_ONCE];
    int count = end->broken ? 0 : ibv_poll_cq(end->pair.cq, AT_ONCE, done);
    for (int i = 0; i < count && !end->broken; i++) {
        bool good = done[i].status == IBV_WC_SUCCESS;
        if (good && done[i].opcode & IBV_WC_RECV)
            good = is_message(&done[i]) &&
                   serve_message(end, end->buffer + done[i].wr_id * MF_SLOT, done[i].byte_len) &&
                   mf_end_receive(end, done[i].wr_id);
        if (!good)
            mf_end_lose(end);
    }
    if (count < 0)
        mf_end_lose(end);
    return count == AT_ONCE;
}
