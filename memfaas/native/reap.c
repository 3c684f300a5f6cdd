/* What a dead participant left behind, put right by the function.
 *
 * 1. `retiring`: it was replacing or deleting a value. If the block is still linked, nothing happened
 *    yet; otherwise its blocks go into limbo now, if they are not there already. Its pin is still set,
 *    so no limbo bit that it set can have been harvested: setting it again is harmless.
 * 2. Its locks open. The data under them is right at every moment: a slot changes by one store. Only `linked` of the
 *    block that it leads to may not be what it should, and is set first.
 * 3. Spans that it holds become the reaper's, and its pins clear.
 * 4. In those spans: a block in them that no slot leads to, and that is not in limbo, was being
 *    written. Whoever unlinked a block before we looked had pinned it; once two epochs have passed, that
 *    one's limbo bit is there (or harvested), so what is then still neither linked nor in limbo is free.
 *    Nobody else takes blocks from these spans meanwhile, so nothing new becomes linked in them. */
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "memfaas.h"

static void finish_retiring(struct mf_memory *memory, uint32_t participant) {
    for (uint32_t i = 0; i < MF_PINS; i++) {
        struct mf_pin *pin = &memory->control->pins[i];
        uint64_t word = atomic_load(&pin->word), offset = atomic_load(&pin->retiring);
        if ((word & 0xffff) != participant + 1 || !word)
            continue;
        if (offset && !mf_is_linked(memory, offset))
            mf_retire_block(memory, offset);
        atomic_store(&pin->retiring, 0);
    }
}

static void open_locks(struct mf_memory *memory, uint32_t participant) {
    for (uint32_t i = 0; i < MF_STRIPES; i++) {
        _Atomic uint32_t *lock = &memory->control->stripes[i].lock;
        uint32_t seen = atomic_load(lock);
        if ((seen & 0x7fffffff) == participant + 1)
            MF_GUARDED(memory->data, memory->at.data_bytes, mf_relink(memory, i), (void)0);
        while ((seen & 0x7fffffff) == participant + 1 && !atomic_compare_exchange_strong(lock, &seen, 0)) {
        }
        /* Also of locks that it did not hold: it may have died with a wake that was meant for one waiter. */
        mf_futex_wake(lock, INT_MAX);
    }
}

/* It died inside of an operation, perhaps after it wrote and before it noted where. */
static void note_what_it_may_have_written(struct mf_memory *memory, uint32_t participant) {
    bool pinned = false;
    for (uint32_t i = 0; i < MF_PINS; i++) {
        uint64_t word = atomic_load(&memory->control->pins[i].word);
        pinned = pinned || (word && (word & 0xffff) == participant + 1);
    }
    if (pinned)
        mf_note_written(memory, MF_PAGE, memory->at.kind == MF_SHARD ? memory->at.heap - MF_PAGE : memory->at.size);
}

static void clear_pins(struct mf_memory *memory, uint32_t participant) {
    for (uint32_t i = 0; i < MF_PINS; i++) {
        struct mf_pin *pin = &memory->control->pins[i];
        uint64_t word = atomic_load(&pin->word);
        if (word && (word & 0xffff) == participant + 1)
            atomic_store(&pin->word, 0);
    }
}

static bool is_gone(struct mf_memory *memory) { return atomic_load(&memory->control->state) == MF_STATE_REVOKED; }

/* Waits until every operation that runs now has ended. */
static bool quiesce(struct mf_memory *memory, int64_t deadline) {
    uint64_t until = atomic_load(&memory->control->epoch) + 2;
    while (atomic_load(&memory->control->epoch) < until)
        if (!mf_advance(memory)) {
            if (mf_now() > deadline || is_gone(memory))
                return false;
            mf_nap(1000000);
        }
    return true;
}

/* The steps that never wait: another one may have died holding what this one would wait for. */
void mf_reap(struct mf_memory *memory, uint32_t participant) {
    struct mf_control *control = memory->control;
    if (memory->at.kind == MF_SHARD) {
        MF_GUARDED(memory->data, memory->at.data_bytes, finish_retiring(memory, participant), (void)0);
        if (participant == 0) /* the function itself: it worked for the connections */
            MF_GUARDED(memory->data, memory->at.data_bytes, mf_writers_recover(memory), (void)0);
        open_locks(memory, participant);
    }
    for (uint32_t i = 0; i < memory->at.spans; i++) {
        uint32_t holder = participant + 1;
        if (atomic_compare_exchange_strong(&control->spans[i].holder, &holder, MF_REAPER))
            mf_note_written(memory, memory->at.heap + (uint64_t)i * MF_SPAN, MF_SPAN);
    }
    note_what_it_may_have_written(memory, participant);
    clear_pins(memory, participant);
    if (participant)
        atomic_store(&control->participants[participant].state, 0);
}

/* Frozen memory is put right where it is served next, which may be here. False: it is frozen still. */
static bool wait_while_frozen(struct mf_memory *memory, int64_t deadline) {
    while (atomic_load(&memory->control->state) == MF_STATE_FROZEN) {
        if (mf_now() > deadline)
            return false;
        mf_futex_wait(&memory->control->state, MF_STATE_FROZEN, deadline);
    }
    return true;
}

static int mark_linked(struct mf_memory *memory, const uint32_t *spans, uint32_t count, uint64_t *linked,
                       int64_t deadline) {
    int status;
    do
        status = mf_mark_linked(memory, spans, count, linked, deadline);
    while (status == MF_FROZEN && wait_while_frozen(memory, deadline));
    return status;
}

static int put_right(struct mf_memory *memory, int64_t deadline) {
    struct mf_control *control = memory->control;
    uint32_t spans = (uint32_t)memory->at.spans, count = 0;
    int error = 0;
    for (uint32_t i = 0; i < spans; i++)
        count += atomic_load(&control->spans[i].holder) == MF_REAPER;
    if (count) {
        uint32_t *held = malloc(count * sizeof *held), n = 0;
        uint64_t *linked = calloc((size_t)count * MF_SPAN_WORDS, sizeof *linked);
        for (uint32_t i = 0; held && i < spans && n < count; i++)
            if (atomic_load(&control->spans[i].holder) == MF_REAPER)
                held[n++] = i;
        if (!held || !linked)
            error = ENOMEM;
        else if (mark_linked(memory, held, n, linked, deadline) != MF_OK || !quiesce(memory, deadline))
            error = ETIMEDOUT;
        for (uint32_t i = 0; !error && i < n; i++)
            mf_span_free_unlinked(memory, held[i], linked + (size_t)i * MF_SPAN_WORDS);
        free(held);
        free(linked);
    }
    return error;
}

/* The rest, for all who have been reaped: frees what nobody leads to in the spans that they held.
 * ETIMEDOUT: an operation did not end, or the memory is frozen; the spans stay the reaper's until the next call. */
int mf_put_right(struct mf_memory *memory, int64_t deadline) {
    static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&one_at_a_time);
    int error = put_right(memory, deadline);
    pthread_mutex_unlock(&one_at_a_time);
    return is_gone(memory) ? 0 : error;
}
