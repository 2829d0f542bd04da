/* Group norm, SiLU and dropout of activations [b, p, c] (channels last), forward and backward:

   y = keep * scale * silu((x + shift - mean) * rstd * weight + bias)

   Activations are float32 or bfloat16, everything else is float32. A sample is cut into chunks
   whose size depends on its shape alone and whose sums are added in order, so results depend
   neither on the number of threads nor on the batch. NaN in a group makes all of it NaN. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define LANES 16    /* channels worked on together: a column */
#define CHUNK 8192  /* values of a chunk; what a pass reads of them stays in the nearest cache */
#define GRAIN 32768 /* values that are worth waking another thread for, as in ATen */

/* The compiler's own vectors, which it maps to whatever the machine has. */
typedef float f32 __attribute__((vector_size(64)));
typedef int32_t i32 __attribute__((vector_size(64)));
typedef uint32_t u32 __attribute__((vector_size(64)));
typedef uint16_t u16 __attribute__((vector_size(32)));
typedef int16_t i16 __attribute__((vector_size(32)));
typedef uint64_t u64 __attribute__((vector_size(32)));

struct call { /* the same in fused.py */
    const void *x;
    const float *weight, *bias, *shift; /* [c], [c], [b, c] or null */
    const int64_t *key;                 /* [b], null is no dropout */
    float *mean, *rstd;                 /* [b, groups] */
    int64_t b, p, c, groups;
    double eps;
    float scale;   /* of what is kept */
    int32_t level; /* a draw of 16 bits is kept unless it is below */
    int32_t silu, low, threads;
};

/* ---- Sixteen values, of which n are there ---- */

/* Two halves of 16 bits; the compiler does not find the single instructions by itself. */
INLINE u32 upper(u16 half) {
#ifdef __AVX512BF16__
    u32 wide;
    __asm__("vpmovzxwd %1, %0" : "=v"(wide) : "vm"(half));
    return wide << 16;
#else
    return __builtin_convertvector(half, u32) << 16;
#endif
}

INLINE f32 load(const void *from, int64_t i, int low, int n) {
    if (low) {
        u16 half = {0};
        memcpy(&half, (const char *)from + 2 * i, 2 * n);
        return (f32)upper(half);
    }
    f32 v = {0};
    memcpy(&v, (const char *)from + 4 * i, 4 * n);
    return v;
}

INLINE f32 pick(i32 which, f32 yes, f32 no) {
    return (f32)((which & (i32)yes) | (~which & (i32)no));
}

INLINE void store(void *to, int64_t i, f32 v, int low, int n) {
    if (low) {
        u16 half;
#ifdef __AVX512BF16__
        __asm__("vcvtneps2bf16 %1, %0" : "=v"(half) : "v"(v));
#else /* to the nearest, ties to even; NaN must not be carried into infinity */
        u32 bits = (u32)pick(v == v, v, (f32)((u32){0} + 0x7fc00000));
        half = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, u16);
#endif
        memcpy((char *)to + 2 * i, &half, 2 * n);
    } else
        memcpy((char *)to + 4 * i, &v, 4 * n);
}

/* 1 / (1 + exp(-z)); the polynomial is exp within 2e-9 where |r| <= log(2) / 2. */
INLINE f32 sigmoid(f32 z) {
    f32 x = pick(-z > 89, (f32){0} + 89, -z); /* 89 becomes infinity, NaN stays NaN */
    x = pick(x < -87, (f32){0} - 87, x);
    f32 whole = x * 0x1.715476p+0f + 0x1.8p23f; /* its last bits are the nearest integer */
    f32 n = whole - 0x1.8p23f;
    f32 r = x - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f;
    f32 e = r * 0x1.6ab98p-10f + 0x1.126d0cp-7f;
    e = e * r + 0x1.55589ap-5f;
    e = e * r + 0x1.55540ap-3f;
    e = e * r + 0x1.fffffap-2f;
    e = e * r + 1;
    e = e * r + 1;
    return 1 / (1 + e * (f32)(((i32)whole + 127) << 23));
}

/* rng.keep_mask: a word of SplitMix64 serves four neighboring values. */
INLINE u64 mix(u64 x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
}

INLINE f32 dropout(f32 v, const struct call *a, uint64_t key, uint64_t i, int aligned) {
    const uint64_t golden = 0x9e3779b97f4a7c15;
    u16 draws;
    if (aligned) {
        const u64 first = {golden, 2 * golden, 3 * golden, 4 * golden};
        draws = (u16)mix(key + i / 4 * golden + first);
    } else
        for (int lane = 0; lane < LANES; lane++) {
            u64 word = mix((u64){0} + key + ((i + lane) / 4 + 1) * golden);
            draws[lane] = (uint16_t)(word[0] >> (i + lane) % 4 * 16);
        }
    return v * pick((i32)upper(draws) >= a->level * 65536, (f32){0} + a->scale, (f32){0});
}

/* ---- One column of one chunk: values at i, i + c, ... ---- */

struct column {
    int64_t i, inner, pixels; /* place in the batch and in the sample */
    uint64_t key;
    f32 offset, slope, bias; /* z = (x + offset) * slope + bias */
};

/* Mean, and squares around it. The reference is one of the values: as far as it can lie from
   their mean, the difference of the sums loses no more than a factor of their number. */
INLINE void moments(const struct call *a, const struct column *k, f32 *mean, f32 *square, int low,
                    int n) {
    f32 first = load(a->x, k->i, low, n), sum = {0}, squares = {0};
    for (int64_t q = 1, i = k->i + a->c; q < k->pixels; q++, i += a->c) {
        f32 d = load(a->x, i, low, n) - first;
        sum += d;
        squares += d * d;
    }
    *mean = first + sum / (float)k->pixels;
    *square = squares - sum * sum / (float)k->pixels;
}

INLINE void forward(const struct call *a, const struct column *k, void *y, int n, int low, int silu,
                    int drop) {
    for (int64_t q = 0, i = k->i, inner = k->inner; q < k->pixels; q++, i += a->c, inner += a->c) {
        /* While this sample is written, the next one comes nearer. */
        __builtin_prefetch((const char *)a->x + (low ? 2 : 4) * (i + a->p * a->c), 0, 2);
        f32 z = (load(a->x, i, low, n) + k->offset) * k->slope + k->bias;
        if (silu) z *= sigmoid(z);
        if (drop) z = dropout(z, a, k->key, inner, drop == 1);
        store(y, i, z, low, n);
    }
}

/* The gradient of z, which waits in gx, and its sums: alone, times x + offset, and x + offset. */
INLINE void backward(const struct call *a, const struct column *k, const void *gy, void *gx,
                     f32 *sums, int n, int low, int silu, int drop) {
    f32 alone = {0}, product = {0}, centred = {0};
    for (int64_t q = 0, i = k->i, inner = k->inner; q < k->pixels; q++, i += a->c, inner += a->c) {
        f32 h = load(a->x, i, low, n) + k->offset, g = load(gy, i, low, n);
        if (drop) g = dropout(g, a, k->key, inner, drop == 1);
        if (silu) {
            f32 z = h * k->slope + k->bias, s = sigmoid(z);
            g *= s + z * s * (1 - s);
        }
        alone += g;
        product += g * h;
        centred += h;
        store(gx, i, g, low, n);
    }
    sums[0] = alone, sums[1] = product, sums[2] = centred;
}

/* The gradient of x from that of z: gx * slope + (x + offset) * by_value + by_group. */
INLINE void finish(const struct call *a, const struct column *k, void *gx, f32 by_value,
                   f32 by_group, int low, int n) {
    for (int64_t q = 0, i = k->i; q < k->pixels; q++, i += a->c) {
        f32 h = load(a->x, i, low, n) + k->offset;
        store(gx, i, load(gx, i, low, n) * k->slope + (h * by_value + by_group), low, n);
    }
}

/* Flags as constants, so that each combination is a loop without branches. */
#define BY_FLAGS(f, n, low, silu, drop, ...)                                                       \
    if (n < LANES || (drop && a->c % 4)) f(__VA_ARGS__, n, low, silu, 2 * (drop));                 \
    else switch ((low) * 4 + (silu) * 2 + (drop)) {                                                \
        case 0: f(__VA_ARGS__, LANES, 0, 0, 0); break;                                             \
        case 1: f(__VA_ARGS__, LANES, 0, 0, 1); break;                                             \
        case 2: f(__VA_ARGS__, LANES, 0, 1, 0); break;                                             \
        case 3: f(__VA_ARGS__, LANES, 0, 1, 1); break;                                             \
        case 4: f(__VA_ARGS__, LANES, 1, 0, 0); break;                                             \
        case 5: f(__VA_ARGS__, LANES, 1, 0, 1); break;                                             \
        case 6: f(__VA_ARGS__, LANES, 1, 1, 0); break;                                             \
        case 7: f(__VA_ARGS__, LANES, 1, 1, 1); break;                                             \
    }
#define BY_TYPE(f, n, low, ...)                                                                    \
    if (n < LANES) f(__VA_ARGS__, low, n);                                                         \
    else if (low) f(__VA_ARGS__, 1, LANES);                                                        \
    else f(__VA_ARGS__, 0, LANES);

/* ---- One sample ---- */

struct plan {
    int64_t width, columns, pixels, chunks; /* channels rounded up; pixels of a chunk */
    int threads;    /* as many samples at once */
    int64_t each;   /* samples of each thread; those left over are divided within, one by one */
};

static struct plan planned(const struct call *a) {
    struct plan l;
    l.columns = (a->c + LANES - 1) / LANES;
    l.width = l.columns * LANES;
    l.pixels = CHUNK / l.width > 1 ? CHUNK / l.width : 1;
    l.chunks = (a->p + l.pixels - 1) / l.pixels;
    l.threads = a->b * a->p * a->c < GRAIN ? 1 : a->threads;
    l.each = a->b / l.threads;
    return l;
}

/* Threads of a single sample; parallel regions are never nested, which would make new ones. */
static int within(const struct plan *l) {
    return l->chunks < l->threads ? 1 : l->threads;
}

INLINE int lanes(const struct call *a, int64_t j) {
    return a->c - j * LANES < LANES ? (int)(a->c - j * LANES) : LANES;
}

INLINE f32 *row(float *of, int64_t width, int64_t number, int64_t j) {
    return (f32 *)(of + number * width + j * LANES);
}

/* Offset, slope and bias of each channel from what is known of each group. */
static void coefficients(const struct call *a, const struct plan *l, int64_t s, float *out) {
    int64_t size = a->c / a->groups;
    for (int64_t c = 0; c < a->c; c++) {
        int64_t g = s * a->groups + c / size;
        out[c] = (a->shift ? a->shift[s * a->c + c] : 0) - a->mean[g];
        out[l->width + c] = a->rstd[g] * a->weight[c];
        out[2 * l->width + c] = a->bias[c];
    }
}

static struct column column(const struct call *a, const struct plan *l, int64_t s, int64_t chunk,
                            int64_t j, float *coefficients) {
    struct column k;
    k.inner = chunk * l->pixels * a->c + j * LANES;
    k.i = s * a->p * a->c + k.inner;
    k.pixels = a->p - chunk * l->pixels < l->pixels ? a->p - chunk * l->pixels : l->pixels;
    k.key = a->key ? (uint64_t)a->key[s] : 0;
    if (coefficients) {
        k.offset = *row(coefficients, l->width, 0, j);
        k.slope = *row(coefficients, l->width, 1, j);
        k.bias = *row(coefficients, l->width, 2, j);
    }
    return k;
}

/* Means and squares of chunks -> mean and 1 / standard deviation of each group. */
static void statistics(const struct call *a, const struct plan *l, int64_t s, const float *parts) {
    int64_t size = a->c / a->groups;
    for (int64_t g = 0; g < a->groups; g++) {
        double mean = 0, square = 0;
        for (int pass = 0; pass < 2; pass++) {
            double sum = 0;
            for (int64_t chunk = 0; chunk < l->chunks; chunk++) {
                const float *part = parts + 2 * chunk * l->width;
                double pixels = fmin(l->pixels, a->p - chunk * l->pixels);
                for (int64_t c = g * size; c < (g + 1) * size; c++) {
                    double d = part[c] + (a->shift ? (double)a->shift[s * a->c + c] : 0) - mean;
                    sum += pass ? part[l->width + c] + pixels * d * d : pixels * d;
                }
            }
            *(pass ? &square : &mean) = sum / ((double)size * a->p);
        }
        a->mean[s * a->groups + g] = (float)mean;
        a->rstd[s * a->groups + g] = (float)(1 / sqrt(square + a->eps));
    }
}

static void forward_sample(const struct call *a, const struct plan *l, int64_t s, void *y,
                           float *room, int threads) {
    float *channels = room, *parts = room + 3 * l->width;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t chunk = 0; chunk < l->chunks; chunk++)
        for (int64_t j = 0; j < l->columns; j++) {
            struct column k = column(a, l, s, chunk, j, NULL);
            BY_TYPE(moments, lanes(a, j), a->low, a, &k, row(parts, l->width, 2 * chunk, j),
                    row(parts, l->width, 2 * chunk + 1, j));
        }
    statistics(a, l, s, parts);
    coefficients(a, l, s, channels);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t chunk = 0; chunk < l->chunks; chunk++)
        for (int64_t j = 0; j < l->columns; j++) {
            struct column k = column(a, l, s, chunk, j, channels);
            BY_FLAGS(forward, lanes(a, j), a->low, a->silu, a->key != NULL, a, &k, y);
        }
}

/* sums [3, width]: of the gradient of z, of that times x + offset, of x + offset. */
static void backward_sample(const struct call *a, const struct plan *l, int64_t s, const void *gy,
                            void *gx, float *gshift, float *sums, float *room, int threads) {
    float *channels = room, *factors = room + 3 * l->width, *parts = room + 5 * l->width;
    int64_t size = a->c / a->groups;
    coefficients(a, l, s, channels);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t chunk = 0; chunk < l->chunks; chunk++)
        for (int64_t j = 0; j < l->columns; j++) {
            struct column k = column(a, l, s, chunk, j, channels);
            f32 found[3] = {{0}};
            BY_FLAGS(backward, lanes(a, j), a->low, a->silu, a->key != NULL, a, &k, gy, gx, found);
            for (int i = 0; i < 3; i++) *row(parts, l->width, 3 * chunk + i, j) = found[i];
        }
    memset(sums, 0, 3 * l->width * sizeof(float));
    for (int64_t chunk = 0; chunk < l->chunks; chunk++)
        for (int64_t c = 0; c < 3 * l->width; c++) sums[c] += parts[3 * chunk * l->width + c];
    for (int64_t g = 0; g < a->groups; g++) {
        double alone = 0, product = 0, n = (double)size * a->p, r = a->rstd[s * a->groups + g];
        for (int64_t c = g * size; c < (g + 1) * size; c++) {
            alone += (double)a->weight[c] * sums[c];
            product += (double)a->weight[c] * sums[l->width + c];
        }
        for (int64_t c = g * size; c < (g + 1) * size; c++) {
            float by_value = factors[c] = (float)(-r * r * r * product / n);
            float by_group = factors[l->width + c] = (float)(-r * alone / n);
            /* Fused by name: compilers fuse otherwise in copies of this function for one thread. */
            if (gshift)
                gshift[s * a->c + c] = __builtin_fmaf(
                    by_value, sums[2 * l->width + c],
                    __builtin_fmaf(channels[l->width + c], sums[c], by_group * (float)a->p));
        }
    }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t chunk = 0; chunk < l->chunks; chunk++)
        for (int64_t j = 0; j < l->columns; j++) {
            struct column k = column(a, l, s, chunk, j, channels);
            f32 by_value = *row(factors, l->width, 0, j), by_group = *row(factors, l->width, 1, j);
            BY_TYPE(finish, lanes(a, j), a->low, a, &k, gx, by_value, by_group);
        }
}

/* ---- All samples; 0, or 1 if there is no memory ---- */

int norm_forward(const struct call *a, void *y) {
    struct plan l = planned(a);
    int64_t room = (3 + 2 * l.chunks) * l.width;
    float *rooms = aligned_alloc(64, l.threads * room * sizeof(float));
    if (!rooms) return 1;
#pragma omp parallel for schedule(static) num_threads(l.threads) if (l.threads > 1 && l.each)
    for (int64_t t = 0; t < l.threads; t++)
        for (int64_t i = t * l.each; i < (t + 1) * l.each; i++)
            forward_sample(a, &l, i, y, rooms + t * room, 1);
    for (int64_t i = l.threads * l.each; i < a->b; i++)
        forward_sample(a, &l, i, y, rooms, within(&l));
    free(rooms);
    return 0;
}

/* Gradients of x [b, p, c], weight and bias [c], and shift [b, c], which may be null. */
int norm_backward(const struct call *a, const void *gy, void *gx, float *gweight, float *gbias,
                  float *gshift) {
    struct plan l = planned(a);
    int64_t room = (5 + 3 * l.chunks) * l.width, sums = 3 * l.width;
    float *rooms = aligned_alloc(64, (l.threads * room + a->b * sums) * sizeof(float));
    if (!rooms) return 1;
    float *all = rooms + l.threads * room;
#pragma omp parallel for schedule(static) num_threads(l.threads) if (l.threads > 1 && l.each)
    for (int64_t t = 0; t < l.threads; t++)
        for (int64_t i = t * l.each; i < (t + 1) * l.each; i++)
            backward_sample(a, &l, i, gy, gx, gshift, all + i * sums, rooms + t * room, 1);
    for (int64_t i = l.threads * l.each; i < a->b; i++)
        backward_sample(a, &l, i, gy, gx, gshift, all + i * sums, rooms, within(&l));
    for (int64_t c = 0; c < a->c; c++) {
        double weight = 0, bias = 0;
        for (int64_t s = 0; s < a->b; s++) {
            bias += all[s * sums + c];
            weight += (double)a->rstd[s * a->groups + c * a->groups / a->c] *
                      all[s * sums + l.width + c];
        }
        gweight[c] = (float)weight;
        gbias[c] = (float)bias;
    }
    free(rooms);
    return 0;
}

/* y = (a + b) * scale, n values each. */
INLINE void sum(const void *a, const void *b, void *y, float scale, int64_t i, int low, int n) {
    store(y, i, (load(a, i, low, n) + load(b, i, low, n)) * scale, low, n);
}

int residual(const void *a, const void *b, void *y, int64_t n, float scale, int low, int threads) {
    int64_t whole = n / LANES * LANES;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && n >= GRAIN)
    for (int64_t i = 0; i < whole; i += LANES)
        if (low) sum(a, b, y, scale, i, 1, LANES);
        else sum(a, b, y, scale, i, 0, LANES);
    if (whole < n) sum(a, b, y, scale, whole, low, (int)(n - whole));
    return 0;
}
