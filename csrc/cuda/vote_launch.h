// The launchers of the two vote kernels, for vote.cu.
#pragma once

#include <cuda_runtime_api.h>

#include "vote_plan.h"

namespace zipfls::cuda::vote {

struct MmaArgs;
struct WgmmaProblem;

/// vote_mma_sm80.cu: one of the mma.sync kernels.
cudaError_t launch_mma(Kernel kernel, VoteType type, Layout layout, const MmaArgs& args,
                       int64_t blocks, cudaStream_t stream);
/// Shared memory a block of it takes, bytes.
size_t mma_shared_bytes(Kernel kernel);

/// vote_wgmma_sm90.cu: whether this build has a wgmma kernel for the current device.
bool wgmma_present();

/// One of the wgmma kernels.
cudaError_t launch_wgmma(Kernel kernel, const WgmmaProblem& problem, int multiprocessors,
                         cudaStream_t stream);

}  // namespace zipfls::cuda::vote
