/* Between hash.c and hash_avx2.c. */
#include <stddef.h>
#include <stdint.h>

uint64_t mf_hash_avx2(const void *data, size_t length, uint64_t seed);
uint64_t mf_hash_copy_avx2(void *into, const void *from, size_t length, int past_cache);
