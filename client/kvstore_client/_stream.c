/* Copies whose target passes the caches by. */

#if !defined(__x86_64__) || !defined(__GNUC__)
#error "no streaming stores are known for this processor; libc's memcpy does without them"
#endif

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { LINE = 64, PAGE = 4096, PAGES = 4 };

__attribute__((target("avx2"))) static inline void copy_line(char *to, const char *from) {
    __m256i low = _mm256_loadu_si256((const __m256i *)from);
    __m256i high = _mm256_loadu_si256((const __m256i *)(from + LINE / 2));
    _mm256_stream_si256((__m256i *)to, low);
    _mm256_stream_si256((__m256i *)(to + LINE / 2), high);
}

/* From here on `to` is aligned to lines, of which `bytes` are a multiple. */
typedef void copy_aligned(char *to, const char *from, size_t bytes);

__attribute__((target("avx2"))) static void copy_lines(char *to, const char *from, size_t bytes) {
    for (size_t at = 0; at < bytes; at += LINE) {
        copy_line(to + at, from + at);
    }
}

/* Pages side by side: more of the memory's banks work at a time. */
__attribute__((target("avx2"))) static void copy_pages(char *to, const char *from, size_t bytes) {
    size_t at = 0;
    for (; bytes - at >= PAGES * PAGE; at += PAGES * PAGE) {
        for (size_t line = at; line < at + PAGE; line += LINE) {
            for (size_t page = 0; page < PAGES * PAGE; page += PAGE) {
                copy_line(to + page + line, from + page + line);
            }
        }
    }
    copy_lines(to + at, from + at, bytes - at);
}

static inline void copy_any(copy_aligned *copy, char *to, const char *from, size_t bytes) {
    size_t head = (size_t)(-(uintptr_t)to % LINE);
    head = head < bytes ? head : bytes;
    size_t lines = (bytes - head) / LINE * LINE;
    size_t end = head + lines;
    memmove(to, from, head);
    copy(to + head, from + head, lines);
    /* Only behind this are streamed bytes seen before what is stored next. */
    _mm_sfence();
    memmove(to + end, from + end, bytes - end);
}

/* Whether this processor has what the copies need. */
int kvstore_stream_supported(void) {
    return __builtin_cpu_supports("avx2") != 0;
}

/* Whether to take the second copy: faster on an Intel Xeon, slower on an AMD EPYC. Figures:
   docs/decisions/0006-copies-pass-the-caches-by.md. */
int kvstore_stream_prefers_pages(void) {
    return !__builtin_cpu_is("amd");
}

/* Both copy between two ranges that are the same or do not overlap. */
void kvstore_stream_copy_lines(char *to, const char *from, size_t bytes) {
    copy_any(copy_lines, to, from, bytes);
}

void kvstore_stream_copy_pages(char *to, const char *from, size_t bytes) {
    copy_any(copy_pages, to, from, bytes);
}
