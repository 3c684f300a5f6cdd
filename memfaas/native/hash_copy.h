/* Copy and XXH3 in one pass; included once for each instruction set, after xxhash.h.
 *
 * Hashing a value after it was copied costs as much again as the copy; done word by word on the way it
 * is nearly free, for the copy waits for memory and the hash for arithmetic. The loop is that of XXH3's
 * long hash with its default secret (seed 0); the tests check it against XXH3_64bits. Each word is read
 * once, so the hash is that of the copy, also when another thread is changing the source. */
#include <string.h>

#define STRIPES ((XXH_SECRET_DEFAULT_SIZE - XXH_STRIPE_LEN) / XXH_SECRET_CONSUME_RATE)
#define BLOCK (STRIPES * XXH_STRIPE_LEN)

/* Some stripes of one block: XXH3's accumulate, with a store. */
static inline void copy_stripes(xxh_u64 *lanes, uint8_t *into, const uint8_t *from, size_t count, int past_cache) {
#if defined(__AVX2__)
    __m256i low = _mm256_load_si256((__m256i *)lanes), high = _mm256_load_si256((__m256i *)(lanes + 4));
    for (size_t i = 0; i < count; i++, into += 64, from += 64) {
        const uint8_t *secret = XXH3_kSecret + i * XXH_SECRET_CONSUME_RATE;
        __m256i a = _mm256_loadu_si256((const __m256i *)from), b = _mm256_loadu_si256((const __m256i *)(from + 32));
        if (past_cache) {
            _mm256_stream_si256((__m256i *)into, a);
            _mm256_stream_si256((__m256i *)(into + 32), b);
        } else {
            _mm256_storeu_si256((__m256i *)into, a);
            _mm256_storeu_si256((__m256i *)(into + 32), b);
        }
        __builtin_prefetch(from + 512);
        __m256i x = _mm256_xor_si256(a, _mm256_loadu_si256((const __m256i *)secret));
        __m256i y = _mm256_xor_si256(b, _mm256_loadu_si256((const __m256i *)(secret + 32)));
        low = _mm256_add_epi64(low, _mm256_shuffle_epi32(a, _MM_SHUFFLE(1, 0, 3, 2)));
        high = _mm256_add_epi64(high, _mm256_shuffle_epi32(b, _MM_SHUFFLE(1, 0, 3, 2)));
        low = _mm256_add_epi64(low, _mm256_mul_epu32(x, _mm256_srli_epi64(x, 32)));
        high = _mm256_add_epi64(high, _mm256_mul_epu32(y, _mm256_srli_epi64(y, 32)));
    }
    _mm256_store_si256((__m256i *)lanes, low);
    _mm256_store_si256((__m256i *)(lanes + 4), high);
#else
    for (size_t i = 0; i < count; i++, into += 64, from += 64) {
        xxh_u64 words[XXH_ACC_NB], secret[XXH_ACC_NB];
        memcpy(words, from, sizeof words);
        memcpy(into, words, sizeof words);
        memcpy(secret, XXH3_kSecret + i * XXH_SECRET_CONSUME_RATE, sizeof secret);
        for (size_t j = 0; j < XXH_ACC_NB; j++) {
            xxh_u64 mixed = words[j] ^ secret[j];
            lanes[j ^ 1] += words[j];
            lanes[j] += (mixed & 0xffffffff) * (mixed >> 32);
        }
    }
#endif
}

/* `past_cache`: the copy is not going to be read soon, so it is not brought into the cache to be written. */
static inline uint64_t copy_and_hash(uint8_t *into, const uint8_t *from, size_t length, int past_cache) {
    if (length <= BLOCK) {
        memcpy(into, from, length);
        return XXH3_64bits(into, length);
    }
    XXH_ALIGN(64) xxh_u64 lanes[XXH_ACC_NB] = XXH3_INIT_ACC;
    size_t at = 0;
    past_cache = past_cache && (uintptr_t)into % 32 == 0;
    for (; at + BLOCK < length; at += BLOCK) {
        copy_stripes(lanes, into + at, from + at, STRIPES, past_cache);
        XXH3_scrambleAcc(lanes, XXH3_kSecret + XXH_SECRET_DEFAULT_SIZE - XXH_STRIPE_LEN);
    }
    size_t count = (length - 1 - at) / XXH_STRIPE_LEN;
    copy_stripes(lanes, into + at, from + at, count, past_cache);
    at += count * XXH_STRIPE_LEN;
#if defined(__AVX2__)
    if (past_cache)
        _mm_sfence(); /* such stores are ordered by nothing else */
#endif
    memcpy(into + at, from + at, length - at);
    XXH3_accumulate_512(lanes, into + length - XXH_STRIPE_LEN,
                        XXH3_kSecret + XXH_SECRET_DEFAULT_SIZE - XXH_STRIPE_LEN - XXH_SECRET_LASTACC_START);
    return XXH3_mergeAccs(lanes, XXH3_kSecret + XXH_SECRET_MERGEACCS_START, (xxh_u64)length * XXH_PRIME64_1);
}
