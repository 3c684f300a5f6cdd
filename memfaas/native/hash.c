/* XXH3 (github.com/Cyan4973/xxHash), for keys and checksums; the widest vectors that the CPU has. */
#include "hash.h"

#include "memfaas.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

uint64_t mf_hash_plain(const void *data, size_t length, uint64_t seed) {
    return XXH3_64bits_withSeed(data, length, seed);
}

#if defined(__x86_64__)
static bool wide;
__attribute__((constructor)) static void choose(void) {
    __builtin_cpu_init();
    wide = __builtin_cpu_supports("avx2");
}
uint64_t mf_hash(const void *data, size_t length, uint64_t seed) {
    return length > 240 && wide ? mf_hash_avx2(data, length, seed) : XXH3_64bits_withSeed(data, length, seed);
}
#else
uint64_t mf_hash(const void *data, size_t length, uint64_t seed) { return XXH3_64bits_withSeed(data, length, seed); }
#endif
