/* Copies of 64 MiB between private and shared memory, both in huge pages, by one thread.

   cc -O2 -o build/copies benchmarks/copies.c && build/copies

   Each line: where to, bytes of a piece, kind of copy, the best and the mean of 16, GB/s. Needs x86-64
   with AVX2; AVX-512 is left out where there is none. Figures: docs/decisions/0006-copies-pass-the-caches-by.md. */

#define _GNU_SOURCE
#include <immintrin.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { LINE = 64, PAGE = 4096, PAGES = 4, TIMES = 16, PLACES = 8 };
static const size_t SIZE = 64u << 20;
static const size_t PIECES[] = {256u << 10, 1u << 20, 64u << 20};

typedef void copy(char *to, const char *from, size_t bytes);

static void by_libc(char *to, const char *from, size_t bytes) {
    memcpy(to, from, bytes);
}

static void by_rep_movsb(char *to, const char *from, size_t bytes) {
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(bytes) : : "memory");
}

__attribute__((target("avx2"))) static inline void line_avx2(char *to, const char *from) {
    __m256i low = _mm256_loadu_si256((const __m256i *)from);
    __m256i high = _mm256_loadu_si256((const __m256i *)(from + LINE / 2));
    _mm256_stream_si256((__m256i *)to, low);
    _mm256_stream_si256((__m256i *)(to + LINE / 2), high);
}

__attribute__((target("avx512f"))) static inline void line_avx512(char *to, const char *from) {
    _mm512_stream_si512((__m512i *)to, _mm512_loadu_si512(from));
}

#define IN_LINES(NAME, TARGET, COPY_LINE)                                                          \
    __attribute__((target(TARGET))) static void NAME(char *to, const char *from, size_t bytes) {   \
        for (size_t at = 0; at < bytes; at += LINE) {                                              \
            COPY_LINE(to + at, from + at);                                                         \
        }                                                                                          \
        _mm_sfence();                                                                              \
    }

#define IN_PAGES(NAME, TARGET, COPY_LINE)                                                          \
    __attribute__((target(TARGET))) static void NAME(char *to, const char *from, size_t bytes) {   \
        for (size_t at = 0; at < bytes; at += PAGES * PAGE) {                                      \
            for (size_t line = at; line < at + PAGE; line += LINE) {                               \
                for (size_t page = line; page < line + PAGES * PAGE; page += PAGE) {               \
                    COPY_LINE(to + page, from + page);                                             \
                }                                                                                  \
            }                                                                                      \
        }                                                                                          \
        _mm_sfence();                                                                              \
    }

IN_LINES(lines_avx2, "avx2", line_avx2)
IN_PAGES(pages_avx2, "avx2", line_avx2)
IN_LINES(lines_avx512, "avx512f", line_avx512)
IN_PAGES(pages_avx512, "avx512f", line_avx512)

static const struct {
    const char *name;
    copy *copy;
} KINDS[] = {
    {"libc's memcpy", by_libc},          {"rep movsb", by_rep_movsb},
    {"AVX2, in lines", lines_avx2},      {"AVX2, in pages", pages_avx2},
    {"AVX-512, in lines", lines_avx512}, {"AVX-512, in pages", pages_avx512},
};

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static char *memory(size_t bytes, int flags, int descriptor) {
    char *place = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, descriptor, 0);
    if (place == MAP_FAILED) {
        perror("mmap");
        exit(1);
    }
    madvise(place, bytes, MADV_HUGEPAGE);
    memset(place, 1, bytes);
    return place;
}

static void measure(const char *where, size_t piece, size_t kind, char *pool, char *own, int put) {
    double best = 1e9, sum = 0;
    for (int time = 0; time < TIMES; time++) {
        char *there = pool + (size_t)(time % PLACES) * SIZE;
        double start = now();
        for (size_t at = 0; at < SIZE; at += piece) {
            KINDS[kind].copy((put ? there : own) + at, (put ? own : there) + at, piece);
        }
        double took = now() - start;
        best = took < best ? took : best;
        sum += took;
    }
    printf("%-13s %6zu KiB  %-18s %5.1f %5.1f\n", where, piece >> 10, KINDS[kind].name,
           (double)SIZE / best / 1e9, (double)SIZE * TIMES / sum / 1e9);
}

int main(void) {
    int descriptor = memfd_create("copies", 0);
    if (descriptor < 0 || ftruncate(descriptor, (off_t)(PLACES * SIZE))) {
        perror("shared memory");
        return 1;
    }
    char *pool = memory(PLACES * SIZE, MAP_SHARED, descriptor);
    char *own = memory(SIZE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    for (int put = 1; put >= 0; put--) {
        for (size_t piece = 0; piece < sizeof PIECES / sizeof *PIECES; piece++) {
            for (size_t kind = 0; kind < sizeof KINDS / sizeof *KINDS; kind++) {
                if (strstr(KINDS[kind].name, "AVX-512") && !__builtin_cpu_supports("avx512f")) {
                    continue;
                }
                measure(put ? "to the pool" : "from the pool", PIECES[piece], kind, pool, own, put);
            }
        }
    }
    return 0;
}
