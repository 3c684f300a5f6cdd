/* Looks at a shard from outside, for the tests: is it whole, and what is held in it? */
#include "shard.c" /* for what it keeps to itself */

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

struct report {
    uint64_t locks, pins, spans; /* that somebody holds */
    uint64_t places;             /* participants */
    uint64_t broken;             /* slots that lead to no whole block */
    uint64_t shared;             /* blocks with two owners, or both linked and in limbo */
    uint64_t leaked;             /* blocks that are taken, neither linked nor in limbo */
    uint64_t dangling;           /* blocks that are linked or in limbo, and not taken */
    uint64_t limbo;              /* blocks that wait to be free */
    uint64_t counted_wrong;      /* spans whose `used` is not what their bits say */
    uint64_t unproved;           /* values that one-sided readers cannot trust: `linked` is not their version */
};

static void link_block(struct mf_memory *memory, uint64_t *linked, struct report *out, uint64_t offset) {
    uint32_t span;
    unsigned block = mf_span_block(memory, offset, &span);
    if (block == ~0u || offset != memory->at.heap + (uint64_t)span * MF_SPAN +
                                      (uint64_t)block * mf_class_size(memory->control->spans[span].class_)) {
        out->broken++;
        return;
    }
    uint64_t *word = &linked[(uint64_t)span * MF_SPAN_WORDS + block / 64], bit = 1ull << block % 64;
    out->shared += (*word & bit) != 0;
    *word |= bit;
}

static void check_span(struct mf_span *span, const uint64_t *linked, struct report *out) {
    uint32_t used = 0;
    for (uint32_t w = 0; w < MF_SPAN_WORDS; w++) {
        uint64_t alloc = span->alloc[w], limbo = span->limbo[w];
        used += (uint32_t)__builtin_popcountll(alloc);
        out->limbo += (uint64_t)__builtin_popcountll(limbo);
        out->shared += (uint64_t)__builtin_popcountll(linked[w] & limbo);
        out->leaked += (uint64_t)__builtin_popcountll(alloc & ~(linked[w] | limbo));
        out->dangling += (uint64_t)__builtin_popcountll((linked[w] | limbo) & ~alloc);
    }
    out->counted_wrong += span->used != used;
}

static void check_values(struct mf_memory *memory, uint64_t *linked, struct report *out) {
    struct mf_op op;
    uint8_t *value = malloc(MF_MAX_PART);
    if (!value)
        abort();
    mf_op_begin(&op, memory, 0);
    for (uint64_t i = 0; i < memory->at.groups * MF_GROUP; i++) {
        uint64_t slot = group_at(memory, 0)[i];
        if (!slot)
            continue;
        const struct mf_block *block = block_at(memory, mf_slot_offset(slot));
        bool whole = block && open_block(&op, block);
        if (whole)
            whole = block->hash == mf_hash_key(block + 1, block->key_len, block->space) &&
                    slot == mf_slot_of(block->hash, block->space, slot >> 40 & 0x7f, mf_slot_offset(slot)) &&
                    (i / MF_GROUP == mf_home_group(&memory->at, block->hash) || i / MF_GROUP == mf_other_group(&memory->at, block->hash)) &&
                    mf_get_copy(&op, value, NULL) == MF_OK;
        out->broken += !whole;
        if (!whole)
            continue;
        out->unproved += block->linked != block->version;
        link_block(memory, linked, out, mf_slot_offset(slot));
        for (uint32_t c = 0; op.chunks && c < op.pieces; c++)
            link_block(memory, linked, out, (uint64_t)((uint8_t *)op.piece[c].iov_base - memory->data));
    }
    free(value);
}

static void count_held(struct mf_control *control, uint64_t spans, struct report *out) {
    for (uint64_t i = 0; i < spans; i++)
        out->spans += control->spans[i].holder != 0;
    for (uint32_t i = 0; i < MF_STRIPES; i++)
        out->locks += control->stripes[i].lock != 0;
    for (uint32_t i = 0; i < MF_PINS; i++)
        out->pins += control->pins[i].word != 0;
    for (uint32_t i = 0; i < MF_PARTICIPANTS; i++)
        out->places += control->participants[i].state != 0;
}

/* Of memory whose data may be gone. 0 or an errno. */
int held(int control_fd, int kind, uint64_t size, struct report *out) {
    struct mf_header at;
    memset(out, 0, sizeof *out);
    mf_geometry(kind, size, &at);
    struct mf_control *control = mmap(NULL, at.control_bytes, PROT_READ, MAP_SHARED, control_fd, 0);
    if (control == MAP_FAILED)
        return errno;
    count_held(control, at.spans, out);
    munmap(control, at.control_bytes);
    return 0;
}

/* 0 or an errno. Nothing may run on the memory meanwhile. */
int fsck(int data_fd, int control_fd, struct report *out) {
    struct mf_memory memory;
    memset(out, 0, sizeof *out);
    int error = mf_map(&memory, data_fd, control_fd, 0);
    if (error)
        return error;
    uint64_t *linked = calloc(memory.at.spans * MF_SPAN_WORDS, sizeof *linked);
    if (!linked)
        return ENOMEM;
    check_values(&memory, linked, out);
    for (uint32_t i = 0; i < memory.at.spans; i++)
        check_span(&memory.control->spans[i], linked + (uint64_t)i * MF_SPAN_WORDS, out);
    count_held(memory.control, memory.at.spans, out);
    free(linked);
    mf_unmap(&memory);
    return 0;
}

/* Bytes of the block that the heap gives for so many. */
uint32_t block_size(uint64_t bytes) { return mf_class_size(mf_class_of(bytes)); }
