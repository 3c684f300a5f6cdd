/* The heap: spans of 256 KiB, each cut into blocks of one size class.
 *
 * A span is held by one participant at a time, for the length of an operation; only the holder takes
 * blocks. Freeing is one atomic bit in `limbo`, by anyone; the next holder turns limbo bits into free
 * blocks once nobody can see those blocks any more (layout.h, mf_span). So at any moment a participant
 * that dies leaves unlinked blocks only in spans that it holds, and the reaper finds them there.
 *
 * The hints (a bit for each span and class: "may have a free block"; class 0: "unassigned") only speed
 * up the search; sweeps make them right again. */
#include <string.h>

#include "memfaas.h"

static uint32_t sizes[MF_CLASSES];
static unsigned classes; /* class 1 .. classes - 1 */

__attribute__((constructor)) static void make_classes(void) {
    static const uint16_t per_span[] = {2048, 1365, 1024, 819, 682, 512, 409, 341, 292, 256, 204, 170,
                                        146,  128,  102,  85,  73,  64,  56,  48,  40,  32,  28,  24,
                                        20,   16,   14,   12,  10,  8,   6,   5,   4,   3,   2,   1};
    classes = 1;
    for (size_t i = 0; i < sizeof per_span / sizeof *per_span; i++)
        sizes[classes++] = MF_SPAN / per_span[i] / MF_GRAIN * MF_GRAIN;
}

uint32_t mf_class_size(unsigned class_) { return class_ < classes ? sizes[class_] : 0; }

unsigned mf_class_of(size_t size) {
    unsigned low = 1, high = classes;
    while (low < high) {
        unsigned middle = (low + high) / 2;
        if (sizes[middle] < size)
            low = middle + 1;
        else
            high = middle;
    }
    return low < classes ? low : 0;
}

static _Atomic uint64_t *hint_word(struct mf_memory *memory, unsigned class_, uint32_t span) {
    return &memory->hints[class_ * memory->hint_words + span / 64];
}

static void hint_set(struct mf_memory *memory, unsigned class_, uint32_t span) {
    _Atomic uint64_t *word = hint_word(memory, class_, span);
    uint64_t bit = 1ull << span % 64;
    if (!(atomic_load_explicit(word, memory_order_relaxed) & bit))
        atomic_fetch_or(word, bit);
}

static void hint_clear(struct mf_memory *memory, unsigned class_, uint32_t span) {
    atomic_fetch_and(hint_word(memory, class_, span), ~(1ull << span % 64));
}

static struct mf_span *span_at(struct mf_memory *memory, uint32_t span) { return &memory->control->spans[span]; }

static unsigned class_in(struct mf_span *span) {
    uint32_t class_ = atomic_load_explicit(&span->class_, memory_order_relaxed);
    return class_ < classes ? class_ : 0; /* clients can write here */
}

bool mf_span_hold(struct mf_memory *memory, uint32_t index) {
    uint32_t none = 0;
    _Atomic uint32_t *holder = &span_at(memory, index)->holder;
    return atomic_load_explicit(holder, memory_order_relaxed) == 0 &&
           atomic_compare_exchange_strong(holder, &none, memory->participant + 1);
}

/* Only the holder writes alloc, so no locked instruction is needed. */
static uint64_t bits_of(struct mf_span *span, uint32_t word) {
    return atomic_load_explicit(&span->alloc[word], memory_order_relaxed);
}
static void set_bits(struct mf_span *span, uint32_t word, uint64_t bits) {
    atomic_store_explicit(&span->alloc[word], bits, memory_order_relaxed);
}

static uint32_t words_of(unsigned class_) { return (MF_SPAN / sizes[class_] + 63) / 64; }

/* Turns ripe limbo bits into free blocks. True when bits are left that are not ripe yet. */
static bool harvest(struct mf_memory *memory, struct mf_span *span, unsigned class_) {
    uint64_t freed[MF_SPAN_WORDS], any = 0;
    uint32_t words = words_of(class_);
    for (uint32_t w = 0; w < words; w++)
        any |= freed[w] = atomic_load(&span->limbo[w]);
    if (!any)
        return false;
    /* The bits first, then the stamp: whoever set one of them had stamped before. */
    if (atomic_load(&memory->control->epoch) < atomic_load(&span->stamp) + 2)
        return true;
    for (uint32_t w = 0; w < words; w++)
        if (freed[w]) {
            atomic_fetch_and(&span->limbo[w], ~freed[w]);
            set_bits(span, w, bits_of(span, w) & ~freed[w]);
        }
    uint32_t used = 0;
    for (uint32_t w = 0; w < words; w++)
        used += (uint32_t)__builtin_popcountll(bits_of(span, w));
    span->used = used;
    return false;
}

void mf_span_settle(struct mf_memory *memory, uint32_t index) {
    struct mf_span *span = span_at(memory, index);
    unsigned class_ = class_in(span);
    if (class_ && span->used == 0) {
        hint_clear(memory, class_, index);
        atomic_store_explicit(&span->class_, 0, memory_order_relaxed);
        class_ = 0;
    }
    if (class_ == 0 || span->used < MF_SPAN / sizes[class_])
        hint_set(memory, class_, index);
    atomic_store_explicit(&span->holder, 0, memory_order_release);
}

static void note_held(struct mf_op *op, uint32_t index) {
    uint32_t count = op->held_count;
    op->held[count] = index;
    op->held_count = count + 1;
}

static bool holds(struct mf_op *op, uint32_t index) {
    for (uint32_t i = 0; i < op->held_count; i++)
        if (op->held[i] == index)
            return true;
    return false;
}

/* A free block of a span that we hold, or 0. */
static uint64_t take(struct mf_memory *memory, uint32_t index, unsigned class_) {
    struct mf_span *span = span_at(memory, index);
    uint32_t blocks = MF_SPAN / sizes[class_], words = words_of(class_), start = span->cursor % words;
    for (uint32_t i = 0; i < words; i++) {
        uint32_t w = start + i < words ? start + i : start + i - words;
        uint64_t open = ~bits_of(span, w);
        if (w == words - 1 && blocks % 64)
            open &= (1ull << blocks % 64) - 1;
        if (open) {
            uint32_t bit = (uint32_t)__builtin_ctzll(open);
            set_bits(span, w, bits_of(span, w) | 1ull << bit);
            span->used++;
            span->cursor = w;
            return memory->at.heap + (uint64_t)index * MF_SPAN + (uint64_t)(w * 64 + bit) * sizes[class_];
        }
    }
    return 0;
}

/* Holds the span and takes a block of `class_` from it; an unassigned span is given the class. */
static uint64_t try_span(struct mf_op *op, uint32_t index, unsigned class_, bool *pending) {
    struct mf_memory *memory = op->memory;
    struct mf_span *span = span_at(memory, index);
    uint32_t has = atomic_load_explicit(&span->class_, memory_order_relaxed);
    if (has != class_ && has != 0)
        return 0;
    if (!mf_span_hold(memory, index)) {
        *pending = *pending || !holds(op, index); /* for the length of somebody's operation */
        return 0;
    }
    note_held(op, index);
    uint64_t block = 0;
    has = class_in(span);
    if (has == 0) {
        hint_clear(memory, 0, index);
        atomic_store_explicit(&span->class_, class_, memory_order_relaxed);
        has = class_;
    }
    if (has == class_) {
        if (span->used >= MF_SPAN / sizes[class_] && harvest(memory, span, class_))
            *pending = true;
        block = take(memory, index, class_);
    }
    if (block) {
        atomic_store_explicit(&memory->cursor[class_], index, memory_order_relaxed);
        return block;
    }
    op->held_count--;
    hint_clear(memory, class_, index);
    mf_span_settle(memory, index); /* sets the right hint again, if there is one */
    if (*pending)
        hint_set(memory, class_, index);
    return 0;
}

/* Looks at `most` spans at most: many may hold nothing but what others may still see. */
static uint64_t search(struct mf_op *op, unsigned hints_of, unsigned class_, uint32_t most, bool *pending) {
    struct mf_memory *memory = op->memory;
    uint32_t spans = (uint32_t)memory->at.spans;
    uint32_t from = atomic_load_explicit(&memory->cursor[class_], memory_order_relaxed) / 64;
    for (size_t i = 0; i < memory->hint_words; i++) {
        uint32_t w = (uint32_t)((from + i) % memory->hint_words);
        uint64_t bits = atomic_load_explicit(&memory->hints[hints_of * memory->hint_words + w], memory_order_relaxed);
        for (; bits; bits &= bits - 1) {
            uint32_t index = w * 64 + (uint32_t)__builtin_ctzll(bits);
            uint64_t block = index < spans ? try_span(op, index, class_, pending) : 0;
            if (block || --most == 0)
                return block;
        }
    }
    return 0;
}

/* The operation holds no reference yet, so its own pin need not hold the epoch back. */
static void advance_past_own_pin(struct mf_op *op) {
    for (int i = 0; i < 2; i++) {
        mf_repin(op);
        mf_advance(op->memory);
    }
    mf_repin(op);
}

#define FEW 8u

static uint64_t alloc_once(struct mf_op *op, unsigned class_, bool *pending) {
    struct mf_memory *memory = op->memory;
    for (uint32_t i = op->held_count; i-- > 0 && sizes[class_] < MF_SPAN;) { /* one that it holds already */
        uint32_t index = op->held[i];
        uint64_t block = class_in(span_at(memory, index)) == class_ ? take(memory, index, class_) : 0;
        if (block)
            return block;
    }
    uint32_t last = atomic_load_explicit(&memory->cursor[class_], memory_order_relaxed);
    if (class_in(span_at(memory, last)) == class_) {
        uint64_t block = try_span(op, last, class_, pending);
        if (block)
            return block;
    }
    uint64_t block = search(op, class_, class_, FEW, pending);
    if (!block && *pending) {
        /* What was freed lately is still in the cache; an unassigned span is not. */
        advance_past_own_pin(op);
        block = search(op, class_, class_, FEW, pending);
    }
    if (!block)
        block = search(op, 0, class_, UINT32_MAX, pending);
    return block ? block : search(op, class_, class_, UINT32_MAX, pending);
}

#define WAIT_FOR_LIMBO_NS 1000000000ll
#define SHORTEST_NAP_NS 200000ll
#define LONGEST_NAP_NS 20000000ll

/* Makes every hint right, and spans that are empty unassigned. `pending`: an operation that runs now
 * keeps a span, or blocks in it, that may be of use for `wanted`. */
static bool sweep(struct mf_op *op, unsigned wanted, bool *pending) {
    struct mf_memory *memory = op->memory;
    bool freed = false;
    for (uint32_t index = 0; index < memory->at.spans; index++) {
        struct mf_span *span = span_at(memory, index);
        unsigned class_ = class_in(span);
        if (!class_)
            continue;
        bool fits = class_ >= wanted;
        if (!mf_span_hold(memory, index)) {
            *pending = *pending || (fits && !holds(op, index));
            continue;
        }
        note_held(op, index);
        if ((class_ = class_in(span)) && harvest(memory, span, class_))
            *pending = true; /* when all of it is free, of any class */
        freed = freed || !class_ || span->used < MF_SPAN / sizes[class_];
        op->held_count--;
        mf_span_settle(memory, index);
    }
    return freed;
}

/* Also what was freed just now becomes unassigned, if no operation keeps it for longer than the deadline. */
bool mf_sweep(struct mf_memory *memory, int64_t deadline) {
    struct mf_op op;
    bool pending = true;
    mf_op_begin(&op, memory, deadline - mf_now());
    for (int64_t nap = SHORTEST_NAP_NS; pending && mf_pin(&op) == MF_OK; nap = nap < LONGEST_NAP_NS ? 2 * nap : nap) {
        pending = false;
        advance_past_own_pin(&op);
        sweep(&op, 0, &pending);
        mf_unpin(&op); /* while it sleeps, others must be able to use again what they freed */
        if (mf_now() + nap > deadline)
            break;
        if (pending)
            mf_nap(nap);
    }
    mf_op_end(&op);
    return !pending;
}

/* False: it is in use. */
bool mf_take_unassigned(struct mf_memory *memory, uint32_t index, uint32_t holder) {
    if (class_in(span_at(memory, index)) || !mf_span_hold(memory, index))
        return false;
    if (class_in(span_at(memory, index))) {
        mf_span_settle(memory, index);
        return false;
    }
    hint_clear(memory, 0, index);
    atomic_store(&span_at(memory, index)->holder, holder);
    return true;
}

/* In memory that is not served yet: what lies in a span. */
void mf_span_adopt(struct mf_memory *memory, uint32_t index, unsigned class_, const uint64_t *alloc, bool held) {
    struct mf_span *span = span_at(memory, index);
    uint32_t blocks = class_ && class_ < classes ? MF_SPAN / sizes[class_] : 0, used = 0;
    for (uint32_t w = 0; w < MF_SPAN_WORDS; w++) {
        uint32_t left = blocks > w * 64 ? blocks - w * 64 : 0;
        uint64_t bits = alloc[w] & (left >= 64 ? ~0ull : (1ull << left) - 1);
        set_bits(span, w, bits);
        used += (uint32_t)__builtin_popcountll(bits);
    }
    if (!used)
        return;
    span->used = used;
    hint_clear(memory, 0, index);
    atomic_store(&span->class_, class_);
    if (held)
        atomic_store(&span->holder, MF_REAPER);
    else
        mf_span_settle(memory, index);
}

/* The offset of a block, or 0: full. The operation must hold no reference into the shard. */
uint64_t mf_alloc(struct mf_op *op, unsigned class_) {
    int64_t until = 0;
    for (int64_t nap = SHORTEST_NAP_NS;; nap = nap < LONGEST_NAP_NS ? 2 * nap : nap) {
        bool pending = false;
        uint64_t block = alloc_once(op, class_, &pending);
        if (block || op->timeout == 0)
            return block; /* an impatient operation leaves the search of all spans to a patient one */
        advance_past_own_pin(op);
        pending = false;
        if (sweep(op, class_, &pending) && (block = alloc_once(op, class_, &pending)))
            return block;
        /* No span of its own: then a block that is larger than it need be. */
        for (unsigned larger = class_ + 1; larger < classes; larger++)
            if ((block = alloc_once(op, larger, &pending)))
                return block;
        if (!pending)
            return 0;
        int64_t now = mf_now();
        if (until == 0)
            until = now + WAIT_FOR_LIMBO_NS < mf_due(op) ? now + WAIT_FOR_LIMBO_NS : mf_due(op);
        if (now >= until)
            return 0;
        mf_nap(nap); /* somebody still looks at what is free, or works in its span */
    }
}

/* Only for a block that this operation took and that was never linked. */
void mf_unalloc(struct mf_op *op, uint64_t offset) {
    uint32_t index;
    unsigned block = mf_span_block(op->memory, offset, &index);
    if (block == ~0u)
        return;
    struct mf_span *span = span_at(op->memory, index);
    set_bits(span, block / 64, bits_of(span, block / 64) & ~(1ull << block % 64));
    span->used--;
}

void mf_retire(struct mf_memory *memory, uint64_t offset) {
    uint32_t index;
    unsigned block = mf_span_block(memory, offset, &index);
    if (block == ~0u)
        return; /* written by a client out of its mind; the heap keeps a hole */
    struct mf_span *span = span_at(memory, index);
    uint64_t epoch = atomic_load(&memory->control->epoch), stamp = atomic_load(&span->stamp);
    while (stamp < epoch && !atomic_compare_exchange_weak(&span->stamp, &stamp, epoch)) {
    }
    atomic_fetch_or(&span->limbo[block / 64 % MF_SPAN_WORDS], 1ull << block % 64);
    hint_set(memory, class_in(span), index);
}

void mf_release(struct mf_op *op) {
    for (uint32_t i = 0; i < op->held_count; i++)
        mf_note_written(op->memory, op->memory->at.heap + (uint64_t)op->held[i] * MF_SPAN, MF_SPAN);
    while (op->held_count) {
        uint32_t index = op->held[op->held_count - 1];
        op->held_count--;
        mf_span_settle(op->memory, index);
    }
}

void mf_heap_stats(struct mf_memory *memory, uint64_t *used, uint64_t *free_spans) {
    *used = *free_spans = 0;
    for (uint32_t index = 0; index < memory->at.spans; index++) {
        struct mf_span *span = span_at(memory, index);
        unsigned class_ = class_in(span);
        if (!class_) {
            *free_spans += atomic_load_explicit(&span->holder, memory_order_relaxed) != MF_PUNCHED;
            continue;
        }
        uint32_t limbo = 0, alloc = 0;
        for (uint32_t w = 0; w < words_of(class_); w++) {
            alloc += (uint32_t)__builtin_popcountll(bits_of(span, w));
            limbo += (uint32_t)__builtin_popcountll(atomic_load_explicit(&span->limbo[w], memory_order_relaxed));
        }
        *used += (uint64_t)(alloc > limbo ? alloc - limbo : 0) * sizes[class_];
    }
}

/* Which span a block's offset lies in, and which block of it; ~0u when it makes no sense. */
unsigned mf_span_block(struct mf_memory *memory, uint64_t offset, uint32_t *index) {
    uint64_t at = offset - memory->at.heap;
    if (offset < memory->at.heap || at >= memory->at.spans * MF_SPAN)
        return ~0u;
    *index = (uint32_t)(at / MF_SPAN);
    unsigned class_ = class_in(span_at(memory, *index));
    return class_ ? (unsigned)(at % MF_SPAN / sizes[class_]) : ~0u;
}

void mf_span_free_unlinked(struct mf_memory *memory, uint32_t index, const uint64_t *linked) {
    struct mf_span *span = span_at(memory, index);
    uint32_t used = 0;
    for (uint32_t w = 0; w < MF_SPAN_WORDS; w++) {
        set_bits(span, w, bits_of(span, w) & (linked[w] | atomic_load(&span->limbo[w])));
        used += (uint32_t)__builtin_popcountll(bits_of(span, w));
    }
    span->used = used;
    mf_span_settle(memory, index);
}

bool mf_in_limbo(struct mf_memory *memory, uint64_t offset) {
    uint32_t index;
    unsigned block = mf_span_block(memory, offset, &index);
    return block != ~0u && atomic_load(&span_at(memory, index)->limbo[block / 64 % MF_SPAN_WORDS]) >> block % 64 & 1;
}
