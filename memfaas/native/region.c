/* A lease as raw memory. Reads and writes are copies: only aligned words are atomic.
 *
 * A network device's atomics and a CPU's are not atomic to each other. So those of a region belong to one side, the
 * first that asks: CPUs for good; the device until the last queue pair to the region is gone. Who comes over verbs
 * to a region of the CPUs has the function do them; to a region of the device's one has to come over verbs. */
#include <string.h>

#include "memfaas.h"

int mf_region_range(struct mf_memory *memory, uint64_t offset, uint64_t length) {
    if (memory->at.kind != MF_REGION || length > memory->at.size || offset > memory->at.size - length)
        return MF_BAD;
    return MF_OK;
}

static int start(struct mf_op *op, uint64_t offset, uint64_t length) {
    int status = mf_region_range(op->memory, offset, length);
    return status == MF_OK ? mf_pin(op) : status;
}

static uint8_t *at(struct mf_op *op, uint64_t offset) { return op->memory->data + op->memory->at.heap + offset; }

void mf_region_written(struct mf_op *op, uint64_t offset, uint64_t length) {
    if (op->pin >= 0)
        mf_note_written(op->memory, op->memory->at.heap + offset, length);
}

int mf_region_read(struct mf_op *op, uint64_t offset, void *into, uint64_t length) {
    volatile int status = start(op, offset, length);
    if (status == MF_OK)
        MF_GUARDED(op->memory->data, op->memory->at.data_bytes, memcpy(into, at(op, offset), length),
                   return MF_REVOKED);
    return status;
}

int mf_region_write(struct mf_op *op, uint64_t offset, const void *data, uint64_t length) {
    volatile int status = start(op, offset, length);
    if (status == MF_OK)
        MF_GUARDED(op->memory->data, op->memory->at.data_bytes, memcpy(at(op, offset), data, length),
                   return MF_REVOKED);
    mf_region_written(op, offset, length);
    return status;
}

int mf_region_claim(struct mf_memory *memory, enum mf_atomics side) {
    _Atomic uint32_t *atomics = &memory->control->atomics;
    uint32_t has = atomic_load_explicit(atomics, memory_order_relaxed);
    if (has == MF_ATOMICS_NOBODY && atomic_compare_exchange_strong(atomics, &has, side))
        return MF_OK;
    return has == side ? MF_OK : MF_NOT_HERE;
}

bool mf_region_release(struct mf_memory *memory) {
    uint32_t device = MF_ATOMICS_DEVICE;
    return atomic_compare_exchange_strong(&memory->control->atomics, &device, MF_ATOMICS_NOBODY);
}

static int start_word(struct mf_op *op, uint64_t offset) {
    int status = offset % 8 ? MF_BAD : start(op, offset, 8);
    return status == MF_OK ? mf_region_claim(op->memory, MF_ATOMICS_CPU) : status;
}

int mf_region_swap(struct mf_op *op, uint64_t offset, uint64_t expected, uint64_t new_, uint64_t *before) {
    volatile int status = start_word(op, offset);
    if (status == MF_OK)
        MF_GUARDED(op->memory->data, op->memory->at.data_bytes,
                   {
                       atomic_compare_exchange_strong((_Atomic uint64_t *)at(op, offset), &expected, new_);
                       *before = expected;
                   },
                   return MF_REVOKED);
    if (status == MF_OK)
        mf_region_written(op, offset, 8);
    return status;
}

int mf_region_add(struct mf_op *op, uint64_t offset, uint64_t amount, uint64_t *before) {
    volatile int status = start_word(op, offset);
    if (status == MF_OK)
        MF_GUARDED(op->memory->data, op->memory->at.data_bytes,
                   *before = atomic_fetch_add((_Atomic uint64_t *)at(op, offset), amount), return MF_REVOKED);
    if (status == MF_OK)
        mf_region_written(op, offset, 8);
    return status;
}
