/* Where a key's slot may be, and what a slot says: for the shard itself, and for those who read it one-sided. */
#ifndef MEMFAAS_INDEX_H
#define MEMFAAS_INDEX_H

#include <stdbool.h>

#include "layout.h"

/* Slot: fingerprint 16 | space 1 | class of the head block 7 | offset in grains 40. 0 is empty. */
static inline uint64_t mf_slot_of(uint64_t hash, unsigned space, unsigned class_, uint64_t offset) {
    return (hash & 0xffff) << 48 | (uint64_t)space << 47 | (uint64_t)class_ << 40 | offset / MF_GRAIN;
}
static inline uint64_t mf_slot_offset(uint64_t slot) { return (slot & 0xffffffffffull) * MF_GRAIN; }
static inline unsigned mf_slot_class(uint64_t slot) { return slot >> 40 & 0x7f; }
static inline unsigned mf_slot_space(uint64_t slot) { return slot >> 47 & 1; }
/* Whether the slot may be the key's: its block tells. */
static inline bool mf_slot_fits(uint64_t slot, uint64_t hash, unsigned space) {
    return slot && slot >> 47 == mf_slot_of(hash, space, 0, 0) >> 47;
}

static inline uint64_t mf_home_group(const struct mf_header *at, uint64_t hash) {
    return (uint64_t)((unsigned __int128)hash * at->groups >> 64);
}
static inline uint64_t mf_other_group(const struct mf_header *at, uint64_t hash) {
    uint64_t mixed = (hash ^ 0x9e3779b97f4a7c15ull) * 0xd6e8feb86659fd93ull;
    uint64_t group = (uint64_t)((unsigned __int128)mixed * at->groups >> 64);
    return group != mf_home_group(at, hash) ? group : (group + 1) % at->groups;
}
static inline uint64_t mf_group_offset(uint64_t group) { return MF_PAGE + group * MF_GROUP * sizeof(mf_slot); }

static inline bool mf_in_heap(const struct mf_header *at, uint64_t offset, uint64_t length) {
    uint64_t end = at->heap + at->spans * MF_SPAN;
    return offset >= at->heap && length <= end && offset <= end - length;
}

#endif
