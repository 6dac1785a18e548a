// The policy loss of one bfloat16 row, kept on chip between its statistics and its gradient (sm_90a).
//
// A cluster of BLOCKS thread blocks holds one row in shared memory, a slice each, double buffered: bulk asynchronous
// copies bring the next row while this one is worked on, and carry the gradient back over the logits. The blocks
// exchange (peak, total, weighted, target) once per row through distributed shared memory. Memory traffic: one read and
// one write per row.
//
// Formulas: torch_rows.py. Flags and log2 domain: row_kernels.py. No torch headers: called through ctypes.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace cg = cooperative_groups;

// Field for field the ctypes structure in cuda_cluster.py.
struct Arguments {
  __nv_bfloat16* logits;
  const long long* targets;
  const float *old_log_prob, *advantage, *weight, *sampler;
  float *log_prob, *entropy, *loss;
  signed char* has_gradient;
  int* flags;
  long long row_stride;
  int rows, columns;
  float scale, inverse_temperature;
  float preclip_low, preclip_high, clip_low, clip_high, dual_clip, importance_cap;
};

constexpr float kLn2 = 0.69314718055994531f, kLog2E = 1.4426950408889634f;

struct Statistics {
  float peak, total, weighted;
};

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t phase) {
  asm volatile(
      "{\n.reg .pred done;\nWAIT: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra WAIT;\n}" ::"r"(
          shared_address(barrier)),
      "r"(phase)
      : "memory");
}
__device__ __forceinline__ void copy_in(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
__device__ __forceinline__ void copy_out(void* global, const void* shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared_address(shared)),
               "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;");
}
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ Statistics merge(Statistics a, Statistics b) {
  const float peak = fmaxf(a.peak, b.peak);
  const float shift_a = a.peak == -INFINITY ? 0.f : a.peak - peak;
  const float shift_b = b.peak == -INFINITY ? 0.f : b.peak - peak;
  const float scale_a = a.peak == -INFINITY ? 0.f : exp2_fast(shift_a);
  const float scale_b = b.peak == -INFINITY ? 0.f : exp2_fast(shift_b);
  return {peak, scale_a * a.total + scale_b * b.total,
          scale_a * (a.weighted + a.total * shift_a) + scale_b * (b.weighted + b.total * shift_b)};
}

// Eight columns at a time into the running statistics of this thread.
__device__ __forceinline__ Statistics add_columns(Statistics running, const uint4& packed, float scale) {
  const __nv_bfloat162* pairs = reinterpret_cast<const __nv_bfloat162*>(&packed);
  float z[8];
  float peak = running.peak;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float2 pair = __bfloat1622float2(pairs[k]);
    z[2 * k] = pair.x * scale;
    z[2 * k + 1] = pair.y * scale;
    peak = fmaxf(peak, fmaxf(z[2 * k], z[2 * k + 1]));
  }
  const float anchor = peak == -INFINITY ? 0.f : peak;
  const float shift = running.peak == -INFINITY ? 0.f : running.peak - anchor;
  const float decay = running.peak == -INFINITY ? 0.f : exp2_fast(shift);
  Statistics next = {peak, running.total * decay, decay * (running.weighted + running.total * shift)};
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const float distance = z[k] - anchor, power = exp2_fast(distance);
    next.total += power;
    next.weighted += power == 0.f ? 0.f : power * distance;
  }
  return next;
}

struct RowLoss {
  float loss, slope;
  int flags;
};

__device__ __forceinline__ bool broken(float x) { return !(fabsf(x) < INFINITY); }

__device__ RowLoss row_loss(const Arguments& a, int row, float log_prob) {
  const float weight = a.weight[row];
  if (weight == 0.f) return {0.f, 0.f, 0};
  float usable = a.advantage[row];
  const bool rejected = broken(usable);
  if (rejected) usable = 0.f;
  const float old = a.old_log_prob[row];
  float scaled = usable;
  if (a.sampler) {
    const float importance = exp2_fast((old - a.sampler[row]) * kLog2E);
    scaled = usable * (importance > a.importance_cap ? a.importance_cap : importance);
  }
  const bool signal = usable != 0.f && scaled != 0.f;
  if (!signal) return {0.f, 0.f, 1 + 2 * rejected};
  float ratio = log_prob - old;
  const bool below = ratio < a.preclip_low, above = ratio > a.preclip_high;
  ratio = below ? a.preclip_low : above ? a.preclip_high : ratio;
  const bool clipped_low = scaled < 0.f && ratio < a.clip_low;
  const float upper = scaled > 0.f ? a.clip_high : a.dual_clip;
  const bool clipped_high = ratio > upper;
  ratio = clipped_low ? a.clip_low : clipped_high ? upper : ratio;
  const float unweighted = -exp2_fast(ratio * kLog2E) * scaled;
  const float loss = unweighted * weight;
  const float slope = (below || above || clipped_low || clipped_high) ? 0.f : loss;
  const int flags = 1 + 4 * below + 8 * above + 16 * clipped_low + 32 * clipped_high + 64 * (broken(loss) || broken(slope));
  return {loss, slope, flags};
}

// Overwrite one slice with slope * ([y] - p) / temperature, rounded once from float32.
template <int THREADS>
__device__ __forceinline__ void write_gradient(uint4* slice, int columns, float slope, float scale, float normalizer,
                                               int target) {
  for (int i = threadIdx.x; i < columns / 8; i += THREADS) {
    uint4 packed = slice[i];
    __nv_bfloat162* pairs = reinterpret_cast<__nv_bfloat162*>(&packed);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float2 pair = __bfloat1622float2(pairs[k]);
      const int column = i * 8 + 2 * k;
      pair.x = slope * ((column == target ? 1.f : 0.f) - exp2_fast(fmaf(pair.x, scale, -normalizer)));
      pair.y = slope * ((column + 1 == target ? 1.f : 0.f) - exp2_fast(fmaf(pair.y, scale, -normalizer)));
      pairs[k] = __float22bfloat162_rn(pair);
    }
    slice[i] = packed;
  }
}

template <int BLOCKS, int THREADS>
__global__ void __launch_bounds__(THREADS, 1) row_cluster_kernel(const __grid_constant__ Arguments a, int slice_columns) {
  extern __shared__ __align__(128) unsigned char shared[];
  __nv_bfloat16* buffers = reinterpret_cast<__nv_bfloat16*>(shared);  // [2][slice_columns]
  float4* exchange = reinterpret_cast<float4*>(shared + static_cast<size_t>(slice_columns) * 4);  // [2][BLOCKS]
  Statistics* warps = reinterpret_cast<Statistics*>(exchange + 2 * BLOCKS);                       // [THREADS / 32]
  uint64_t* full = reinterpret_cast<uint64_t*>(warps + THREADS / 32 + 2);                         // [2], 8-byte aligned
  cg::cluster_group cluster = cg::this_cluster();
  const int rank = cluster.block_rank(), warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int clusters = gridDim.x / BLOCKS, first_column = rank * slice_columns;
  const int columns = max(0, min(slice_columns, a.columns - first_column));
  const uint32_t bytes = columns * 2;
  if (threadIdx.x == 0) {
    barrier_init(full, 1);
    barrier_init(full + 1, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster.sync();

  auto prefetch = [&](int row, int buffer) {
    if (row < a.rows && bytes) {
      barrier_expect(full + buffer, bytes);
      copy_in(buffers + buffer * slice_columns, a.logits + row * a.row_stride + first_column, bytes, full + buffer);
    }
  };
  uint32_t phases = 0;  // bit b: phase of full[b]
  int buffer = 0, slot = 0;  // slot flips with every row: nobody overwrites what a peer still reads
  int row = blockIdx.x / BLOCKS;
  if (threadIdx.x == 0) prefetch(row, 0);
  for (; row < a.rows; row += clusters, buffer ^= 1) {
    if (threadIdx.x == 0) {
      asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");  // the other buffer's gradient has left
      prefetch(row + clusters, buffer ^ 1);
    }
    uint4* slice = reinterpret_cast<uint4*>(buffers + buffer * slice_columns);
    const long long offset_in_slice = a.targets[row] - first_column;
    const int target = offset_in_slice >= 0 && offset_in_slice < columns ? static_cast<int>(offset_in_slice) : -1;
    if (bytes) {
      barrier_wait(full + buffer, (phases >> buffer) & 1);
      phases ^= 1u << buffer;
    }
    Statistics own = {-INFINITY, 0.f, 0.f};
    for (int i = threadIdx.x; i < columns / 8; i += THREADS) own = add_columns(own, slice[i], a.scale);
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) {
      own = merge(own, {__shfl_xor_sync(~0u, own.peak, offset), __shfl_xor_sync(~0u, own.total, offset),
                        __shfl_xor_sync(~0u, own.weighted, offset)});
    }
    if (lane == 0) warps[warp] = own;
    __syncthreads();
    if (threadIdx.x == 0) {
      own = warps[0];
      for (int k = 1; k < THREADS / 32; ++k) own = merge(own, warps[k]);
      const float z = target >= 0 ? __bfloat162float(buffers[buffer * slice_columns + target]) * a.scale : -INFINITY;
      const float4 part = make_float4(own.peak, own.total, own.weighted, z);
      for (int k = 0; k < BLOCKS; ++k) *cluster.map_shared_rank(exchange + slot * BLOCKS + rank, k) = part;
    }
    cluster.sync();  // the only cluster barrier of a row
    Statistics whole = {-INFINITY, 0.f, 0.f};
    float target_z = -INFINITY;
#pragma unroll
    for (int k = 0; k < BLOCKS; ++k) {
      const float4 part = exchange[slot * BLOCKS + k];
      whole = merge(whole, {part.x, part.y, part.z});
      target_z = fmaxf(target_z, part.w);
    }
    slot ^= 1;
    const float normalizer = whole.peak + log2_fast(whole.total);
    const float log_prob = (target_z - normalizer) * kLn2;
    const float entropy = (log2_fast(whole.total) - whole.weighted / whole.total) * kLn2;
    const RowLoss result = row_loss(a, row, log_prob);
    const bool has_gradient = result.slope != 0.f;
    if (rank == 0 && threadIdx.x == 0) {
      a.log_prob[row] = log_prob;
      a.entropy[row] = entropy;
      a.loss[row] = result.loss;
      a.has_gradient[row] = has_gradient;
      a.flags[row] = result.flags;
    }
    if (has_gradient) {
      write_gradient<THREADS>(slice, columns, result.slope * a.inverse_temperature, a.scale, normalizer, target);
    } else {
      for (int i = threadIdx.x; i < columns / 8; i += THREADS) slice[i] = make_uint4(0, 0, 0, 0);
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    if (threadIdx.x == 0 && bytes) {
      copy_out(a.logits + row * a.row_stride + first_column, buffers + buffer * slice_columns, bytes);
    }
  }
  if (threadIdx.x == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  cluster.sync();  // no block may leave while a peer can still write to its shared memory
}

extern "C" int row_cluster_arguments_size() { return static_cast<int>(sizeof(Arguments)); }

// Returns the CUDA error code, 0 on success. Asynchronous on `stream`.
extern "C" int row_cluster(const Arguments* arguments, void* stream) {
  constexpr int kBlocks = 4, kThreads = 512;
  if (arguments->rows == 0) return 0;
  const int slice_columns = ((arguments->columns + kBlocks - 1) / kBlocks + 7) / 8 * 8;
  const size_t shared = static_cast<size_t>(slice_columns) * 4 + 2 * kBlocks * sizeof(float4) +
                        (kThreads / 32 + 2) * sizeof(Statistics) + 2 * sizeof(uint64_t);
  auto* kernel = row_cluster_kernel<kBlocks, kThreads>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error) return error;
  cudaLaunchAttribute attribute[1];
  attribute[0].id = cudaLaunchAttributeClusterDimension;
  attribute[0].val.clusterDim = {kBlocks, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(kBlocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attribute;
  config.numAttrs = 1;
  int clusters = 0;  // GPCs have 16 or 18 SMs: the number that fits is not SMs / kBlocks
  error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  if (error) return error;
  config.gridDim = dim3(clusters * kBlocks);
  return cudaLaunchKernelEx(&config, kernel, *arguments, slice_columns);
}
