/* Stands, in front of libcudart and libcublas, for a Hopper GPU whose kernels do nothing, so that torch's own
   CUDA code runs where there is none: memory is the host's, and copies are made at once. Streams and events are
   captured by CUDA's rules (CUDA Programming Guide, "CUDA Graphs"): what may not be called during a capture
   breaks it, a stream that joins has to come back, and none waits for an event from before. */

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef struct Stream Stream;

typedef struct {
	unsigned long id;
	enum cudaStreamCaptureMode mode;
	pthread_t thread;
	Stream *origin;
	bool open, broken;
	size_t nodes;
} Capture;

struct Stream {
	Capture *capture;
	unsigned long work; /* what was given to it so far */
	bool apart;			/* the origin of its capture has not waited for all of that */
	Stream *next;
};

typedef struct {
	Stream *stream;
	Capture *capture;
	unsigned long work;
} Event;

/* What a test asks: kernels and copies outside of captures and inside, how often a stream joined one, waits of
   the host, captured copies from or to it, and the first call that broke a capture. */
typedef struct {
	unsigned long launched, captured, joined, waits, host_copies;
	char broken_by[64];
} Tally;

Tally tally;

enum { PAGE = 2 << 20 }; /* of the allocator, which is torch's */

static Stream legacy, *streams;
static Capture *current;
static unsigned long captures;
static __thread enum cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
static __thread cudaError_t last;

static Stream *stream_of(cudaStream_t handle) {
	return (uintptr_t)handle <= (uintptr_t)cudaStreamPerThread ? &legacy : (Stream *)handle;
}

static Capture *capture_of(Stream *stream) {
	if (stream->capture && !stream->capture->open)
		stream->capture = NULL;
	return stream->capture;
}

static cudaError_t failed(cudaError_t error) { return last = error; }

static cudaError_t broken(Capture *capture, const char *call, cudaError_t error) {
	if (!capture->broken)
		snprintf(tally.broken_by, sizeof tally.broken_by, "%s", call);
	capture->broken = true;
	return failed(error);
}

/* A call that may wait for the device: not while a capture is open that this thread may break. */
static cudaError_t unsafe(const char *call) {
	if (!current || mode == cudaStreamCaptureModeRelaxed || current->mode == cudaStreamCaptureModeRelaxed)
		return cudaSuccess;
	if (current->mode == cudaStreamCaptureModeThreadLocal && !pthread_equal(current->thread, pthread_self()))
		return cudaSuccess;
	return broken(current, call, cudaErrorStreamCaptureUnsupported);
}

static bool submit(cudaStream_t handle) {
	Stream *stream = stream_of(handle);
	Capture *capture = capture_of(stream);
	stream->work++;
	if (!capture)
		return tally.launched++, false;
	stream->apart = stream != capture->origin;
	capture->nodes++;
	return tally.captured++, true;
}

/* Of the driver, libcuda.c, by which Triton launches. */
void launched_on(void *stream) { submit(stream); }

/* Captures */

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, enum cudaStreamCaptureMode how) {
	Stream *stream = stream_of(handle);
	if (stream == &legacy || capture_of(stream))
		return failed(cudaErrorStreamCaptureUnsupported);
	Capture capture = {++captures, how, pthread_self(), stream, .open = true};
	current = stream->capture = memcpy(malloc(sizeof capture), &capture, sizeof capture);
	return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t *graph) {
	Capture *capture = capture_of(stream_of(handle));
	*graph = NULL;
	if (!capture)
		return failed(cudaErrorIllegalState);
	for (Stream *stream = streams; stream; stream = stream->next)
		if (stream->capture == capture && stream->apart)
			broken(capture, "a stream that did not come back", cudaErrorStreamCaptureUnjoined);
	capture->open = false;
	current = NULL;
	if (capture->broken)
		return failed(cudaErrorStreamCaptureInvalidated);
	*graph = (cudaGraph_t)capture;
	return cudaSuccess;
}

static enum cudaStreamCaptureStatus status_of(Capture *capture) {
	if (!capture)
		return cudaStreamCaptureStatusNone;
	return capture->broken ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, enum cudaStreamCaptureStatus *status) {
	*status = status_of(capture_of(stream_of(handle)));
	return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(
	cudaStream_t handle, enum cudaStreamCaptureStatus *status, unsigned long long *id, cudaGraph_t *graph,
	const cudaGraphNode_t **dependencies, const cudaGraphEdgeData **edges, size_t *count
) {
	Capture *capture = capture_of(stream_of(handle));
	*status = status_of(capture);
	if (id)
		*id = capture ? capture->id : 0;
	if (graph)
		*graph = (cudaGraph_t)capture;
	if (dependencies)
		*dependencies = NULL;
	if (edges)
		*edges = NULL;
	if (count)
		*count = 0;
	return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *exchanged) {
	enum cudaStreamCaptureMode before = mode;
	mode = *exchanged;
	*exchanged = before;
	return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
	*made = (cudaGraphExec_t)graph;
	return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
	*count = ((Capture *)graph)->nodes;
	return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) { return submit(stream), cudaSuccess; }
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return cudaSuccess; }

/* Streams and events */

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *handle, unsigned flags, int priority) {
	Stream *stream = calloc(1, sizeof *stream);
	stream->next = streams;
	streams = stream;
	*handle = (cudaStream_t)stream;
	return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
	Capture *capture = capture_of(stream_of(handle));
	tally.waits++;
	return capture ? broken(capture, __func__, cudaErrorStreamCaptureUnsupported) : unsafe(__func__);
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
	Capture *capture = capture_of(stream_of(handle));
	return capture ? broken(capture, __func__, cudaErrorStreamCaptureUnsupported) : unsafe(__func__);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *handle, unsigned flags) {
	*handle = calloc(1, sizeof(Event));
	return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream) {
	Stream *from = stream_of(stream);
	*(Event *)handle = (Event){from, capture_of(from), from->work};
	return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream, unsigned flags) {
	return cudaEventRecord(handle, stream);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t awaited, unsigned flags) {
	Event *event = (Event *)awaited;
	Stream *stream = stream_of(handle);
	Capture *capture = capture_of(stream), *other = event->capture && event->capture->open ? event->capture : NULL;
	if (!other)
		return capture && event->stream ? broken(capture, __func__, cudaErrorStreamCaptureIsolation) : cudaSuccess;
	if (capture ? capture != other : stream == &legacy)
		return broken(other, __func__, capture ? cudaErrorStreamCaptureMerge : cudaErrorStreamCaptureImplicit);
	tally.joined += !capture;
	stream->capture = other;
	stream->apart = stream != other->origin;
	if (event->stream != stream && event->stream->work == event->work)
		event->stream->apart = false;
	return cudaSuccess;
}

static cudaError_t ask(Event *event, const char *call) {
	if (event->capture && event->capture->open)
		return broken(event->capture, call, cudaErrorCapturedEvent);
	return unsafe(call);
}

cudaError_t cudaEventQuery(cudaEvent_t event) { return ask((Event *)event, __func__); }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return tally.waits++, ask((Event *)event, __func__); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { return tally.waits++, unsafe(__func__); }

/* Kernels and copies */

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel, void **arguments) {
	return submit(config->stream), cudaSuccess;
}

cudaError_t __cudaLaunchKernel(
	const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream
) {
	return submit(stream), cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
	if (!submit(stream))
		memcpy(to, from, size);
	else if (kind != cudaMemcpyDeviceToDevice)
		tally.host_copies++;
	return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
	if (!submit(stream))
		memset(to, value, size);
	return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
	*kernel = (cudaKernel_t)function;
	return cudaSuccess;
}

static __thread struct {
	dim3 grid, block;
	size_t shared;
	cudaStream_t stream;
} launch; /* what <<<…>>> gave the call that follows */

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
	launch.grid = grid, launch.block = block, launch.shared = shared, launch.stream = stream;
	return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, cudaStream_t *stream) {
	*grid = launch.grid, *block = launch.block, *shared = launch.shared, *stream = launch.stream;
	return cudaSuccess;
}

void **__cudaRegisterFatBinary(void *binary) { return binary; }
void __cudaRegisterFatBinaryEnd(void **binary) {}
void __cudaUnregisterFatBinary(void **binary) {}
char __cudaInitModule(void **binary) { return 1; }
void __cudaRegisterFunction(void) {}
void __cudaRegisterVar(void) {}

/* Memory */

cudaError_t cudaMalloc(void **address, size_t size) {
	if (unsafe(__func__))
		return last;
	size = (size + PAGE - 1) / PAGE * PAGE + PAGE;
	char *mapped = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (mapped == MAP_FAILED)
		return failed(cudaErrorMemoryAllocation);
	*address = (void *)(((uintptr_t)mapped + PAGE - 1) / PAGE * PAGE);
	return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **address, size_t size, unsigned flags) {
	*address = calloc(1, size);
	return unsafe(__func__);
}

cudaError_t cudaMemGetInfo(size_t *there, size_t *all) {
	*there = *all = (size_t)139 << 30;
	return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *address) {
	*attributes = (struct cudaPointerAttributes){cudaMemoryTypeDevice, 0, (void *)address, NULL};
	return cudaSuccess;
}

cudaError_t cudaFree(void *address) { return unsafe(__func__); }
cudaError_t cudaFreeHost(void *address) { return unsafe(__func__); }

/* The device */

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *of, int device) {
	memset(of, 0, sizeof *of);
	strcpy(of->name, "a stand-in for an H200");
	of->major = 9, of->multiProcessorCount = 132, of->warpSize = 32;
	of->totalGlobalMem = (size_t)139 << 30;
	of->maxThreadsPerBlock = of->maxThreadsDim[0] = of->maxThreadsDim[1] = 1024, of->maxThreadsDim[2] = 64;
	of->maxGridSize[0] = 0x7fffffff, of->maxGridSize[1] = of->maxGridSize[2] = 65535;
	of->maxThreadsPerMultiProcessor = 2048, of->regsPerMultiprocessor = of->regsPerBlock = 65536;
	of->sharedMemPerBlock = 49152, of->sharedMemPerBlockOptin = 232448, of->sharedMemPerMultiprocessor = 233472;
	return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
	switch (attribute) {
	case cudaDevAttrMultiProcessorCount: *value = 132; break;
	case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
	case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
	case cudaDevAttrWarpSize: *value = 32; break;
	case cudaDevAttrMaxSharedMemoryPerBlock: *value = 49152; break;
	case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
	default: *value = 1024;
	}
	return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *kernel) {
	*attributes = (struct cudaFuncAttributes){.maxThreadsPerBlock = 1024, .numRegs = 32, .binaryVersion = 90};
	return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
	int *blocks, const void *kernel, int threads, size_t shared, unsigned flags
) {
	*blocks = 2;
	return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(
	const char *name, void **function, unsigned version, unsigned long long flags,
	enum cudaDriverEntryPointQueryResult *found
) {
	*function = dlsym(dlopen("libcuda.so.1", RTLD_NOW), name);
	if (found)
		*found = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
	return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
	*least = 0, *greatest = -5;
	return cudaSuccess;
}

cudaError_t cudaGetLastError(void) {
	cudaError_t error = last;
	last = cudaSuccess;
	return error;
}

cudaError_t cudaPeekAtLastError(void) { return last; }
cudaError_t cudaGetDeviceCount(int *devices) { return *devices = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device ? failed(cudaErrorInvalidDevice) : cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDA_VERSION, cudaSuccess; }

/* Matrix products */

int cublasCreate_v2(void **handle) { return *handle = &legacy, 0; }
int cublasSetStream_v2(void *handle, cudaStream_t stream) { return 0; }
int cublasSetWorkspace_v2(void *handle, void *workspace, size_t size) { return 0; }
int cublasGetMathMode(void *handle, int *how) { return *how = 0; }
int cublasSetMathMode(void *handle, int how) { return 0; }
int cublasSgemm_v2(void) { return 0; }
int cublasGemmEx(void) { return 0; }
