/* The same as hash.c, with 32-byte vectors; called only where the CPU has them. */
#if defined(__x86_64__)
#pragma GCC target("avx2")
#include <immintrin.h>
#define XXH_VECTOR 2 /* XXH_AVX2 */
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "hash.h"
#include "hash_copy.h"

uint64_t mf_hash_avx2(const void *data, size_t length, uint64_t seed) {
    return XXH3_64bits_withSeed(data, length, seed);
}

uint64_t mf_hash_copy_avx2(void *into, const void *from, size_t length, int past_cache) {
    return past_cache ? copy_and_hash(into, from, length, 1) : copy_and_hash(into, from, length, 0);
}
#endif
