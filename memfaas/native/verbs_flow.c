/* The client's side of large transfers: unit after unit, some under way while others are checked or copied.
 *
 * What is large goes between the device and the caller's own memory, which is registered for no longer than the
 * operation takes: had it been kept, the caller could unmap it, map something else there, and the device
 * would go on with pages that nobody sees. The rest, and what the device does not take, is copied by way of the
 * queue's buffer. */
#include <errno.h>

#include "verbs.h"

#define MOST_UNITS 16

/* Deregisters it, when the device is done with it; else that must be stopped first: the caller has its memory back
 * when we return, and no answer that is late may be written there. */
static void end_loan(struct mf_queue *queue, struct mf_loan *loan) {
    if (!loan->mr)
        return;
    if (queue->done < loan->until && !queue->broken) {
        queue->broken = true;
        mf_pair_free(&queue->pair);
    }
    mf_verbs.dereg_mr(loan->mr);
    loan->mr = NULL;
}

/* Lets the device at this memory, in addition to what was lent before it. False: it has to be copied. */
static bool lend(struct mf_queue *queue, uint8_t *at, size_t length, bool written) {
    struct mf_loan *loan = &queue->loans[queue->lent++ % 2];
    int error = mf_verbs.fork_safe ? 0 : ENOTSUP;
    if (length < MF_LEND)
        return false;
    if (!error && !(loan->mr = mf_verbs.reg_mr(queue->remote->pd, at, length, written ? IBV_ACCESS_LOCAL_WRITE : 0)))
        error = errno;
    if (error) {
        atomic_store(&queue->remote->refusal, error);
        atomic_fetch_add(&queue->remote->refused, 1);
        return false;
    }
    loan->from = (uintptr_t)at;
    loan->to = loan->from + length;
    loan->until = 0;
    return true;
}

static struct mf_loan *loan_of(struct mf_queue *queue, const uint8_t *at) {
    for (struct mf_loan *loan = queue->loans; loan < queue->loans + 2; loan++)
        if (loan->mr && (uintptr_t)at >= loan->from && (uintptr_t)at < loan->to)
            return loan;
    return NULL;
}

uint32_t mf_key_here(struct mf_queue *queue, const uint8_t *at) {
    const struct mf_loan *loan = loan_of(queue, at);
    return loan ? loan->mr->lkey : queue->mr->lkey;
}

struct unit {
    uint64_t from, count, ready;
    uint8_t *here;
};

static int begin(struct mf_flow *flow, struct unit *unit) {
    struct mf_queue *queue = flow->queue;
    struct mf_loan *loan = loan_of(queue, unit->here);
    struct mf_list list;
    mf_list_begin(&list);
    int status = flow->begin(flow, &list, unit->from, unit->count, unit->here);
    if (status == MF_OK)
        status = mf_list_post(&list, queue, true);
    unit->ready = queue->posted;
    if (loan)
        loan->until = queue->posted;
    return status;
}

/* A loan covers at least as much as may be under way, so that all that used the last but one is done when the next one
 * begins. */
static int run(struct mf_flow *flow) {
    struct mf_queue *queue = flow->queue;
    struct unit under_way[MOST_UNITS], *unit;
    uint8_t *buffers = queue->buffer + MF_BULK_AT;
    const unsigned most = (unsigned)(MF_BULK / flow->unit);
    uint64_t asked = 0, lent = 0, first = 0, next = 0;
    bool direct = false;
    int status = MF_OK;
    while (status == MF_OK && (asked < flow->length || first < next)) {
        if (asked < flow->length && next - first < most) {
            uint64_t left = flow->length - asked, some = left < MF_LEND_MOST ? left : MF_LEND_MOST;
            if (asked == lent) {
                end_loan(queue, &queue->loans[queue->lent % 2]);
                direct = lend(queue, flow->data + asked, some, flow->reads);
                lent += some;
            }
            unit = &under_way[next % most];
            unit->from = asked;
            unit->count = left < flow->unit ? left : flow->unit;
            unit->here = direct ? flow->data + asked : buffers + next % most * flow->unit;
            asked += unit->count;
            next++;
            status = begin(flow, unit);
            continue;
        }
        unit = &under_way[first % most];
        status = mf_queue_wait(queue, flow->stream->fd, unit->ready, 0, flow->deadline);
        if (status != MF_OK)
            break;
        if (flow->finish(flow, unit->from, unit->count, unit->here)) {
            first++;
        } else {
            unit->here = buffers + first % most * flow->unit;
            status = begin(flow, unit);
        }
    }
    return status;
}

int mf_flow_run(struct mf_flow *flow) {
    int status = run(flow);
    if (flow->queue->done < flow->queue->posted)
        flow->queue->broken = true; /* what is under way may still come into its buffer */
    end_loan(flow->queue, &flow->queue->loans[0]);
    end_loan(flow->queue, &flow->queue->loans[1]);
    return status;
}
