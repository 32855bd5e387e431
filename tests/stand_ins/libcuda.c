/* Stands for libcuda where there is no GPU: answers what Triton's driver asks of it, keeps what the last
   launch was given, and takes tensor maps under the conditions of cuTensorMapEncodeTiled. */

#include <stdint.h>
#include <string.h>

enum { ARGUMENTS = 256, MAPS = 64, INVALID_VALUE = 1 };

typedef struct {
	unsigned grid[3], block[3], shared;
	void *stream, *attributes;
	unsigned attribute_count;
} Config;

typedef struct {
	uint64_t type, rank, address, sizes[5], strides[4], box[5];
} Map;

uint64_t arguments[ARGUMENTS];
unsigned widths[ARGUMENTS], count, launches, launched[7], maps;
Map encoded[MAPS];

__attribute__((weak)) void launched_on(void *stream); /* of libcudart.c, where it is there */

int cuLaunchKernelEx(const Config *config, void *function, void **values, void **extra) {
	memcpy(launched, config->grid, sizeof launched);
	memset(arguments, 0, sizeof arguments);
	for (unsigned i = 0; i < count; i++)
		memcpy(&arguments[i], values[i], widths[i]);
	launches++;
	if (launched_on)
		launched_on(config->stream);
	return 0;
}

int cuTensorMapEncodeTiled(
	uint64_t *map, int type, unsigned rank, void *address, const uint64_t *sizes,
	const uint64_t *strides, const unsigned *box, const unsigned *steps, int interleave, int swizzle,
	int promotion, int fill
) {
	const unsigned item = type == 6 || type == 9 ? 2 : 4; /* float16, bfloat16 */
	const unsigned swizzled[] = {1 << 30, 32, 64, 128};
	if ((uintptr_t)map % 64 || (uintptr_t)address % 16 || rank < 1 || rank > 5 || interleave)
		return INVALID_VALUE;
	if (box[0] * item % 16 || box[0] * item > swizzled[swizzle])
		return INVALID_VALUE;
	Map *kept = &encoded[maps % MAPS];
	*kept = (Map){.type = type, .rank = rank, .address = (uintptr_t)address};
	for (unsigned i = 0; i < rank; i++) {
		if (!sizes[i] || sizes[i] > 1ull << 32 || !box[i] || box[i] > 256 || steps[i] != 1)
			return INVALID_VALUE;
		kept->sizes[i] = sizes[i], kept->box[i] = box[i];
	}
	for (unsigned i = 0; i + 1 < rank; i++) {
		if (strides[i] % 16 || strides[i] >= 1ull << 40)
			return INVALID_VALUE;
		kept->strides[i] = strides[i];
	}
	map[0] = maps++;
	return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
	enum { PROCESSORS = 16, SHARED_MEMORY = 97 };
	*value = attribute == PROCESSORS ? 132 : attribute == SHARED_MEMORY ? 232448 : 65536;
	return 0;
}

int cuFuncGetAttribute(int *value, int attribute, void *function) {
	enum { MOST_THREADS = 0 };
	*value = attribute == MOST_THREADS ? 1024 : 0;
	return 0;
}

int cuPointerGetAttribute(void *value, int attribute, uint64_t pointer) {
	memcpy(value, &pointer, sizeof pointer);
	return 0;
}

int cuPointerGetAttributes(unsigned n, int *attributes, void **values, uint64_t pointer) {
	for (unsigned i = 0; i < n; i++)
		memcpy(values[i], &pointer, sizeof pointer);
	return 0;
}

int cuCtxGetCurrent(void **context) { return *context = (void *)1, 0; }
int cuCtxGetDevice(int *device) { return *device = 0; }
int cuCtxGetLimit(size_t *size, int limit) { return *size = 0, 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxSetLimit(int limit, size_t size) { return 0; }
int cuDeviceGet(int *device, int ordinal) { return *device = 0; }
int cuDeviceGetCount(int *devices) { return *devices = 1, 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { return *flags = 0, *active = 1, 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)1, 0; }
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
int cuGetErrorString(int error, const char **text) { return *text = "refused by the stand-in", 0; }
int cuInit(unsigned flags) { return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { return *function = (void *)3, 0; }
int cuModuleLoadData(void **module, const void *image) { return *module = (void *)2, 0; }
int cuModuleUnload(void *module) { return 0; }
int cuOccupancyMaxActiveClusters(int *clusters, void *function, const void *config) { return 0; }
int cuStreamIsCapturing(void *stream, int *status) { return *status = 0; }
int cuTensorMapEncodeIm2col(void) { return INVALID_VALUE; }
