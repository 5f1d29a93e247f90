/* {{ name }} as one operator of ONNX Runtime, relief::Network, for {{ name }}.onnx; samples of a batch one after the other.
   cc -O2 -march=native -shared -fPIC {{ name }}_ort.c {{ name }}.c{{ weights }} -o lib{{ name }}.so
   options.register_custom_ops_library("lib{{ name }}.so")

   No header is needed: ONNX Runtime's C API is a table of functions whose places do not change, and version 12 of it,
   which every runtime from 1.12 on has, holds all that is used here. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include "{{ name }}.h"

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#elif defined(__GNUC__)
#define EXPORT __attribute__((visibility("default")))
#else
#define EXPORT
#endif

enum { API_VERSION = 12, FLOAT = 1 };

/* Places in OrtApi. */
enum {
    CREATE_CUSTOM_OP_DOMAIN = 26,
    CUSTOM_OP_DOMAIN_ADD = 27,
    ADD_CUSTOM_OP_DOMAIN = 28,
    GET_TENSOR_MUTABLE_DATA = 51,
    GET_TENSOR_SHAPE_ELEMENT_COUNT = 64,
    GET_TENSOR_TYPE_AND_SHAPE = 65,
    KERNEL_CONTEXT_GET_INPUT = 90,
    KERNEL_CONTEXT_GET_OUTPUT = 91,
    RELEASE_STATUS = 93,
    RELEASE_TENSOR_TYPE_AND_SHAPE_INFO = 99
};

typedef void (*function)(void);
typedef void *status; /* null where all is well */
typedef struct {
    const function *(*get_api)(uint32_t version);
    const char *(*get_version)(void);
} api_base;

static const function *api; /* written once, when the library is registered */

/* OrtCustomOp, as far as version 12 goes. */
typedef struct op {
    uint32_t version;
    void *(*create)(const struct op *, const void *, const void *);
    const char *(*name)(const struct op *);
    const char *(*provider)(const struct op *);
    int (*input_type)(const struct op *, size_t);
    size_t (*input_count)(const struct op *);
    int (*output_type)(const struct op *, size_t);
    size_t (*output_count)(const struct op *);
    void (*compute)(void *, void *);
    void (*destroy)(void *);
    int (*input_characteristic)(const struct op *, size_t);
    int (*output_characteristic)(const struct op *, size_t);
} op;

/* One operator of one session. Several threads may run it: each takes the arena that lies here, or allocates one. */
typedef struct {
    void *arena;
} kernel;

static void *swap(void **place, void *value)
{
#if defined(__GNUC__)
    return __atomic_exchange_n(place, value, __ATOMIC_ACQ_REL);
#else
    (void)place;
    return value; /* nothing is kept */
#endif
}

static int failed(status s)
{
    if (s)
        ((void (*)(status))api[RELEASE_STATUS])(s);
    return s != NULL;
}

static void compute(void *state, void *context)
{
    kernel *const k = (kernel *)state;
    static const int64_t shape[] = { {{ output_dims }} };
    int64_t sizes[sizeof shape / sizeof *shape];
    const void *given;
    void *info, *result, *in, *out, *memory;
    size_t count = 0, i;
    uintptr_t aligned;

    if (failed(((status (*)(void *, size_t, const void **))api[KERNEL_CONTEXT_GET_INPUT])(context, 0, &given)) ||
        failed(((status (*)(const void *, void **))api[GET_TENSOR_TYPE_AND_SHAPE])(given, &info)))
        return;
    if (failed(((status (*)(const void *, size_t *))api[GET_TENSOR_SHAPE_ELEMENT_COUNT])(info, &count)))
        count = 0;
    ((void (*)(void *))api[RELEASE_TENSOR_TYPE_AND_SHAPE_INFO])(info);
    count /= {{ upper }}_INPUT_SIZE;
    for (i = 0; i < sizeof shape / sizeof *shape; i++)
        sizes[i] = shape[i];
    sizes[0] = (int64_t)count;
    if (failed(((status (*)(void *, size_t, const int64_t *, size_t, void **))api[KERNEL_CONTEXT_GET_OUTPUT])(
            context, 0, sizes, sizeof shape / sizeof *shape, &result)) ||
        failed(((status (*)(const void *, void **))api[GET_TENSOR_MUTABLE_DATA])(given, &in)) ||
        failed(((status (*)(const void *, void **))api[GET_TENSOR_MUTABLE_DATA])(result, &out)))
        return;
    memory = swap(&k->arena, NULL);
    if (!memory)
        memory = malloc({{ upper }}_ARENA_BYTES + 64);
    if (!memory)
        abort(); /* version 12 has no way to say so, and the output must not be left as it was */
    aligned = ((uintptr_t)memory + 63) / 64 * 64;
    for (i = 0; i < count; i++)
        {{ name }}_run((const float *)in + i * {{ upper }}_INPUT_SIZE, (float *)out + i * {{ upper }}_OUTPUT_SIZE, (void *)aligned);
    free(swap(&k->arena, memory));
}

static void *create(const op *self, const void *functions, const void *info)
{
    (void)self, (void)functions, (void)info;
    return calloc(1, sizeof(kernel));
}

static void destroy(void *state)
{
    free(((kernel *)state)->arena);
    free(state);
}

static const char *name(const op *self) { (void)self; return "Network"; }
static const char *provider(const op *self) { (void)self; return "CPUExecutionProvider"; }
static int type(const op *self, size_t i) { (void)self, (void)i; return FLOAT; }
static size_t one(const op *self) { (void)self; return 1; }
static int required(const op *self, size_t i) { (void)self, (void)i; return 0; }

static op network = {API_VERSION, create, name, provider, type, one, type, one, compute, destroy, required, required};

#ifdef __cplusplus
extern "C"
#endif
EXPORT status RegisterCustomOps(void *options, const api_base *base)
{
    void *domain;
    status s;
    api = base->get_api(API_VERSION);
    s = ((status (*)(const char *, void **))api[CREATE_CUSTOM_OP_DOMAIN])("relief", &domain);
    if (!s)
        s = ((status (*)(void *, const op *))api[CUSTOM_OP_DOMAIN_ADD])(domain, &network);
    if (!s)
        s = ((status (*)(void *, void *))api[ADD_CUSTOM_OP_DOMAIN])(options, domain);
    return s;
}
