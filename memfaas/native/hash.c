/* XXH3 (github.com/Cyan4973/xxHash), for keys and checksums, with the widest vectors that the CPU has. */
#include "hash.h"

#include "memfaas.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "hash_copy.h"

#if defined(__x86_64__)
static bool wide;
__attribute__((constructor)) static void choose(void) {
    __builtin_cpu_init();
    wide = __builtin_cpu_supports("avx2");
}
#define WIDE(length) (wide && (length) > XXH3_MIDSIZE_MAX)
#else
#define WIDE(length) false
#endif

uint64_t mf_hash(const void *data, size_t length, uint64_t seed) {
    return WIDE(length) ? mf_hash_avx2(data, length, seed) : XXH3_64bits_withSeed(data, length, seed);
}

uint64_t mf_hash_copy(void *into, const void *from, size_t length, bool past_cache) {
    return WIDE(length) ? mf_hash_copy_avx2(into, from, length, past_cache)
                        : copy_and_hash(into, from, length, false);
}
