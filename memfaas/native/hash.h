#include <stddef.h>
#include <stdint.h>
uint64_t mf_hash_plain(const void *data, size_t length, uint64_t seed);
#if defined(__x86_64__)
uint64_t mf_hash_avx2(const void *data, size_t length, uint64_t seed);
#endif
