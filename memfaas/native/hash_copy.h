/* Copy and XXH3 in one pass; included once for each width of vectors, after xxhash.h.
 *
 * Hashing what has just been copied costs half as much again as the copy; done stripe by stripe it
 * is nearly free, for the copy waits for memory and the hash for arithmetic. The loop is that of
 * XXH3's long hash with its default secret (seed 0); the tests check it against XXH3_64bits. */
#include <string.h>

static inline uint64_t copy_and_hash(uint8_t *into, const uint8_t *from, size_t length) {
    if (length <= XXH3_MIDSIZE_MAX) {
        memcpy(into, from, length);
        return XXH3_64bits(from, length);
    }
    XXH_ALIGN(64) xxh_u64 lanes[XXH_ACC_NB] = XXH3_INIT_ACC;
    const size_t stripes = (XXH_SECRET_DEFAULT_SIZE - XXH_STRIPE_LEN) / XXH_SECRET_CONSUME_RATE;
    const uint8_t *at = from, *last = from + length - XXH_STRIPE_LEN;
    for (size_t left = length - 1; left;) {
        size_t i = 0;
        for (; i < stripes && left >= XXH_STRIPE_LEN; i++, left -= XXH_STRIPE_LEN) {
            memcpy(into, at, XXH_STRIPE_LEN);
            __builtin_prefetch(at + 512);
            XXH3_accumulate_512(lanes, at, XXH3_kSecret + i * XXH_SECRET_CONSUME_RATE);
            at += XXH_STRIPE_LEN;
            into += XXH_STRIPE_LEN;
        }
        if (i < stripes) {
            memcpy(into, at, left + 1);
            break;
        }
        XXH3_scrambleAcc(lanes, XXH3_kSecret + XXH_SECRET_DEFAULT_SIZE - XXH_STRIPE_LEN);
        if (left == 0)
            memcpy(into, at, 1);
    }
    XXH3_accumulate_512(lanes, last, XXH3_kSecret + XXH_SECRET_DEFAULT_SIZE - XXH_STRIPE_LEN - XXH_SECRET_LASTACC_START);
    return XXH3_mergeAccs(lanes, XXH3_kSecret + XXH_SECRET_MERGEACCS_START, (xxh_u64)length * XXH_PRIME64_1);
}
