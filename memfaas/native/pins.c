/* Pins (epoch-based reclamation, Fraser 2004, section 5.2.3) and the stripe locks. */
#define _GNU_SOURCE
#include <limits.h>
#include <sched.h>
#include <unistd.h>
#include <sys/syscall.h>

#include "memfaas.h"

#define WAITERS 0x80000000u

void mf_op_begin(struct mf_op *op, struct mf_memory *memory, int64_t timeout_ns) {
    op->memory = memory;
    op->timeout = timeout_ns;
    op->deadline = 0;
    op->pin = -1;
    op->stripe = -1;
    op->held_count = 0;
    op->space = 0;
    op->pieces = 0;
    op->head = 0;
    op->writer = NULL;
    op->conditional = false;
}

void mf_op_end(struct mf_op *op) {
    mf_unlock(op);
    mf_release(op);
    mf_unpin(op);
}

int64_t mf_due(struct mf_op *op) {
    if (op->deadline == 0)
        op->deadline = mf_now() + op->timeout;
    return op->deadline;
}

static uint32_t first_pin(struct mf_memory *memory) {
    /* Each thread begins at a place of its own, so that it mostly meets its own cache line. */
    static _Thread_local uint32_t mine;
    static _Atomic uint32_t threads;
    if (mine == 0)
        mine = atomic_fetch_add_explicit(&threads, 1, memory_order_relaxed) + 1;
    return (memory->participant * 8 + mine) % MF_PINS;
}

static int pin(struct mf_op *op) {
    struct mf_memory *memory = op->memory;
    struct mf_control *control = memory->control;
    uint32_t index = first_pin(memory);
    for (uint32_t tries = 0;; tries++, index = (index + 1) % MF_PINS) {
        struct mf_pin *pin = &control->pins[index];
        uint64_t none = 0;
        if (atomic_load_explicit(&pin->word, memory_order_relaxed) == 0) {
            /* Before the word: the one who advances the epoch looks at pins below the top only. */
            uint32_t top = atomic_load(&control->pin_top);
            while (top <= index && !atomic_compare_exchange_weak(&control->pin_top, &top, index + 1)) {
            }
            uint64_t word = atomic_load(&control->epoch) << 16 | (memory->participant + 1);
            op->pin = (int)index; /* first: mf_op_end must find it, whatever happens next */
            if (atomic_compare_exchange_strong(&pin->word, &none, word)) {
                uint64_t uses = atomic_load_explicit(&pin->uses, memory_order_relaxed);
                atomic_store_explicit(&pin->uses, uses + 1, memory_order_relaxed);
                return MF_OK;
            }
            op->pin = -1;
        }
        if (tries >= MF_PINS) {
            if (op->timeout == 0)
                return MF_WAIT;
            if (mf_now() > mf_due(op))
                return MF_TIMEOUT;
            mf_nap(50000);
        }
    }
}

/* What waits in frozen memory sees that it is served again, or revoked; not that it is served elsewhere, nor
 * that it must not block its thread. So it comes back soon, and its client looks around. */
#define FROZEN_NS 20000000ll

int mf_pin(struct mf_op *op) {
    int64_t patience = 0;
    _Atomic uint32_t *state = &op->memory->control->state;
    if (op->memory->generation != mf_fork_generation())
        return MF_STALE;
    for (;;) {
        int status = pin(op);
        if (status != MF_OK)
            return status;
        uint32_t now = atomic_load(state);
        if (now == MF_STATE_SERVING)
            return MF_OK;
        mf_unpin(op);
        if (now != MF_STATE_FROZEN)
            return MF_REVOKED;
        if (op->timeout == 0)
            return MF_WAIT;
        if (patience == 0)
            patience = mf_now() + FROZEN_NS < mf_due(op) ? mf_now() + FROZEN_NS : mf_due(op);
        mf_futex_wait(state, now, patience);
        if (mf_now() > patience)
            return MF_FROZEN;
    }
}

void mf_unpin(struct mf_op *op) {
    if (op->pin < 0)
        return;
    struct mf_pin *pin = &op->memory->control->pins[op->pin];
    atomic_store_explicit(&pin->retiring, 0, memory_order_relaxed);
    atomic_store_explicit(&pin->word, 0, memory_order_release);
    op->pin = -1;
}

void mf_repin(struct mf_op *op) {
    struct mf_control *control = op->memory->control;
    uint64_t word = atomic_load(&control->epoch) << 16 | (op->memory->participant + 1);
    atomic_store(&control->pins[op->pin].word, word);
}

bool mf_advance(struct mf_memory *memory) {
    struct mf_control *control = memory->control;
    uint64_t epoch = atomic_load(&control->epoch);
    uint32_t top = atomic_load(&control->pin_top);
    for (uint32_t i = 0; i < top && i < MF_PINS; i++) {
        uint64_t word = atomic_load(&control->pins[i].word);
        if (word && word >> 16 != epoch)
            return false;
    }
    return atomic_compare_exchange_strong(&control->epoch, &epoch, epoch + 1);
}

/* A lock word is 0, or its holder (participant + 1) and perhaps WAITERS. Not a robust mutex of libc:
 * that one keeps pointers in the memory that it lies in, and this memory can be written by every
 * client, hostile ones too. The function that reaps a dead participant opens its locks (reap.c). */
int mf_lock(struct mf_op *op, uint32_t stripe) {
    _Atomic uint32_t *lock = &op->memory->control->stripes[stripe].lock;
    uint32_t me = op->memory->participant + 1, seen = 0;
    op->stripe = (int)stripe;
    if (atomic_compare_exchange_strong(lock, &seen, me))
        return MF_OK;
    op->stripe = -1;
    for (int tries = 0;; tries++) {
        if (seen == 0) {
            op->stripe = (int)stripe;
            /* Others may wait still, so the next unlock must wake one. */
            if (atomic_compare_exchange_strong(lock, &seen, me | WAITERS))
                return MF_OK;
            op->stripe = -1;
        } else if (op->timeout == 0) {
            return MF_WAIT;
        } else if (tries < 20) {
            sched_yield(); /* held for some 100 ns as a rule, unless its holder was preempted */
            seen = atomic_load(lock);
        } else if (seen & WAITERS || atomic_compare_exchange_strong(lock, &seen, seen | WAITERS)) {
            mf_futex_wait(lock, seen | WAITERS, mf_due(op));
            bool revoked = atomic_load(&op->memory->control->state) == MF_STATE_REVOKED;
            if (revoked || mf_now() > mf_due(op)) {
                mf_futex_wake(lock, 1); /* it may have been for us: pass it on */
                return revoked ? MF_REVOKED : MF_TIMEOUT;
            }
            seen = atomic_load(lock);
        }
    }
}

void mf_unlock(struct mf_op *op) {
    if (op->stripe < 0)
        return;
    _Atomic uint32_t *lock = &op->memory->control->stripes[op->stripe].lock;
    if (atomic_exchange(lock, 0) & WAITERS)
        mf_futex_wake(lock, 1);
    op->stripe = -1;
}
