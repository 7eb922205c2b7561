// A whole step of an MLP in one cooperative launch. Barriers of the grid separate its phases:
//
//     for each tile of samples, whose activations fit in L2:
//         layer after layer: tiles of products, then noise and activation                  (mlp_forward.cuh)
//         losses of all copies; their weights, with the baseline                           (row_loss.cuh)
//         gradients of all layers: features x panels of inputs x parts of the rows         (gradient.cuh)
//     sums of the parts, in their order, to the buffers
//
// A workspace holds all values that outlive a phase.
#include "gradient.cuh"
#include "launch.cuh"
#include "mlp_forward.cuh"

namespace ulr {
namespace {

static_assert(kMlpThreads == kGradThreads);

// The loss of each copy of each sample of a tile, and its weight.
template <typename T>
__device__ __forceinline__ void weigh_samples(const MlpStep<T>& p, int64_t first, int samples) {
    const Level<T>& logits = p.levels[p.layers];
    const int features = static_cast<int>(logits.width);
    const float count = static_cast<float>(p.copies) * static_cast<float>(p.rows);
    for (int64_t item = blockIdx.x; item < int64_t{p.passes()} * samples; item += gridDim.x) {
        const int64_t pass = item / samples, sample = item % samples;
        float* losses = p.losses + pass * p.copies * p.rows + first + sample;
        for (int copy = threadIdx.x / 32; copy < p.copies; copy += kWarps) {
            const int64_t row = (pass * p.copies + copy) * samples + sample;
            const float loss =
                row_loss(p.loss, p.smoothing, logits.noised + row * logits.pitch, features, p.target, first + sample);
            if (threadIdx.x % 32 == 0) losses[copy * p.rows] = loss;
        }
        const float clean = p.baseline != Baseline::kClean
                                ? 0.0f
                                : row_loss(p.loss, p.smoothing, logits.clean + sample * logits.pitch, features,
                                           p.target, first + sample);
        __syncthreads();
        weigh_losses(losses, p.rows, clean, p.loss_weights + pass * p.copies * samples + sample, samples, p.copies,
                     p.noise.antithetic != 0, p.baseline, count);
        __syncthreads();
    }
}

// Layer l's gradient for a tile of samples as a problem of gradient.cuh, whose sums go to a split's own buffer.
template <typename T>
__device__ void describe_gradient(Gradient<Linear<T>>& problem, const MlpStep<T>& p, int l, int split, int64_t first,
                                  int samples) {
    const MlpLayer<T>& layer = p.layer[l];
    problem = Gradient<Linear<T>>{};
    problem.noise = p.noise_of(l);
    problem.noise.row_offset += first;
    problem.shared = p.makes_copies(l);
    if (problem.shared) {
        problem.x = p.clean_input(l, first, samples);
    } else {
        problem.x = p.levels[l].matrix(p.levels[l].noised, samples);
        problem.x_copy_stride = int64_t{samples} * p.levels[l].pitch;
    }
    problem.sigma.data = const_cast<float*>(p.sigma + l);
    problem.loss_weight = p.loss_weights + int64_t{p.joint ? 0 : l} * p.copies * samples;
    problem.loss_copy_stride = samples;
    problem.loss_sample_stride = 1;
    problem.loss_samples = samples;
    problem.features = layer.weight.rows;
    problem.grad_weight = layer.grad_weight;
    problem.grad_bias = layer.grad_bias;
    if (layer.partials != nullptr) {
        const int64_t inputs = layer.weight.cols, weights = problem.features * inputs;
        float* own = layer.partials + split * (weights + problem.features);
        const bool biased = layer.grad_bias.data != nullptr;
        problem.grad_weight.data = own;
        problem.grad_bias.data = biased ? own + weights : nullptr;
        problem.grad_weight.wide = problem.grad_bias.wide = true;
        problem.grad_weight.row_stride = inputs;
        problem.grad_weight.col_stride = problem.grad_bias.col_stride = 1;
    }
    problem.copies = p.copies;
    problem.draws = p.draws;
    problem.feature_tiles = (problem.features + kGradFeatures - 1) / kGradFeatures;
    problem.panels = (layer.weight.cols + kPanel - 1) / kPanel;
}

// The gradients of all layers for a tile of samples, their parts in turn.
template <typename T, Kind kind>
__device__ __forceinline__ void accumulate(const MlpStep<T>& p, int64_t first, int samples) {
    auto& problem = *reinterpret_cast<Gradient<Linear<T>>*>(dynamic_shared<char>() + GradientMemory<T, false>::kBytes);
    for (int64_t item = blockIdx.x;; item += gridDim.x) {
        int64_t rest = item;
        int l = 0;
        for (; l < p.layers; ++l) {
            const MlpLayer<T>& layer = p.layer[l];
            const int64_t items = (layer.weight.rows + kGradFeatures - 1) / kGradFeatures *
                                  ((layer.weight.cols + kPanel - 1) / kPanel) * layer.splits;
            if (rest < items) break;
            rest -= items;
        }
        if (l == p.layers) return;
        const int splits = p.layer[l].splits, split = static_cast<int>(rest % splits);
        if (threadIdx.x == 0) describe_gradient(problem, p, l, split, first, samples);
        __syncthreads();
        const int64_t units = gradient_units(problem, p.layer[l].unit_rows), tile = rest / splits;
        const GradientPart part{tile % problem.feature_tiles, static_cast<int>(tile / problem.feature_tiles),
                                p.layer[l].unit_rows, units * split / splits, units * (split + 1) / splits};
        gradient_block<Linear<T>, kind, false>(problem, part);
        __syncthreads();
    }
}

// The sums of all splits, in their order, to the buffers.
template <typename T>
__device__ __forceinline__ void add_splits(const MlpStep<T>& p) {
    for (int l = 0; l < p.layers; ++l) {
        const MlpLayer<T>& layer = p.layer[l];
        if (layer.partials == nullptr) continue;
        const int64_t features = layer.weight.rows, inputs = layer.weight.cols, size = features * (inputs + 1);
        const auto sum = [&](int64_t at) {
            float total = 0.0f;
            for (int split = 0; split < layer.splits; ++split) total += layer.partials[split * size + at];
            return total;
        };
        for (int64_t n = blockIdx.x; n < features; n += gridDim.x) {
            for (int64_t k = threadIdx.x; k < inputs; k += kMlpThreads)
                layer.grad_weight.add(n, k, sum(n * inputs + k));
            if (threadIdx.x == 0 && layer.grad_bias.data != nullptr)
                layer.grad_bias.add(0, n, sum(features * inputs + n));
        }
    }
}

template <typename T, Kind kind>
__global__ void __launch_bounds__(kMlpThreads, 1) mlp_step_kernel(const MlpStep<T> p) {
    for (int64_t i = int64_t{blockIdx.x} * kMlpThreads + threadIdx.x; i < p.partials_count;
         i += int64_t{gridDim.x} * kMlpThreads)
        p.partials[i] = 0.0f;
    for (int64_t first = 0; first < p.rows; first += p.tile_samples) {
        const int samples = static_cast<int>(min(p.rows - first, p.tile_samples));
        for (int l = 0; l < p.layers; ++l) {
            forward_layer<T, kind>(p, l, first, samples);
            grid_sync();
        }
        weigh_samples(p, first, samples);
        grid_sync();
        accumulate<T, kind>(p, first, samples);
        grid_sync();
    }
    add_splits(p);
}

// tensors: losses [P, C, R], x, target, sigma [L], the workspace; of each layer weight, bias, grad_weight, grad_bias;
// last the keys [L], which the noise points to.
enum { kLosses, kX, kTarget, kSigma, kWorkspace, kFirstLayer };
enum { kWeight, kBias, kGradWeight, kGradBias, kTensorsOfLayer };
// numbers: these; of each layer those of its own, and the places of its output's two parts. Places are bytes from the
// workspace's start, -1 for none.
enum {
    kJoint,
    kHasClean,
    kActivation,
    kLoss,
    kSmoothing,
    kBaseline,
    kTileSamples,
    kLossWeights,
    kPartials,
    kPartialsCount,
    kFirstLayerNumber
};
enum { kSplits, kUnitRows, kFan, kTile, kPartialsOfLayer, kClean, kNoised, kPitch, kNumbersOfLayer };

template <typename T>
int run(const ulr_noise_spec& noise, const ulr_tensor* t, const ulr_launch& launch) {
    const int64_t* numbers = launch.numbers;
    const int layers = (launch.tensors - kFirstLayer - 1) / kTensorsOfLayer;
    if (layers < 1 || layers > kMostLayers) return ULR_BAD_ARGUMENT;
    char* workspace = static_cast<char*>(t[kWorkspace].data);
    const auto place = [&](int64_t offset) { return offset < 0 ? nullptr : workspace + offset; };
    const int copies = static_cast<int>(t[kLosses].size[1]);
    MlpStep<T> p{noise,
                 Matrix<T>(t[kX]),
                 Target<T>(t[kTarget]),
                 static_cast<const float*>(t[kSigma].data),
                 static_cast<float*>(t[kLosses].data),
                 reinterpret_cast<float*>(place(numbers[kLossWeights])),
                 reinterpret_cast<float*>(place(numbers[kPartials])),
                 numbers[kPartialsCount],
                 t[kX].size[1],
                 numbers[kTileSamples],
                 copies,
                 noise.antithetic ? copies / 2 : copies,
                 layers,
                 numbers[kJoint] != 0,
                 numbers[kHasClean] != 0,
                 static_cast<Activation>(numbers[kActivation]),
                 static_cast<Loss>(numbers[kLoss]),
                 number_of(numbers[kSmoothing]),
                 static_cast<Baseline>(numbers[kBaseline]),
                 {},
                 {}};
    for (int l = 0; l < layers; ++l) {
        const ulr_tensor* tensors = t + kFirstLayer + l * kTensorsOfLayer;
        const int64_t* own = numbers + kFirstLayerNumber + l * kNumbersOfLayer;
        MlpLayer<T>& layer = p.layer[l];
        layer.weight = Matrix<T>(tensors[kWeight]);
        layer.bias = PerFeature<T>(tensors[kBias]);
        layer.grad_weight = Buffer<T>(tensors[kGradWeight]);
        layer.grad_bias = Buffer<T>(tensors[kGradBias]);
        layer.partials = reinterpret_cast<float*>(place(own[kPartialsOfLayer]));
        layer.splits = static_cast<int>(own[kSplits]);
        layer.unit_rows = static_cast<int>(own[kUnitRows]);
        layer.fan = static_cast<int>(own[kFan]);
        layer.tile = static_cast<int>(own[kTile]);
        p.levels[l + 1] = {reinterpret_cast<T*>(place(own[kClean])), reinterpret_cast<T*>(place(own[kNoised])),
                           tensors[kWeight].size[1], own[kPitch]};
    }
    constexpr int kGradient = GradientMemory<T, false>::kBytes + int{sizeof(Gradient<Linear<T>>)};
    constexpr int kBytes = kGradient > forward_bytes(128) ? kGradient : forward_bytes(128);
    return kind_of(noise) == Kind::kSigns
               ? launch_together(mlp_step_kernel<T, Kind::kSigns>, dim3(kMlpThreads), kBytes, launch, p)
               : launch_together(mlp_step_kernel<T, Kind::kQuantile>, dim3(kMlpThreads), kBytes, launch, p);
}

}  // namespace
}  // namespace ulr

extern "C" int ulr_cuda_noisy_mlp_step(const ulr_noise_spec* noise, const ulr_tensor* tensors,
                                       const ulr_launch* launch) {
    switch (tensors[ulr::kX].dtype) {
        case ULR_F32:
            return ulr::run<float>(*noise, tensors, *launch);
        case ULR_BF16:
            return ulr::run<__nv_bfloat16>(*noise, tensors, *launch);
        default:
            return ULR_BAD_ARGUMENT;
    }
}
